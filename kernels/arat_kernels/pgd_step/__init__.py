"""The update of projected gradient descent, and its random start."""

from arat_kernels.pgd_step.api import pgd_step, random_start

__all__ = ["pgd_step", "random_start"]
