"""What a loop of one's own gives the step: refused in one sentence where it does not fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from arat_fast.attacks import PGD
from arat_fast.objectives.base import Objective

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def check_network(model: nn.Module) -> None:
    """Raise ValueError for a network inside of a wrapper.

    Args:
        model: the network.
    """
    compiled = hasattr(model, "_orig_mod")
    if compiled or isinstance(model, _WRAPPERS):
        raise ValueError(
            f"the network itself is expected, got it inside of {type(model).__name__}: pass its "
            f".{'_orig_mod' if compiled else 'module'}; the step has a graph of its own (graph) "
            "and adds up the gradients of all processes itself (ranks)"
        )


def check_kinds(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raise ValueError for what the host knows of a batch, without asking the device.

    Args:
        model: the network.
        x: images (N, C, H, W), N >= 1, in its dtype and on its device.
        y: labels (N,), integers, or targets (N, K) in the dtype of ``x``, on its device.
    """
    weight = next(model.parameters())
    if x.dtype != weight.dtype or x.device != weight.device or y.device != weight.device:
        raise ValueError(
            f"images in [0, 1] and labels are expected as the network is, {weight.dtype} on "
            f"{weight.device}, got {x.dtype} on {x.device} and labels on {y.device}"
        )
    soft = y.dtype == x.dtype and y.ndim == 2
    integers = not y.is_floating_point() and y.dtype != torch.bool and y.ndim == 1
    if not (soft or integers) or len(y) != len(x) or not len(x):
        raise ValueError(
            "one integer label for each image, or targets (N, classes) in the images' dtype, and "
            "one image or more, are expected, got "
            f"{y.dtype} of shape {tuple(y.shape)} for images of shape {tuple(x.shape)}"
        )


def check_labels(y: Tensor, num_classes: int) -> None:
    """Raise ValueError unless every label is a class, and every target a weight >= 0 of each.

    Args:
        y: labels (N,), integers, or targets (N, K), N >= 1.
        num_classes: of the network.
    """
    if y.is_floating_point():
        if y.shape[1] != num_classes or not ((y >= 0) & y.isfinite()).all():
            raise ValueError(
                f"targets must be {num_classes} finite numbers >= 0 for each image, as many as the "
                f"network has logits, got shape {tuple(y.shape)}, the smallest {float(y.min())}"
            )
        return
    low, high = (int(value) for value in torch.aminmax(y))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes - 1}], since the network has {num_classes} "
            f"logits, got {low if low < 0 else high}"
        )


def say_what_was_left_out(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    attack: PGD,
    say: Callable[[str], object],
) -> None:
    """Tell, in the first step, what loops forget.

    Args:
        model: the network.
        objective: that it is trained with.
        optimizer: of both.
        attack: of the first step.
        say: told it, a sentence at a time.
    """
    modules = {"network": model, "objective": objective}
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for what, module in modules.items():
        free = {name: p for name, p in module.named_parameters() if p.requires_grad}
        missing = [name for name, parameter in free.items() if id(parameter) not in optimised]
        if missing:
            say(
                f"{len(missing)} parameters of the {what} are not in the optimiser and stay as "
                f"they are, the first is {missing[0]}: make it, after convert_split_batch_norm, of "
                "[*model.parameters(), *objective.parameters()]"
            )
    strays = optimised - {id(p) for module in modules.values() for p in module.parameters()}
    if strays:
        say(
            f"{len(strays)} parameters in the optimiser belong neither to the network nor to the "
            "objective: make it after convert_split_batch_norm, which replaces parameters"
        )
    if attack.eps_warmup:
        say(
            "the radius does not grow by itself (eps_warmup): set step.attack = "
            "attack.in_epoch(epoch) before each epoch"
        )
    if left_out := objective.left_out():
        say(left_out)
