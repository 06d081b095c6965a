"""Plain adversarial training and ordinary training, the two ends of the trade-off."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.attacks.pgd import RandomStart
from arat_fast.models.split_batch_norm import use_branch
from arat_fast.objectives.base import Objective, ObjectiveOutput, Paper, widen


class AdversarialTraining(Objective):
    """Cross-entropy on adversarial examples only.

    Source: Madry et al., ICLR 2018 (arXiv 1706.06083), equation 2.1.
    """

    name = "at"
    label = "AT"
    paper = Paper(
        "https://arxiv.org/abs/1706.06083",
        "Towards Deep Learning Models Resistant to Adversarial Attacks",
        "Aleksander Madry, Aleksandar Makelov, Ludwig Schmidt, Dimitris Tsipras, Adrian Vladu",
        "ICLR 2018",
        "Madry2018Towards",
    )

    def forward(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, start: RandomStart
    ) -> ObjectiveOutput:
        with use_branch(model, "adv"):
            logits = widen(model(x_adv))
        loss = F.cross_entropy(logits, y)
        return ObjectiveOutput(loss, {"ce_adv": loss}, None, logits)


class NaturalTraining(Objective):
    """Cross-entropy on the images themselves, without any attack."""

    name = "natural"
    label = "Natural"
    needs_attack = False

    def forward(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, start: RandomStart
    ) -> ObjectiveOutput:
        with use_branch(model, "adv"):
            logits = widen(model(x))
        loss = F.cross_entropy(logits, y)
        return ObjectiveOutput(loss, {"ce_clean": loss}, logits, None)
