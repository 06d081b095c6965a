"""The conversion of any network to split BatchNorm; the layer itself is arat_kernels'."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from arat_fast.models.batch_norm import PlainBatchNorm2d
from arat_kernels.split_batch_norm import (
    ADV,
    CLEAN,
    Branch,
    SplitBatchNorm2d,
    Statistics,
    use_branch,
    use_statistics,
)

__all__ = [
    "ADV",
    "CLEAN",
    "Branch",
    "SharedBatchNormWarning",
    "SplitBatchNorm2d",
    "Statistics",
    "convert_split_batch_norm",
    "copy_network",
    "use_branch",
    "use_statistics",
    "warn_of_shared",
]


class SharedBatchNormWarning(UserWarning):
    """Clean and adversarial images go through layers that are not split."""


def convert_split_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d of a network by a split one; both branches start as copies.

    As :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`: the network is changed in place and
    returned; where ``module`` itself is a BatchNorm, its replacement is returned. SyncBatchNorm is
    converted too, to a layer whose statistics are those of its own process. timm's
    ``BatchNormAct2d`` keeps its dropout and activation. BatchNorm1d and 3d, and what a forward
    normalises itself (``F.batch_norm``), stay shared by clean and adversarial images, as does every
    layer of a network without BatchNorm: a :class:`SharedBatchNormWarning` names them.

    Args:
        module: any network (torchvision, timm, your own).

    Returns:
        The network with :class:`SplitBatchNorm2d` layers at the same module paths.

    Raises:
        ValueError: a layer cannot be split: it keeps no running statistics, has ``momentum=None``,
            is lazy, parametrised, has hooks, or is a subclass whose own forward is not known.
    """
    converted = _convert(module, "", {})
    warn_of_shared(converted)
    return converted


def warn_of_shared(model: nn.Module) -> None:
    """Warn where clean and adversarial images share what normalises them.

    Args:
        model: any network.
    """
    shared = [name for name, module in model.named_modules() if _normalises_all_alike(module)]
    if shared:
        names = ", ".join(name or "the network's own forward" for name in shared[:8])
        message = (
            f"{len(shared)} BatchNorm layers are shared by clean and adversarial images: {names}"
            f"{', …' * (len(shared) > 8)}; convert_split_batch_norm splits BatchNorm2d and "
            "SyncBatchNorm, before the objective and the optimiser are made"
        )
    elif not any(isinstance(module, SplitBatchNorm2d) for module in model.modules()):
        message = (
            f"{type(model).__name__} has no BatchNorm to split: clean and adversarial images share "
            "every layer"
        )
    else:
        return
    warnings.warn(message, SharedBatchNormWarning, stacklevel=3)


def _normalises_all_alike(module: nn.Module) -> bool:
    if isinstance(module, (SplitBatchNorm2d, _InstanceNorm)):
        return False
    # A compiled forward (TorchScript) has no code to look at, but it has its statistics.
    code = getattr(module.forward, "__code__", None)
    return (
        isinstance(module, _BatchNorm)
        or "running_mean" in dict(module.named_buffers(recurse=False))
        or (code is not None and "batch_norm" in code.co_names)
    )


def copy_network(module: nn.Module) -> nn.Module:
    """A deep copy of a network whose BatchNorm may belong to a process group, which is shared: a
    group cannot be copied."""
    groups = [getattr(layer, "group", None) for layer in module.modules()]
    return copy.deepcopy(module, {id(group): group for group in groups if group is not None})


class SplitBatchNormAct2d(SplitBatchNorm2d):
    """Counterpart of timm's BatchNormAct2d: normalisation, dropout, activation."""

    def __init__(
        self, num_features: int, drop: nn.Module, act: nn.Module, **kwargs: object
    ) -> None:
        super().__init__(num_features, **kwargs)  # type: ignore[arg-type]  # forwarded keywords
        self.drop = drop
        self.act = act

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x, *given, **named)))
        return y


def _convert(module: nn.Module, path: str, done: dict[int, nn.Module]) -> nn.Module:
    # A layer shared by two parents must stay shared.
    if id(module) in done:
        return done[id(module)]
    result = module
    if isinstance(module, _LazyNormBase):
        raise ValueError(
            f"{path or 'the module'} is a {type(module).__name__}, whose width is not known yet: "
            "run the network on a batch of images, then convert it"
        )
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        result = _split_layer(module, path or "the module")
    else:
        # Not named_children, which leaves out the second name of a layer.
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            converted = _convert(child, f"{path}.{name}" if path else name, done)
            if converted is not child:
                setattr(module, name, converted)
    done[id(module)] = result
    return result


def _split_layer(layer: nn.BatchNorm2d | nn.SyncBatchNorm, path: str) -> SplitBatchNorm2d:
    if is_parametrized(layer):
        raise ValueError(
            f"{path} is parametrised, got {', '.join(layer.parametrizations)}: "  # type: ignore[arg-type]  # torch's stub
            "remove_parametrizations first, and set them on the split layer"
        )
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise ValueError(f"{path} has hooks, which would be lost: register them afterwards")
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(
            f"{path} keeps no running statistics, got track_running_stats=False; the split layer "
            "evaluates with running statistics: build the network with track_running_stats=True"
        )
    if layer.momentum is None:
        raise ValueError(f"{path} has momentum=None, expected a number: set it, for example to 0.1")
    keywords: dict[str, object] = {
        "eps": layer.eps,
        "momentum": layer.momentum,
        "affine": layer.affine,
        "device": layer.running_mean.device,
        "dtype": layer.running_mean.dtype,
    }
    if type(layer) in (nn.BatchNorm2d, nn.SyncBatchNorm, PlainBatchNorm2d):
        split = SplitBatchNorm2d(layer.num_features, **keywords)  # type: ignore[arg-type]
    elif {"act", "drop"} <= dict(layer.named_children()).keys():
        drop, act = layer.get_submodule("drop"), layer.get_submodule("act")
        split = SplitBatchNormAct2d(layer.num_features, drop, act, **keywords)
    else:
        raise ValueError(
            f"{path} is a {type(layer).__name__}, a subclass of BatchNorm2d with a forward of its "
            "own; expected BatchNorm2d, SyncBatchNorm or timm's BatchNormAct2d"
        )
    with torch.no_grad():
        split.running_mean.copy_(layer.running_mean.expand(2, -1))
        split.running_var.copy_(layer.running_var.expand(2, -1))
        if layer.num_batches_tracked is not None:
            split.num_batches_tracked.copy_(layer.num_batches_tracked.expand(2))
        if split.weight is not None and split.bias is not None:
            split.weight.copy_(layer.weight.expand(2, -1))
            split.bias.copy_(layer.bias.expand(2, -1))
            split.weight.requires_grad_(layer.weight.requires_grad)
            split.bias.requires_grad_(layer.bias.requires_grad)
    split.train(layer.training)
    return split
