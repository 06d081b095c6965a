"""Training objectives: ARAT and the baselines, one interface."""

from arat_fast.objectives.adversarial_training import AdversarialTraining, NaturalTraining
from arat_fast.objectives.arat import ARAT
from arat_fast.objectives.arrest import ARREST
from arat_fast.objectives.base import (
    ForeignSettings,
    Objective,
    ObjectiveOutput,
    Paper,
    Settings,
    Surroundings,
    widen,
)
from arat_fast.objectives.lbgat import LBGAT
from arat_fast.objectives.mart import MART
from arat_fast.objectives.registry import (
    OBJECTIVES,
    known_objective,
    objective_label,
    objective_type,
)
from arat_fast.objectives.trades import TRADES

__all__ = [
    "ARAT",
    "ARREST",
    "LBGAT",
    "MART",
    "OBJECTIVES",
    "TRADES",
    "AdversarialTraining",
    "ForeignSettings",
    "NaturalTraining",
    "Objective",
    "ObjectiveOutput",
    "Paper",
    "Settings",
    "Surroundings",
    "known_objective",
    "objective_label",
    "objective_type",
    "widen",
]
