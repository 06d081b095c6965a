"""Cosine distance of predictions to stopped targets, all layers at once."""

from arat_kernels.cosine_invariance.api import cosine_invariance

__all__ = ["cosine_invariance"]
