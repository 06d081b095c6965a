"""ARAT as a plain PyTorch script has it: what a user would otherwise run.

Written in the shape of the official code and independent of the package: two BatchNorm modules in
place of each one, a forward pass for each branch, and an attack that moves the running statistics.
State dicts have the official names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workload import (
    ALPHA,
    EPS,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    RESNETS,
    WEIGHT_DECAY,
    WIDE_RESNETS,
    Workload,
)

BRANCHES = ("clean", "adv")


def _batch_norms(channels: int) -> nn.ModuleDict:
    return nn.ModuleDict({branch: nn.BatchNorm2d(channels) for branch in BRANCHES})


def _conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)


class PlainBlock(nn.Module):
    """Post-activation; returns the outputs of both BatchNorms besides."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, stride=stride)
        self.bn1 = _batch_norms(channels)
        self.conv2 = _conv(channels, channels)
        self.bn2 = _batch_norms(channels)
        self.changes_shape = stride != 1 or in_channels != channels
        if self.changes_shape:
            self.shortcut = _conv(in_channels, channels, 1, stride)
            self.shortcut_bn = _batch_norms(channels)

    def forward(self, x: Tensor, branch: str) -> tuple[Tensor, list[Tensor]]:
        first = self.bn1[branch](self.conv1(x))
        second = self.bn2[branch](self.conv2(F.relu(first)))
        if self.changes_shape:
            x = self.shortcut_bn[branch](self.shortcut(x))
        return F.relu(second + x), [first, second]


