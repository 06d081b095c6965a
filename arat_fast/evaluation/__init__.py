"""Clean, PGD and AutoAttack accuracy, in float32 on the stated ball."""

from arat_fast.evaluation.autoattack import autoattack
from arat_fast.evaluation.evaluate import (
    AttackResult,
    ImageSet,
    ThreatModel,
    clean_accuracy,
    pgd_accuracy,
)

__all__ = [
    "AttackResult",
    "ImageSet",
    "ThreatModel",
    "autoattack",
    "clean_accuracy",
    "pgd_accuracy",
]
