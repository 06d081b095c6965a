"""Ordinary BatchNorm with the interface of the split one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from arat_kernels.split_batch_norm.distributed import batch_norm_over_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PlainBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that is called as SplitBatchNorm2d is, with a residual and a ReLU.

    Attributes:
        group: the processes whose batches give the statistics together, on any device; None: this
            process alone. PyTorch's SyncBatchNorm is for GPUs only.
        sink: gets what is normalised, before the residual: a hook would see the sum.
    """

    group: ProcessGroup | None = None
    sink: Callable[[Tensor], None] | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """``[relu](norm(input) [+ residual])``, (N, C, H, W)."""
        if not self.training or self.group is None:
            y = super().forward(input)
        else:
            y = self._over_group(input, self.group)
        if self.sink is not None:
            self.sink(y)
        if residual is not None:
            y = y + residual
        return y.relu() if relu else y

    def _over_group(self, input: Tensor, group: ProcessGroup) -> Tensor:
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
            group.group_name,
        )
