"""Clean, PGD and AutoAttack accuracy, in float32 on the stated ball."""

from arat_fast.evaluation.autoattack import autoattack
from arat_fast.evaluation.evaluate import AttackResult, ImageSet, clean_accuracy, pgd_accuracy
from arat_fast.evaluation.threat_model import ThreatModel

__all__ = [
    "AttackResult",
    "ImageSet",
    "ThreatModel",
    "autoattack",
    "clean_accuracy",
    "pgd_accuracy",
]