class PlainResNet(nn.Module):
    """CIFAR stem, stages ``layer1`` …; the features are those of the last stage's BatchNorms."""

    def __init__(self, num_blocks: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = _conv(3, widths[0])
        self.bn1 = _batch_norms(widths[0])
        channels = widths[0]
        self.num_stages = len(widths)
        for stage, (width, blocks) in enumerate(zip(widths, num_blocks, strict=True), start=1):
            layers = nn.ModuleList()
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                layers.append(PlainBlock(channels, width, stride))
                channels = width
            self.add_module(f"layer{stage}", layers)
        self.linear = nn.Linear(channels, NUM_CLASSES)
        self.feature_widths = [channels] * (2 * num_blocks[-1])

    def forward(
        self, x: Tensor, branch: str, with_features: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the pooled features if they are asked for."""
        x = F.relu(self.bn1[branch](self.conv1(x)))
        features: list[Tensor] = []
        for stage in range(1, self.num_stages + 1):
            for block in getattr(self, f"layer{stage}"):
                x, outputs = block(x, branch)
                if with_features and stage == self.num_stages:
                    features += [_pool(F.relu(output)) for output in outputs]
        return self.linear(_pool(x)), features


class PlainPreActBlock(nn.Module):
    """Pre-activation: BatchNorm, ReLU and a 3×3 convolution, twice."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = _batch_norms(in_channels)
        self.conv1 = _conv(in_channels, channels, stride=stride)
        self.bn2 = _batch_norms(channels)
        self.conv2 = _conv(channels, channels)
        self.changes_shape = in_channels != channels
        if self.changes_shape:
            self.convShortcut = _conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor, branch: str) -> tuple[Tensor, list[Tensor]]:
        first = F.relu(self.bn1[branch](x))
        second = F.relu(self.bn2[branch](self.conv1(first)))
        shortcut = self.convShortcut(first) if self.changes_shape else x
        return self.conv2(second) + shortcut, [first, second]


class PlainStage(nn.Module):
    """Blocks of one width, under the name that the official code has for them."""

    def __init__(self, blocks: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            PlainPreActBlock(in_channels if i == 0 else channels, channels, stride if i == 0 else 1)
            for i in range(blocks)
        )


class PlainWideResNet(nn.Module):
    """``block1`` to ``block3``; the features are block3's activations and the pooled output."""

    def __init__(self, depth: int, widen_factor: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        width = 16 * widen_factor
        self.conv1 = _conv(3, 16)
        self.block1 = PlainStage(blocks, 16, width, 1)
        self.block2 = PlainStage(blocks, width, 2 * width, 2)
        self.block3 = PlainStage(blocks, 2 * width, 4 * width, 2)
        self.bn1 = _batch_norms(4 * width)
        self.fc = nn.Linear(4 * width, NUM_CLASSES)
        self.feature_widths = [2 * width] + [4 * width] * (2 * blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def forward(
        self, x: Tensor, branch: str, with_features: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the pooled features if they are asked for."""
        x = self.conv1(x)
        features: list[Tensor] = []
        for stage in (self.block1, self.block2, self.block3):
            for block in stage.layer:
                x, activations = block(x, branch)
                if with_features and stage is self.block3:
                    features += [_pool(activation) for activation in activations]
        pooled = _pool(F.relu(self.bn1[branch](x)))
        if with_features:
            features.append(pooled)
        return self.fc(pooled), features


def _pool(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def plain_network(workload: Workload) -> PlainResNet | PlainWideResNet:
    """The plain network of a workload, with fresh weights, on the CPU."""
    if workload.model in RESNETS:
        return PlainResNet(*RESNETS[workload.model])
    return PlainWideResNet(*WIDE_RESNETS[workload.model])


def plain_predictor(width: int) -> nn.Sequential:
    """The predictor of one layer's features, (N, width) in and out."""
    return nn.Sequential(
        nn.Linear(width, width // 4, bias=False),
        nn.BatchNorm1d(width // 4),
        nn.ReLU(inplace=True),
        nn.Linear(width // 4, width),
    )


CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


class PlainStep:
    """One ARAT step; ``step(x, y)`` returns the terms of the loss.

    Args:
        network: from :func:`plain_network`, on its device.
        num_steps: steps of the attack.
        gamma: weight of the invariance loss.
        bf16: run under bfloat16 autocast.
        compile_mode: compile the network with torch.compile, in this mode.
        read_loss: fetch the loss to the host each step, as a script with a running mean does.
    """

    def __init__(
        self,
        network: PlainResNet | PlainWideResNet,
        *,
        num_steps: int,
        gamma: float,
        bf16: bool = False,
        compile_mode: CompileMode | None = None,
        read_loss: bool = False,
    ) -> None:
        self.network = network
        reference = next(network.parameters())
        self.predictors = nn.ModuleList(plain_predictor(d) for d in network.feature_widths)
        self.predictors.to(device=reference.device, dtype=reference.dtype)
        self.parameters = [*network.parameters(), *self.predictors.parameters()]
        self.optimizer = torch.optim.SGD(
            self.parameters, LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.num_steps = num_steps
        self.gamma = gamma
        self.bf16 = bf16
        self.compiled = compile_mode is not None
        self.read_loss = read_loss
        self.forward = (
            torch.compile(network, mode=compile_mode, dynamic=False) if self.compiled else network
        )

    def __call__(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Train on images (N, 3, H, W) in [0, 1], labels (N,); the attack starts at ``noise``."""
        self.network.train()
        self.predictors.train()
        if noise is None:
            noise = torch.empty_like(x).uniform_(-EPS, EPS)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x_adv = self._attack(x, y, noise)
            terms = self._terms(x, x_adv, y)
            loss = torch.stack(list(terms.values())).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's method
        self.optimizer.step()
        # Before the next compiled call, which may reuse the memory of these gradients.
        self.optimizer.zero_grad(set_to_none=True)
        if self.read_loss and math.isnan(float(loss.detach())):
            raise ValueError("the loss of the plain step is not a number")
        return {name: term.detach() for name, term in terms.items()}

    def _attack(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        x_adv = x + noise
        # A compiled backward pass computes every weight's gradient unless they are frozen.
        for parameter in self.parameters:
            parameter.requires_grad_(not self.compiled)
        for _ in range(self.num_steps):
            self._mark_step()
            x_adv.requires_grad_()
            logits, _ = self.forward(x_adv, "adv")
            loss = F.cross_entropy(logits, y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + ALPHA * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        for parameter in self.parameters:
            parameter.requires_grad_()
        return x_adv

    def _terms(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        self._mark_step()
        logits_clean, features_clean = self.forward(x, "clean", True)
        logits_adv, features_adv = self.forward(x_adv, "adv", True)
        terms = {
            "ce_adv": 0.5 * F.cross_entropy(logits_adv, y),
            "ce_clean": 0.5 * F.cross_entropy(logits_clean, y),
        }
        weight = self.gamma / len(features_adv)
        pairs = zip(self.predictors, features_adv, features_clean, strict=True)
        for index, (predictor, z_adv, z_clean) in enumerate(pairs):
            similarity = F.cosine_similarity(predictor(z_adv), z_clean.detach(), dim=-1)
            terms[f"invariance{index}"] = weight * (1 - similarity.mean())
        return terms

    def _mark_step(self) -> None:
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch's
