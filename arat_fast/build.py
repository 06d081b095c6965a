"""From a configuration to the objects of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from arat_fast.config import Config
from arat_fast.models.features import classifier_path, default_layers
from arat_fast.models.layers import Norm
from arat_fast.models.registry import MODELS, create_model, placed
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
    given: nn.Module | None = None,
) -> nn.Module:
    """A network of a run, with fresh weights, on the CPU.

    Args:
        config: of the run.
        num_classes: number of logits.
        image_shape: (C, H, W).
        name, norm: other than those of the configuration; None for those.
        given: the caller's network, taken as it is instead of a fresh one, in place.

    Raises:
        ValueError: the images are too small for the network, there is none of that name, or it has
            no BatchNorm to split.
    """
    name, norm = name or config.model.name, norm or config.norm
    channels, height, width = image_shape
    if name == "resnet50" and min(height, width) < 32:
        raise ValueError(
            f"resnet50 halves the image five times and expects at least 32×32 pixels, got "
            f"{height}×{width}; it is meant for {MODELS[name].image_size} pixels"
        )
    own = config.model
    if given is None:
        model = create_model(
            name, num_classes, channels, norm, own.mean, own.std, own.activation, height
        )
    else:
        model = placed(given, norm, own.mean, own.std)
    if own.norm == "split" and norm == "split" and not is_split(model):
        raise ValueError(
            f"{name} has no BatchNorm2d that could be split, got model.norm=split; leave "
            "--model.norm at auto"
        )
    if config.step.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    for layer in model.modules():
        if isinstance(layer, SplitBatchNorm2d):
            layer.impl = implementation(config)
    return model


def is_split(model: nn.Module) -> bool:
    """Whether a network has split BatchNorm."""
    return any(isinstance(module, SplitBatchNorm2d) for module in model.modules())


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
    spec = MODELS.get(config.model.name)
    published = spec.regularized_layers if spec else default_layers(model, image_shape)
    surroundings = Surroundings(
        model,
        image_shape,
        config.attack,
        "split" if is_split(model) else "shared",
        config.objective.regularized_layers(published),
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


class Part(NamedTuple):
    """Parameters with a learning rate of their own.

    Attributes:
        parameters: of the network and the objective.
        factor: on the learning rate of the run.
        frozen_epochs: epochs in which it is 0.
    """

    parameters: list[nn.Parameter]
    factor: float = 1.0
    frozen_epochs: int = 0


def learning_parts(
    config: Config, model: nn.Module, objective: Objective, image_shape: tuple[int, int, int]
) -> list[Part]:
    """What is trained, by its learning rate: ``optimizer.lr_factors``, ``init_freeze_epochs``.

    Args:
        config: of the run.
        model, objective: its own.
        image_shape: (C, H, W).

    Raises:
        ValueError: a factor is for a module that the network does not have.
    """
    factors = config.optimizer.factors()
    modules = dict(model.named_modules())
    unknown = [path for path in factors if path not in modules]
    if unknown:
        raise ValueError(f"optimizer.lr_factors: the network has no module {unknown[0]!r}")
    frozen = config.init_freeze_epochs
    head = f"{classifier_path(model, image_shape)}." if frozen else ""
    groups: dict[tuple[float, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        own = [path for path in factors if name.startswith(f"{path}.")]
        key = factors[max(own, key=len)] if own else 1.0, 0 if name.startswith(head) else frozen
        groups.setdefault(key, []).append(parameter)
    groups.setdefault((1.0, 0), []).extend(objective.parameters())
    trained = ((key, [p for p in group if p.requires_grad]) for key, group in groups.items())
    return [Part(parameters, *key) for key, parameters in trained if parameters]


def build_optimizer(config: Config, parts: Sequence[Part]) -> torch.optim.Optimizer:
    """The optimiser of a run, at its peak learning rate; a group of parameters for each part."""
    options = config.optimizer
    parameters = [{"params": part.parameters} for part in parts]
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
