"""Networks and predictors under the names of the official AR-AT code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from arat_fast.objectives.predictor import Predictors
from arat_fast.saved.official import BRANCHES

_PREDICTOR = {
    "weight1": "predictor_x.0.weight",
    "bn_weight": "predictor_x.1.weight",
    "bn_bias": "predictor_x.1.bias",
    "running_mean": "predictor_x.1.running_mean",
    "running_var": "predictor_x.1.running_var",
    "num_batches_tracked": "predictor_x.1.num_batches_tracked",
    "weight2": "predictor_x.3.weight",
    "bias2": "predictor_x.3.bias",
}


def state_dict_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`arat_fast.saved.official.official_to_state_dict`: new tensors."""
    result = {}
    for name, tensor in state.items():
        layer, _, last = name.rpartition(".")
        statistics = state.get(f"{layer}.running_mean")
        if statistics is not None and statistics.ndim == 2:
            for row, branch in enumerate(BRANCHES):
                result[f"{layer}.{branch}.{last}"] = tensor[row].clone()
        else:
            result[name] = tensor.clone()
    return result


def official_predictors_to_state_dict(
    official: Sequence[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """State dict of :class:`arat_fast.objectives.predictor.Predictors` from those of each layer's
    official loss module (``predictor_x.0.weight`` …), in the order of the layers."""
    groups: dict[int, list[Mapping[str, Tensor]]] = {}
    for state in official:
        groups.setdefault(state["predictor_x.0.weight"].shape[1], []).append(state)
    result = {}
    for stack, members in enumerate(groups.values()):
        for ours, theirs in _PREDICTOR.items():
            rows = [state[theirs] for state in members]
            # All predictors see every batch: one counter serves them.
            counter = ours == "num_batches_tracked"
            result[f"stacks.{stack}.{ours}"] = rows[0].clone() if counter else torch.stack(rows)
    return result


def predictors_to_official(predictors: Predictors) -> list[dict[str, Tensor]]:
    """Inverse of :func:`official_predictors_to_state_dict`: one state dict per layer, in order."""
    state = predictors.state_dict()
    result: list[dict[str, Tensor]] = [{} for _ in range(predictors.num_layers)]
    for stack, members in enumerate(predictors.groups):
        for ours, theirs in _PREDICTOR.items():
            rows = state[f"stacks.{stack}.{ours}"]
            for slot, index in enumerate(members):
                result[index][theirs] = (rows if rows.ndim == 0 else rows[slot]).clone()
    return result
