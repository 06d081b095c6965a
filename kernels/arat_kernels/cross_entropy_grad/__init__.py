"""Cross-entropy and its gradient in one launch."""

from arat_kernels.cross_entropy_grad.api import cross_entropy_grad

__all__ = ["cross_entropy_grad"]
