"""Pieces shared by the built-in networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from arat_fast.models.split_batch_norm import SplitBatchNorm2d, use_statistics
from arat_kernels.split_batch_norm.distributed import batch_norm_over_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Norm = Literal["split", "shared"]


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that normalises with the statistics of a process group; any device.

    PyTorch's SyncBatchNorm is for GPUs only.
    """

    group: ProcessGroup | None

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.training or self.group is None:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
        return batch_norm_over_group(
            input,
            self.weight,
            self.bias,
            self.running_mean if self.track_running_stats else None,
            self.running_var if self.track_running_stats else None,
            self.momentum,
            self.eps,
            self.group.group_name,
        )


def make_norm(norm: Norm, num_features: int) -> nn.Module:
    """A BatchNorm for ``num_features`` channels: two branches ("split") or one ("shared")."""
    if norm == "split":
        return SplitBatchNorm2d(num_features)
    return nn.BatchNorm2d(num_features)


def norm_act(
    norm: nn.Module, x: Tensor, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """``[relu](norm(x) [+ residual])``, in one operation where the layer can."""
    if isinstance(norm, SplitBatchNorm2d):
        y: Tensor = norm(x, residual, relu)
        return y
    y = norm(x)
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y


class StemConv2d(nn.Conv2d):
    """First convolution of a network: never rounds the image to the autocast dtype.

    bfloat16 has a spacing of 2^-8 just below 1, half of a typical PGD step size (2/255). Cast to
    it, part of the perturbation is lost before the network sees it. Under autocast this layer
    computes in the dtype of the image and casts its *output*.
    """

    def forward(self, input: Tensor) -> Tensor:
        device_type = input.device.type
        if device_type == "meta" or not torch.is_autocast_enabled(device_type):
            return super().forward(input)
        with torch.autocast(device_type, enabled=False):
            y = super().forward(input)
        return y.to(torch.get_autocast_dtype(device_type))


@torch.no_grad()
def protect_stem(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Turn the convolutions that the image enters into :class:`StemConv2d`, in place.

    They are those that see a wider input than ``dtype`` under autocast. Parameters and state-dict
    keys stay as they are.

    Args:
        model: any network; one that has a :class:`StemConv2d` is left alone.
        x: images (N, C, H, W) for one forward pass in eval mode.
        dtype: of the autocast, torch.bfloat16.

    Raises:
        ValueError: the image enters a convolution of another subclass.
    """
    if any(isinstance(module, StemConv2d) for module in model.modules()):
        return
    entered: dict[str, nn.Conv2d] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].element_size() > dtype.itemsize:
                assert isinstance(module, nn.Conv2d)
                entered[name] = module

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        with use_statistics(model, "running"), torch.autocast(x.device.type, dtype=dtype):
            model(x[:2])
    finally:
        for handle in handles:
            handle.remove()
    for name, conv in entered.items():
        if type(conv) is not nn.Conv2d:
            raise ValueError(
                f"the image enters {name}, a {type(conv).__name__}, which would round it to "
                f"{dtype}; make it a Conv2d or StemConv2d, or set precision to torch.float32 "
                "(--step.precision float32)"
            )
        conv.__class__ = StemConv2d


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, part of the network: attacks see images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"as many mean as positive std values are expected, got {mean}, {std}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
