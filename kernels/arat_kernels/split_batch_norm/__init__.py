"""Two BatchNorms over the two halves of one batch."""

from arat_kernels.forks import around, skip_of
from arat_kernels.split_batch_norm.api import split_batch_norm
from arat_kernels.split_batch_norm.module import (
    ADV,
    CLEAN,
    Branch,
    SplitBatchNorm2d,
    Statistics,
    add_for,
    mean_of_relu,
    mean_over_positions,
    normalize_sum,
    use_branch,
    use_statistics,
)

__all__ = [
    "ADV",
    "CLEAN",
    "Branch",
    "SplitBatchNorm2d",
    "Statistics",
    "add_for",
    "around",
    "mean_of_relu",
    "mean_over_positions",
    "normalize_sum",
    "skip_of",
    "split_batch_norm",
    "use_branch",
    "use_statistics",
]
