"""Two BatchNorms over the two halves of one batch."""

from arat_kernels.split_batch_norm.api import split_batch_norm

__all__ = ["split_batch_norm"]
