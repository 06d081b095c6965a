"""The predictors h_l of the invariance loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_kernels.split_batch_norm.distributed import batch_norm_over_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BN_EPS = 1e-5
BN_MOMENTUM = 0.1


class Predictors(nn.Module):
    """One predictor per layer, Linear(d, d/4) → BatchNorm1d → ReLU → Linear(d/4, d).

    Predictors of equal width d run as one batched matrix product.

    Args:
        widths: d of each layer.
        ratio: hidden width as a share of d; rounded down.

    Raises:
        ValueError: a width leaves no hidden unit.

    Source: arXiv 2402.14648, section 4; the shape is SimSiam's (Chen and He, 2021).
    """

    def __init__(self, widths: Sequence[int], ratio: float = 0.25) -> None:
        super().__init__()
        groups: dict[int, list[int]] = {}
        for index, width in enumerate(widths):
            groups.setdefault(width, []).append(index)
        self.num_layers = len(widths)
        self.groups = list(groups.values())
        self.stacks = nn.ModuleList(
            PredictorStack(len(members), width, int(width * ratio))
            for width, members in groups.items()
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Apply predictor i to ``features[i]``, (N, d_i) each; same shapes out."""
        outputs: list[Tensor] = [features[0]] * self.num_layers
        for members, stack in zip(self.groups, self.stacks, strict=True):
            # Unbound at once, their gradients come back as one tensor.
            predicted = stack(torch.stack([features[i] for i in members])).unbind()
            for index, output in zip(members, predicted, strict=True):
                outputs[index] = output
        return outputs


class PredictorStack(nn.Module):
    """Predictors of equal width as one batched matrix product.

    Attributes:
        group: the processes whose batches give the statistics together; None: this process alone.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"a predictor needs a hidden unit, got width {width}: expected >= 4")
        self.weight1 = nn.Parameter(torch.empty(count, hidden, width))
        self.bn_weight = nn.Parameter(torch.ones(count, hidden))
        self.bn_bias = nn.Parameter(torch.zeros(count, hidden))
        self.weight2 = nn.Parameter(torch.empty(count, width, hidden))
        self.bias2 = nn.Parameter(torch.empty(count, width))
        self.register_buffer("running_mean", torch.zeros(count, hidden))
        self.register_buffer("running_var", torch.ones(count, hidden))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        self.group: ProcessGroup | None = None
        # torch.nn.Linear's default initialisation.
        nn.init.uniform_(self.weight1, -1 / math.sqrt(width), 1 / math.sqrt(width))
        nn.init.uniform_(self.weight2, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))
        nn.init.uniform_(self.bias2, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))

    def forward(self, z: Tensor) -> Tensor:
        """(count, N, d) → (count, N, d)."""
        hidden = torch.bmm(z, self.weight1.mT)
        count, samples, width = hidden.shape
        if self.training:
            self.num_batches_tracked += 1
        rows = hidden.transpose(0, 1).reshape(samples, count * width)
        affine = self.bn_weight.view(-1), self.bn_bias.view(-1)
        statistics = self.running_mean.view(-1), self.running_var.view(-1)
        if self.training and self.group is not None:
            flat = batch_norm_over_group(
                rows, *affine, *statistics, BN_MOMENTUM, BN_EPS, self.group.group_name
            )
        else:
            flat = F.batch_norm(rows, *statistics, *affine, self.training, BN_MOMENTUM, BN_EPS)
        hidden = flat.relu().view(samples, count, width).transpose(0, 1)
        return torch.baddbmm(self.bias2.unsqueeze(1), hidden, self.weight2.mT)
