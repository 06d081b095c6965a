"""An objective of one's own: adversarial training on the margin between the logits.

    arat-fast train digits --objective.name margin:Margin --objective.margin 2

in the folder of this file, or with the folder on PYTHONPATH.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from arat_fast import objectives
from arat_fast.models import use_branch
from arat_fast.objectives import Objective, ObjectiveOutput, widen
from arat_fast.settings import Positive


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """By how much the label's logit is ahead of the best other one, (N,)."""
    own = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], -torch.inf)
    return own[:, 0] - others.amax(dim=1)


class Margin(Objective):
    label = "margin"

    @dataclass(frozen=True)
    class Settings(objectives.Settings):
        margin: Positive = 1.0
        """Margin in logits below which an adversarial image costs something; > 0."""

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = margin

    def attack_loss(self, model, x, y):
        return lambda logits: -margins(logits, y)

    def forward(self, model, x, x_adv, y, start):
        with use_branch(model, "adv"):
            logits = widen(model(x_adv))
        loss = (self.margin - margins(logits, y)).relu().mean()
        return ObjectiveOutput(loss, {"margin_adv": loss}, None, logits)
