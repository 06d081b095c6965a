"""Why it works: gradient conflict, mixture distribution, masked gradients."""

from arat_fast.analysis.conflict import gradient_conflict
from arat_fast.analysis.mixture import mixture_distance

__all__ = ["gradient_conflict", "mixture_distance"]
