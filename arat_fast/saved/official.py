"""Checkpoints of the official AR-AT code (https://github.com/futakw/AR-AT), both ways.

There every BatchNorm is a dictionary of two: ``bn1.clean.weight`` and ``bn1.adv.weight`` are the
rows of ``bn1.weight`` here. All other names are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from arat_fast.models.registry import MODELS, create_model
from arat_fast.objectives.predictor import Predictors
from arat_fast.saved.weights import difference, is_split, network_size, without_wrappers

BRANCHES = ("clean", "adv")
# The default of the official --bn_names; its scripts pass clean,adv.
OTHER_BRANCHES = ("base", "base_adv")
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


def official_to_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names → names and shapes of the built-in networks.

    Args:
        official: a state dict; the wrappers around the network are taken off its names.

    Returns:
        New tensors; those of a BatchNorm are stacked, row 0 clean and row 1 adversarial.

    Raises:
        ValueError: a BatchNorm lacks a branch, or both naming schemes of the branches occur.
    """
    official = without_wrappers(official)
    branches = _branch_names(official)
    result: dict[str, Tensor] = {}
    for name, tensor in official.items():
        path, _, last = name.rpartition(".")
        layer, _, branch = path.rpartition(".")
        if branch not in branches:
            result[name] = tensor.clone()
            continue
        names = [f"{layer}.{b}.{last}" for b in branches]
        pair = [official[key] for key in names if key in official]
        if len(pair) < 2 or pair[0].shape != pair[1].shape:
            raise ValueError(f"{' and '.join(names)} are expected, both and of one shape")
        result[f"{layer}.{last}"] = torch.stack(pair)
    return result


def state_dict_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`official_to_state_dict`, for any network with split BatchNorm.

    Args:
        state: ``model.state_dict()``.

    Returns:
        New tensors under the official names.

    Raises:
        ValueError: the network has no split BatchNorm.
    """
    if not is_split(state):
        raise ValueError(
            "a network with split BatchNorm is expected, got none: (2, C) running statistics"
        )
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
    """State dict of :class:`arat_fast.objectives.predictor.Predictors` from the official ones.

    Args:
        official: the state dict of each layer's official loss module (``predictor_x.0.weight`` …),
            in the order of the layers.

    Raises:
        ValueError: a tensor is missing.
    """
    groups: dict[int, list[Mapping[str, Tensor]]] = {}
    for index, state in enumerate(official):
        if not state.keys() >= set(_PREDICTOR.values()):
            raise ValueError(f"predictor {index} lacks one of {', '.join(_PREDICTOR.values())}")
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


def is_official(state: Mapping[str, Tensor]) -> bool:
    """Whether a BatchNorm has its branches under names of their own."""
    layers = {name.split(".")[-2] for name in state if "." in name}
    return not layers.isdisjoint({*BRANCHES, *OTHER_BRANCHES})


def _branch_names(official: Mapping[str, Tensor]) -> tuple[str, str]:
    parts = {part for name in official for part in name.split(".")}
    schemes = [names for names in (BRANCHES, OTHER_BRANCHES) if parts.intersection(names)]
    if len(schemes) != 1:
        got = "both" if schemes else f"{next(iter(official), 'no tensor')} and no such name"
        raise ValueError(
            f"BatchNorm branches named {', '.join(BRANCHES)} or {', '.join(OTHER_BRANCHES)} are "
            f"expected, as in bn1.clean.weight, got {got}"
        )
    return schemes[0]


def detect(state: Mapping[str, Tensor]) -> str:
    """Name of the built-in network with BatchNorm that has exactly these tensors.

    Args:
        state: as in ``model.state_dict()``, split BatchNorm.

    Raises:
        ValueError: there is none; says what differs from the nearest.
    """
    problems, unlike = [], []
    for name, spec in MODELS.items():
        if not spec.has_batch_norm:
            continue
        try:
            size = network_size(state, name)
        except ValueError as error:
            unlike.append(str(error))
            continue
        with torch.device("meta"):
            expected = create_model(name, *size).state_dict()
        problem = difference(expected, state)
        if problem is None:
            return name
        common = len(expected.keys() & state.keys()) / len(expected.keys() | state.keys())
        problems.append((common, f"{problem}, for the nearest network, {name}"))
    raise ValueError(max(problems)[1] if problems else unlike[0])
