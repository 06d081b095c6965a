"""Wide residual networks with pre-activation blocks (Zagoruyko and Komodakis, 2016)."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn

from arat_fast.models.layers import Norm, Normalize, StemConv2d, make_norm
from arat_kernels import forks
from arat_kernels.split_batch_norm import add_for


class PreActBlock(nn.Module):
    """BN-ReLU-3×3 twice; where the width changes, the shortcut starts after the first ReLU."""

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.bn1 = make_norm(norm, in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn2 = make_norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = (
            None if in_channels == width else nn.Conv2d(in_channels, width, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.bn1(x, relu=True)
        out: Tensor = self.conv2(self.bn2(self.conv1(activated), relu=True))
        if not forks.made:
            return out + (x if self.convShortcut is None else self.convShortcut(activated))
        if self.convShortcut is None:
            shortcut = forks.around(activated, x)
        else:
            shortcut = self.convShortcut(forks.skip_of(activated))
        return add_for(self.bn2, out, shortcut)


def _stage(num: int, in_channels: int, width: int, stride: int, norm: Norm) -> nn.Module:
    blocks = [PreActBlock(in_channels, width, stride, norm)]
    blocks += [PreActBlock(width, width, 1, norm) for _ in range(num - 1)]
    return nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks)))


class WideResNet(nn.Module):
    """For small images: ``conv1``, ``block1`` to ``block3``, ``bn1``, ``avgpool``, ``fc``.

    Args:
        depth: number of layers, 6n + 4.
        widen_factor: multiplies the channels 16, 32, 64.
        num_classes: number of logits.
        in_channels: channels of the image.
        norm: "split" or "shared" BatchNorm.
        mean, std: per-channel normalisation inside the network; empty for none.

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
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, 34 …), got {depth}")
        blocks = (depth - 4) // 6
        width = 16 * widen_factor
        self.normalize = Normalize(mean, std) if mean else nn.Identity()
        self.conv1 = StemConv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = _stage(blocks, 16, width, 1, norm)
        self.block2 = _stage(blocks, width, 2 * width, 2, norm)
        self.block3 = _stage(blocks, 2 * width, 4 * width, 2, norm)
        self.bn1 = make_norm(norm, 4 * width)
        self.avgpool = nn.Identity()  # the name of the mean over positions
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.normalize(x))
        x = self.block3(self.block2(self.block1(x)))
        x = self.bn1(x, relu=True)
        # So its gradient is written once, in channels_last, which a 2-d pooling layer's is not.
        pooled = x.movedim(1, -1).mean((1, 2))
        logits: Tensor = self.fc(self.avgpool(pooled))
        return logits
