"""From a configuration to the objects of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from arat_fast.config import OWN_CLEAN_BRANCH, Config
from arat_fast.models.layers import Norm
from arat_fast.models.registry import create_model, model_spec
from arat_fast.models.split_batch_norm import SplitBatchNorm2d
from arat_fast.objectives import (
    ARAT,
    ARREST,
    LBGAT,
    MART,
    TRADES,
    AdversarialTraining,
    NaturalTraining,
    Objective,
)
from arat_kernels.implementation import Impl


class DataShape(Protocol):
    """What a network has to know of the data; every split of a dataset says it.

    Attributes:
        num_classes: number of classes.
        image_shape: (C, H, W) of a batch.
    """

    num_classes: int
    image_shape: tuple[int, int, int]


def build_model(config: Config, data: DataShape) -> nn.Module:
    """The network of a run, with fresh weights, on the CPU.

    Raises:
        ValueError: the images are too small for the network.
    """
    return _network(config, data, config.model.name, config.norm)


def _network(config: Config, data: DataShape, name: str, norm: Norm) -> nn.Module:
    channels, height, width = data.image_shape
    if name == "resnet50" and min(height, width) < 32:
        raise ValueError(
            f"resnet50 halves the image five times and expects at least 32×32 pixels, got "
            f"{height}×{width}; it is meant for {model_spec('resnet50').image_size} pixels"
        )
    return _create(config, name, norm, data.num_classes, channels)


def build_network(config: Config, num_classes: int, in_channels: int) -> nn.Module:
    """:func:`build_model` for a number of logits and of image channels instead of a dataset."""
    return _create(config, config.model.name, config.norm, num_classes, in_channels)


def _create(config: Config, name: str, norm: Norm, num_classes: int, in_channels: int) -> nn.Module:
    model = create_model(name, num_classes, in_channels, norm, config.model.mean, config.model.std)
    if config.step.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    for layer in model.modules():
        if isinstance(layer, SplitBatchNorm2d):
            layer.impl = implementation(config)
    return model


def build_objective(
    config: Config,
    model: nn.Module,
    data: DataShape,
    custom: Callable[[nn.Module], Objective] | None = None,
) -> Objective:
    """The objective of a run, with fresh predictors or a fresh guide, on the model's device.

    Args:
        config: of the run.
        model: its network.
        data: its training batches.
        custom: makes the objective from the network where ``config.objective.name`` is "custom".

    Raises:
        ValueError: a switch or a layer does not fit.
    """
    if (custom is None) == (config.objective.name == "custom"):
        raise ValueError(
            f"objective.name={config.objective.name} and {'no' if custom is None else 'an'} "
            'objective of your own: set the name to "custom" and give Trainer(objective=...) in '
            "Python, both or neither"
        )
    objective = _objective(config, model, data) if custom is None else custom(model)
    return objective.to(next(model.parameters()).device)


def _objective(config: Config, model: nn.Module, data: DataShape) -> Objective:
    options = config.objective
    if options.name == "natural":
        return NaturalTraining()
    if options.name == "at":
        return AdversarialTraining()
    if options.name == "trades":
        return TRADES(options.beta)
    if options.name == "mart":
        return MART(options.beta)
    if options.name == "lbgat":
        if options.guide == OWN_CLEAN_BRANCH:
            if config.norm == "shared":
                raise ValueError(
                    "a guide that is the clean branch needs split BatchNorm, got "
                    "model.norm=shared: leave --model.norm out"
                )
            return LBGAT(None, options.alpha)
        guide = _network(config, data, options.guide or config.model.name, "shared")
        return LBGAT(guide, options.alpha)
    if options.name == "arrest":
        if config.norm == "split":
            raise ValueError(
                "arrest goes on from a natural network, which has one BatchNorm, got "
                "model.norm=split: leave --model.norm out"
            )
        arrest = ARREST(
            model,
            config.attack,
            config.regularized_layers,
            distillation=options.distillation,
            replay=options.replay,
        )
        arrest.impl = implementation(config)
        return arrest
    objective = ARAT(
        model,
        config.regularized_layers,
        data.image_shape,
        gamma=options.gamma,
        stop_gradient=options.stop_gradient,
        predictor=options.predictor,
        direction=options.direction,
        auto_balance=options.balance != "fixed",
        w_adv=options.w_adv,
        w_clean=options.w_clean,
        separate_passes=config.separate_passes,
    )
    objective.impl = implementation(config)
    return objective


def build_optimizer(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a run, at its peak learning rate."""
    options = config.optimizer
    if options.name == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=config.peak_lr,
            betas=(options.momentum, 0.999),
            weight_decay=options.weight_decay,
        )
    return torch.optim.SGD(
        parameters,
        lr=config.peak_lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
    )


def implementation(config: Config) -> Impl | None:
    """The implementation of the method's own operations; None: Triton for CUDA tensors."""
    return None if config.step.kernels == "auto" else config.step.kernels
