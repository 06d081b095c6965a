"""Attacks as used in training and evaluation."""

from arat_fast.attacks.norms import NORMS, Norm
from arat_fast.attacks.pgd import PGD, RandomStart, check_images, perturbation_norm
from arat_fast.attacks.square import SquareLinf

__all__ = [
    "NORMS",
    "PGD",
    "Norm",
    "RandomStart",
    "SquareLinf",
    "check_images",
    "perturbation_norm",
]
