"""Attacks as used in training and evaluation."""

from arat_fast.attacks.pgd import PGD, check_images, perturbation_norm
from arat_fast.attacks.square import SquareLinf

__all__ = ["PGD", "SquareLinf", "check_images", "perturbation_norm"]
