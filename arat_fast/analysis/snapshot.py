"""The two analyses of a network as it is being trained: gradient conflict, mixture distribution."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from arat_fast.analysis.conflict import gradient_conflict
from arat_fast.analysis.mixture import mixture_distance
from arat_fast.config import Config
from arat_fast.data.batches import Batch, stream_generator
from arat_fast.device import full_float32
from arat_fast.objectives import Objective
from arat_fast.training.sharing import num_parts
from arat_fast.training.step import adversarial_batch


def analyze_training(
    config: Config, model: nn.Module, objective: Objective, batches: Iterable[Batch]
) -> dict[str, Any]:
    """Gradient conflict and mixture distribution on batches that are attacked as in training.

    Of a batch that the training takes in parts (``train.accumulate``) the first part. Everything
    runs on a copy, eagerly, in float32 without TF32, in training mode with the statistics of each
    batch; neither the network, the objective, their buffers nor any global random state changes.
    Each call draws the same random starts.

    Args:
        config: of the run.
        model, objective: in any mode, on one device.
        batches: at least one.

    Returns:
        ``{"gradient_conflict": …, "mixture": …}`` in JSON types, see :func:`mean_conflict` and
        :func:`mean_mixture`. The first is None where :func:`gradient_conflict` is; the second
        where nothing is attacked in training or the network has no BatchNorm.

    Raises:
        ValueError: no batch.
    """
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), full_float32():
        generator = stream_generator(config.seed, "analysis", device)
        # Without its group, a copy normalises with the statistics of its own batch.
        groups = {
            id(layer.group): None
            for root in (model, objective)
            for layer in root.modules()
            if getattr(layer, "group", None) is not None
        }
        # Together: an objective may hold on to the network.
        model, objective = copy.deepcopy((model, objective), groups)
        model.train()
        objective.train()
        conflicts, mixtures = [], []
        for x, y in batches:
            parts = num_parts(config.train.accumulate, len(x))
            x, y = x.tensor_split(parts)[0], y.tensor_split(parts)[0]
            # The share of one process is a batch of its own here.
            noisy = config.step.noisy_clean
            start = objective.random_start(config.attack, x, generator, own_noise=not noisy)
            x, x_adv = adversarial_batch(
                model, objective, config.attack, x, y, start, noisy_clean=noisy
            )
            if objective.needs_attack:
                mixtures.append(mixture_distance(model, x, x_adv))
            output = objective(model, x, x_adv, y, start)
            conflicts.append(gradient_conflict(model, output, objective.ties))
    if not conflicts:
        raise ValueError("at least one batch is expected for the analysis, got none")
    known = [conflict for conflict in conflicts if conflict is not None]
    return {
        "gradient_conflict": mean_conflict(known) if known else None,
        "mixture": mean_mixture(mixtures) if mixtures and mixtures[0] else None,
    }


def headline_numbers(record: dict[str, Any]) -> dict[str, float]:
    """The totals of what :func:`analyze_training` returned, those that are defined, by name."""
    conflict, mixture = record["gradient_conflict"], record["mixture"]
    numbers: dict[str, float | None] = {}
    if conflict is not None:
        for pair, values in conflict["pairs"].items():
            numbers |= {f"{key}/{pair}": values[key] for key in ("share", "cosine")}
    if mixture is not None:
        numbers |= {f"mixture/{key}": value for key, value in mixture["mean"].items()}
    return {name: value for name, value in numbers.items() if value is not None}


def mean_conflict(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over one batch or more of what :func:`gradient_conflict` returned of one network, and
    the spread of the totals.

    Returns:
        The same structure with means of what is not None; the pairs gain "share_std" and
        "cosine_std", standard deviations over the batches, None for one batch; "num_batches".
    """
    mean: dict[str, Any] = _mean(batches)
    for name, pair in mean["pairs"].items():
        for key in ("share", "cosine"):
            values = [batch["pairs"][name][key] for batch in batches]
            known = [value for value in values if value is not None]
            pair[f"{key}_std"] = statistics.stdev(known) if len(known) > 1 else None
    return {**mean, "num_batches": len(batches)}


def mean_mixture(batches: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Means over one batch or more of what :func:`mixture_distance` returned of one network.

    Returns:
        ``{"layers": {PATH: {NUMBER: …}}, "mean": {NUMBER: …}, "num_batches": …}``; "mean" is over
        the layers, each counting once.
    """
    layers = _mean(batches)
    mean = _mean(list(layers.values()))
    return {"layers": layers, "mean": mean, "num_batches": len(batches)}


def _mean(records: Sequence[Any]) -> Any:
    """One record of the means of many of one structure, of what is not None."""
    first = records[0]
    if isinstance(first, dict):
        return {key: _mean([record[key] for record in records]) for key in first}
    if isinstance(first, int):  # A count, the same in all.
        return first
    known = [value for value in records if value is not None]
    return statistics.fmean(known) if known else None
