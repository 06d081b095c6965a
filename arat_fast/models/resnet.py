"""Residual networks with post-activation blocks (He et al., 2016), CIFAR and ImageNet stems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from arat_fast.models.layers import (
    Activation,
    Norm,
    Normalize,
    StemConv2d,
    beside_relu,
    make_norm,
)
from arat_kernels import forks
from arat_kernels.split_batch_norm import normalize_sum


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class _Shortcut(nn.Module):
    """Base of the blocks: the projection shortcut, where the shape changes."""

    shortcut: nn.Module | None
    shortcut_bn: nn.Module
    relu: bool

    def _make_shortcut(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, stride)
            self.shortcut_bn = make_norm(norm, out_channels)
        else:
            self.shortcut = None
            self.shortcut_bn = nn.Identity()

    def _end(self, norm: nn.Module, out: Tensor, x: Tensor) -> Tensor:
        """The normalised ``out`` and what goes around the block, which has read ``x``, from the
        kernels."""
        if self.shortcut is None:
            y: Tensor = norm(out, forks.skip_of(x), relu=self.relu)
            return y
        projected = forks.read_by(self.shortcut, x)
        return normalize_sum(norm, out, self.shortcut_bn, projected, self.relu)


class BasicBlock(_Shortcut):
    """Two 3×3 convolutions and a shortcut: (N, in, H, W) → (N, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        norm: Norm,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.relu, self.act = activation == "relu", beside_relu(activation)
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = make_norm(norm, width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = make_norm(norm, width)
        self._make_shortcut(in_channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn1(self.conv1(x), relu=self.relu))
        out = self.conv2(out)
        if forks.made:
            out = self._end(self.bn2, out, x)
        else:
            identity = x if self.shortcut is None else self.shortcut_bn(self.shortcut(x))
            out = self.bn2(out, identity, relu=self.relu)
        out = self.act(out)
        return out


class Bottleneck(_Shortcut):
    """1×1, 3×3 (carries the stride), 1×1: (N, in, H, W) → (N, 4·width, H/stride, W/stride)."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        norm: Norm,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.relu, self.act = activation == "relu", beside_relu(activation)
        out_channels = width * self.expansion
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = make_norm(norm, width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = make_norm(norm, width)
        self.conv3 = _conv(width, out_channels, 1)
        self.bn3 = make_norm(norm, out_channels)
        self._make_shortcut(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn1(self.conv1(x), relu=self.relu))
        out = self.act(self.bn2(self.conv2(out), relu=self.relu))
        out = self.conv3(out)
        if forks.made:
            out = self._end(self.bn3, out, x)
        else:
            identity = x if self.shortcut is None else self.shortcut_bn(self.shortcut(x))
            out = self.bn3(out, identity, relu=self.relu)
        out = self.act(out)
        return out


class ResNet(nn.Module):
    """A stem, stages ``layer1`` … ``layerK``, ``avgpool`` and ``linear``.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        num_blocks: blocks in each stage.
        widths: channels of each stage before the block's expansion; stages after the first halve
            the resolution.
        num_classes: number of logits.
        in_channels: channels of the image.
        stem: "cifar" (3×3, stride 1), "strided" (3×3, stride 2) or "imagenet" (7×7, stride 2, then
            3×3 max-pooling, stride 2).
        norm: "split" or "shared" BatchNorm.
        mean, std: per-channel normalisation inside the network; empty for none.
        activation: "relu", in one operation with BatchNorm, or "silu", after it.

    Shapes: images (N, in_channels, H, W) in [0, 1] → logits (N, num_classes).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        stem: Literal["cifar", "strided", "imagenet"] = "cifar",
        norm: Norm = "split",
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.relu, self.act = activation == "relu", beside_relu(activation)
        self.normalize = Normalize(mean, std) if mean else nn.Identity()
        kernel, stride = {"cifar": (3, 1), "strided": (3, 2), "imagenet": (7, 2)}[stem]
        self.conv1 = StemConv2d(
            in_channels, widths[0], kernel, stride, padding=kernel // 2, bias=False
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        self.bn1 = make_norm(norm, widths[0])
        channels = widths[0]
        self.stages: list[str] = []
        for index, (width, blocks) in enumerate(zip(widths, num_blocks, strict=True)):
            layers = []
            for i in range(blocks):
                stride = 2 if index > 0 and i == 0 else 1
                layers.append(block(channels, width, stride, norm, activation))
                channels = width * block.expansion
            name = f"layer{index + 1}"
            self.add_module(name, nn.Sequential(*layers))
            self.stages.append(name)
        self.avgpool = nn.Identity()  # the name of the mean over positions
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(self.normalize(x)), relu=self.relu))
        x = self.maxpool(x)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        # So its gradient is written once, in channels_last, which a 2-d pooling layer's is not.
        pooled = x.movedim(1, -1).mean((1, 2))
        logits: Tensor = self.linear(self.avgpool(pooled))
        return logits
