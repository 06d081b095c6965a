"""Per-channel affine map with residual and ReLU, its backward, and that of a folded convolution."""

from arat_kernels.frozen_affine.api import add_frozen_affine, frozen_affine, relu_backward

__all__ = ["add_frozen_affine", "frozen_affine", "relu_backward"]
