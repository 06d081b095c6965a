"""Training objectives: ARAT and the baselines, one interface."""

from arat_fast.objectives.adversarial_training import AdversarialTraining, NaturalTraining
from arat_fast.objectives.arat import ARAT
from arat_fast.objectives.base import Objective, ObjectiveOutput

__all__ = ["ARAT", "AdversarialTraining", "NaturalTraining", "Objective", "ObjectiveOutput"]
