"""Residual networks with pre-activation blocks (He et al., 2016b), wide ones (Zagoruyko and
Komodakis, 2016) and of the usual width."""

from __future__ import annotations

import math
from typing import Any

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
from arat_kernels.split_batch_norm import add_for, mean_of_relu, mean_over_positions


class PreActBlock(nn.Module):
    """BN-ReLU-3×3 twice; where the width changes, the shortcut starts after the first ReLU."""

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
        self.bn1 = make_norm(norm, in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn2 = make_norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = (
            None if in_channels == width else nn.Conv2d(in_channels, width, 1, stride, bias=False)
        )

    def forward(self, x: Tensor, reader: nn.Module) -> Tensor:
        """The output for ``reader``, the normalisation that comes next."""
        activated = self.act(self.bn1(x, relu=self.relu))
        out: Tensor = self.act(self.bn2(self.conv1(activated), relu=self.relu))
        out = self.conv2(out)
        if not forks.made:
            return out + (x if self.convShortcut is None else self.convShortcut(activated))
        if self.convShortcut is None:
            shortcut = forks.around(activated, x)
        else:
            shortcut = forks.read_by(self.convShortcut, activated)
        return add_for(reader, out, shortcut)


class _Stage(nn.ModuleList):
    """Blocks of one width."""

    def __init__(
        self,
        num: int,
        in_channels: int,
        width: int,
        stride: int,
        norm: Norm,
        activation: Activation,
    ) -> None:
        super().__init__([PreActBlock(in_channels, width, stride, norm, activation)])
        for _ in range(num - 1):
            self.append(PreActBlock(width, width, 1, norm, activation))

    def forward(self, x: Tensor, reader: nn.Module) -> Tensor:
        """``reader`` as of :class:`PreActBlock`."""
        readers = [*(block.bn1 for block in self), reader][1:]
        for block, following in zip(self, readers, strict=True):
            x = block(x, following)
        return x


class _NamedStage(nn.Module):
    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.layer = _Stage(*args)

    def forward(self, x: Tensor, reader: nn.Module) -> Tensor:
        out: Tensor = self.layer(x, reader)
        return out


def _pooled(norm: nn.Module, x: Tensor, relu: bool, act: nn.Module) -> Tensor:
    return mean_of_relu(norm, x) if relu else mean_over_positions(act(norm(x)))


def _initialize(model: nn.Module, classifier: nn.Linear) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
    nn.init.zeros_(classifier.bias)


class WideResNet(nn.Module):
    """For small images: ``conv1``, ``block1`` to ``block3``, ``bn1``, ``avgpool``, ``fc``.

    Args:
        depth: number of layers, 6n + 4.
        widen_factor: multiplies the channels 16, 32, 64.
        num_classes: number of logits.
        in_channels: channels of the image.
        norm: "split" or "shared" BatchNorm.
        mean, std: per-channel normalisation inside the network; empty for none.
        activation: "relu", in one operation with BatchNorm, or "silu", after it.

    Shapes: images (N, in_channels, H, W) in [0, 1] → logits (N, num_classes).

    Raises:
        ValueError: ``depth`` is not 6n + 4.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        num_classes: int,
        in_channels: int = 3,
        norm: Norm = "split",
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, 34 …), got {depth}")
        blocks = (depth - 4) // 6
        width = 16 * widen_factor
        self.relu, self.act = activation == "relu", beside_relu(activation)
        self.normalize = Normalize(mean, std) if mean else nn.Identity()
        self.conv1 = StemConv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = _NamedStage(blocks, 16, width, 1, norm, activation)
        self.block2 = _NamedStage(blocks, width, 2 * width, 2, norm, activation)
        self.block3 = _NamedStage(blocks, 2 * width, 4 * width, 2, norm, activation)
        self.bn1 = make_norm(norm, 4 * width)
        self.avgpool = nn.Identity()  # the name of the mean over positions
        self.fc = nn.Linear(4 * width, num_classes)
        _initialize(self, self.fc)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.normalize(x))
        x = self.block1(x, self.block2.layer[0].bn1)
        x = self.block2(x, self.block3.layer[0].bn1)
        x = self.block3(x, self.bn1)
        logits: Tensor = self.fc(self.avgpool(_pooled(self.bn1, x, self.relu, self.act)))
        return logits


class PreActResNet(nn.Module):
    """ResNet-18 with pre-activation blocks: ``conv1``, ``layer1`` to ``layer4`` of two blocks,
    ``bn``, ``avgpool``, ``linear``.

    Args, shapes: as :class:`WideResNet`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        norm: Norm = "split",
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.relu, self.act = activation == "relu", beside_relu(activation)
        self.normalize = Normalize(mean, std) if mean else nn.Identity()
        self.conv1 = StemConv2d(in_channels, 64, 3, 1, 1, bias=False)
        self.layer1 = _Stage(2, 64, 64, 1, norm, activation)
        self.layer2 = _Stage(2, 64, 128, 2, norm, activation)
        self.layer3 = _Stage(2, 128, 256, 2, norm, activation)
        self.layer4 = _Stage(2, 256, 512, 2, norm, activation)
        self.bn = make_norm(norm, 512)
        self.avgpool = nn.Identity()  # the name of the mean over positions
        self.linear = nn.Linear(512, num_classes)
        _initialize(self, self.linear)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.normalize(x))
        x = self.layer1(x, self.layer2[0].bn1)
        x = self.layer2(x, self.layer3[0].bn1)
        x = self.layer3(x, self.layer4[0].bn1)
        x = self.layer4(x, self.bn)
        logits: Tensor = self.linear(self.avgpool(_pooled(self.bn, x, self.relu, self.act)))
        return logits
