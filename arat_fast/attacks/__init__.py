"""Attacks as used in training and evaluation."""

from arat_fast.attacks.pgd import PGD, check_images, perturbation_norm

__all__ = ["PGD", "check_images", "perturbation_norm"]
