"""From a configuration to the objects of a run."""

from __future__ import annotations

import torch
from torch import nn

from arat_fast.config import Config
from arat_fast.models.layers import Norm
from arat_fast.models.registry import create_model, model_spec
from arat_fast.models.split_batch_norm import SplitBatchNorm2d
from arat_fast.objectives import ForeignSettings, Objective, Surroundings, objective_type
from arat_kernels.implementation import Impl, choose


def build_network(
    config: Config,
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    name: str | None = None,
    norm: Norm | None = None,
) -> nn.Module:
    """A network of a run, with fresh weights, on the CPU.

    Args:
        config: of the run.
        num_classes: number of logits.
        image_shape: (C, H, W).
        name, norm: other than those of the configuration; None for those.

    Raises:
        ValueError: the images are too small for the network, or there is none of that name.
    """
    name, norm = name or config.model.name, norm or config.norm
    channels, height, width = image_shape
    if name == "resnet50" and min(height, width) < 32:
        raise ValueError(
            f"resnet50 halves the image five times and expects at least 32×32 pixels, got "
            f"{height}×{width}; it is meant for {model_spec('resnet50').image_size} pixels"
        )
    model = create_model(name, num_classes, channels, norm, config.model.mean, config.model.std)
    if config.step.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    for layer in model.modules():
        if isinstance(layer, SplitBatchNorm2d):
            layer.impl = implementation(config)
    return model


def build_objective(
    config: Config, model: nn.Module, num_classes: int, image_shape: tuple[int, int, int]
) -> Objective:
    """The objective of a run, with fresh predictors or a fresh guide, on the model's device.

    Args:
        config: of the run.
        model: its network.
        num_classes: number of logits.
        image_shape: (C, H, W) of the images.

    Raises:
        ValueError: a switch or a layer does not fit.
    """
    surroundings = Surroundings(
        model,
        image_shape,
        config.attack,
        config.norm,
        config.regularized_layers,
        lambda name: build_network(config, num_classes, image_shape, name=name, norm="shared"),
    )
    if isinstance(config.objective, ForeignSettings):
        raise ValueError(
            f"the objective {config.objective.name} is not imported on a file's word alone: import "
            "its module first, or go on with arat-fast train --resume --objective.name …"
        )
    objective = objective_type(config.objective.name).build(config.objective, surroundings)
    parameter = next(model.parameters())
    # Once, not for every operation of every step.
    objective.impl = choose(implementation(config), parameter)
    return objective.to(parameter.device)


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
