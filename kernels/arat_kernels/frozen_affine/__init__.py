"""Per-channel affine map with residual and ReLU, its backward, and that of a folded convolution."""

from arat_kernels.frozen_affine.api import frozen_affine, relu_backward

__all__ = ["frozen_affine", "relu_backward"]
