"""The two analyses of a network as it is being trained: gradient conflict, mixture distribution."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from arat_fast.analysis.conflict import gradient_conflict, mean_conflict
from arat_fast.analysis.mixture import mean_mixture, mixture_distance
from arat_fast.config import Config
from arat_fast.data.batches import Batch, Batches, stream_generator
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
        model, objective = _private_copy(model, objective)
        model.train()
        objective.train()
        conflicts, mixtures, seen = [], [], 0
        for x, y in batches:
            seen += 1
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
            conflict = gradient_conflict(model, output, objective.ties)
            if conflict is not None:
                conflicts.append(conflict)
    if not seen:
        raise ValueError("at least one batch is expected for the analysis, got none")
    return {
        "gradient_conflict": mean_conflict(conflicts) if conflicts else None,
        "mixture": mean_mixture(mixtures) if mixtures and mixtures[0] else None,
    }


def first_batches(data: Batches, num_batches: int) -> Iterator[Batch]:
    """The first batches of a training epoch, augmented: the same ones at every call.

    Args:
        data: training images.
        num_batches: how many, or as many as there are.
    """
    return itertools.islice(data.epoch(0), num_batches)


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


def _private_copy(model: nn.Module, objective: Objective) -> tuple[nn.Module, Objective]:
    with _without_what_cannot_be_copied(model, objective):
        # Together: an objective may hold on to the network.
        return copy.deepcopy((model, objective))


@contextmanager
def _without_what_cannot_be_copied(model: nn.Module, objective: Objective) -> Iterator[None]:
    """Without its group, a copy normalises with the statistics of its own batch."""
    layers = [
        layer
        for root in (model, objective)
        for layer in root.modules()
        if getattr(layer, "group", None) is not None
    ]
    groups = [layer.group for layer in layers]
    for layer in layers:
        layer.group = None  # type: ignore[assignment]  # of no type that nn.Module knows
    try:
        yield
    finally:
        for layer, group in zip(layers, groups, strict=True):
            layer.group = group
