"""Pieces shared by the built-in networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from arat_fast.models.batch_norm import PlainBatchNorm2d
from arat_fast.models.split_batch_norm import SplitBatchNorm2d, use_statistics
from arat_kernels.image_parts import image_parts
from arat_kernels.implementation import Impl

Norm = Literal["split", "shared"]
Activation = Literal["relu", "silu"]


def make_norm(norm: Norm, num_features: int) -> nn.Module:
    """A BatchNorm for ``num_features`` channels: two branches ("split") or one ("shared")."""
    if norm == "split":
        return SplitBatchNorm2d(num_features)
    return PlainBatchNorm2d(num_features)


def beside_relu(activation: Activation) -> nn.Module:
    """What follows a BatchNorm that applies ReLU itself where that is the activation."""
    return nn.Identity() if activation == "relu" else nn.SiLU()


class StemConv2d(nn.Conv2d):
    """First convolution of a network: never rounds the image to the autocast dtype.

    bfloat16 has a spacing of 2^-8 just below 1, half of a typical PGD step size (2/255). Cast to
    it, part of the perturbation is lost before the network sees it. Under autocast this layer
    computes in the dtype of the image and casts its *output*; inside :func:`split_stems` it takes
    the image in two parts.
    """

    split_weight: Tensor | None = None
    impl: Impl | None = None

    def forward(self, input: Tensor) -> Tensor:
        device_type = input.device.type
        if device_type == "meta" or not torch.is_autocast_enabled(device_type):
            return super().forward(input)
        if self.split_weight is not None and input.dtype == torch.float32:
            parts = image_parts(input, impl=self.impl)
            of_parts: Tensor = self._conv_forward(parts, self.split_weight, self.bias)
            return of_parts
        with torch.autocast(device_type, enabled=False):
            y = super().forward(input)
        return y.to(torch.get_autocast_dtype(device_type))


@contextmanager
def split_stems(networks: Iterable[nn.Module], impl: Impl | None = None) -> Iterator[None]:
    """Let every :class:`StemConv2d` inside the context compute in bfloat16, under autocast, on the
    high and the low part of a float32 image (:func:`arat_kernels.image_parts.image_parts`), which
    lose 2^-16 of it. Their weights must not change meanwhile."""
    modules = (module for network in networks for module in network.modules())
    stems = [m for m in modules if isinstance(m, StemConv2d) and m.groups == 1]
    for stem in stems:
        stem.split_weight, stem.impl = weight_for_parts(stem.weight), impl
    try:
        yield
    finally:
        for stem in stems:
            stem.split_weight = None


def weight_for_parts(weight: Tensor) -> Tensor:
    """The weight (C', C, kH, kW) of a convolution for the parts of its image, in bfloat16."""
    padding = weight.new_zeros(len(weight), -2 * weight.shape[1] % 8, *weight.shape[2:])
    return torch.cat([weight, weight, padding], dim=1).bfloat16()


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

    def watch(name: str, module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].element_size() > dtype.itemsize:
            entered[name] = module

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                handle = module.register_forward_pre_hook(partial(watch, name))
                stack.callback(handle.remove)
        with use_statistics(model, "running"), torch.autocast(x.device.type, dtype=dtype):
            model(x[:2])
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
