"""Checkpoints of the official AR-AT code (https://github.com/futakw/AR-AT).

There every BatchNorm is a dictionary of two: ``bn1.clean.weight`` and ``bn1.adv.weight`` are the
rows of ``bn1.weight`` here. All other names are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from arat_fast.models.registry import MODELS, create_model
from arat_fast.saved.weights import difference, network_size, without_wrappers

BRANCHES = ("clean", "adv")
# The default of the official --bn_names; its scripts pass clean,adv.
OTHER_BRANCHES = ("base", "base_adv")


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
    """Name of the built-in network that has exactly these tensors.

    Args:
        state: as in ``model.state_dict()``, split BatchNorm.

    Raises:
        ValueError: there is none; says what differs from the nearest.
    """
    problems, unlike = [], []
    for name in MODELS:
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
