"""TRADES: cross-entropy on clean images plus the divergence that an attack can cause."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.attacks.pgd import AttackLoss, RandomStart
from arat_fast.models.split_batch_norm import use_branch
from arat_fast.objectives import base
from arat_fast.objectives.base import ObjectiveOutput, Paper, widen
from arat_fast.objectives.normal_start import NormalStart, check_weight
from arat_fast.settings import Weight


class DivergenceAttack(NormalStart):
    """Base of objectives whose attack maximises KL(softmax f(x) || softmax f(x_adv)).

    Source: TRADES' algorithm 1; the eval mode and the normal start as in its authors' code.
    """

    @torch.no_grad()
    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss | None:
        clean = widen(model(x)).softmax(dim=1)

        def loss(logits: Tensor) -> Tensor:
            return F.kl_div(widen(logits).log_softmax(dim=1), clean, reduction="none").sum(dim=1)

        return loss


class TRADES(DivergenceAttack):
    """``CE(f(x), y) + beta * mean_n KL(softmax f(x) || softmax f(x_adv))``.

    Gradients reach both sides of the divergence. The attack maximises the same divergence, on
    running statistics and from a start of normal noise, whatever ``bn`` and ``random_start`` of the
    step's attack say. Clean, adversarial and once more clean images pass through the network, one
    batch after the other.

    Args:
        beta: weight of the divergence, >= 0; 6 as published.

    Raises:
        ValueError: ``beta`` is negative.

    Source: Zhang et al., ICML 2019 (arXiv 1901.08573), equation 5 and algorithm 1; the direction of
    the divergence, the eval mode of the attack, its start and the three passes as in the authors'
    code.
    """

    name = "trades"
    label = "TRADES"
    paper = Paper(
        "https://arxiv.org/abs/1901.08573",
        "Theoretically Principled Trade-off between Robustness and Accuracy",
        "Hongyang Zhang, Yaodong Yu, Jiantao Jiao, Eric P. Xing, Laurent El Ghaoui, "
        "Michael I. Jordan",
        "ICML 2019",
        "Zhang2019Theoretically",
    )
    ties = ("kl",)

    @dataclass(frozen=True)
    class Settings(base.Settings):
        beta: Weight = 6.0
        """Weight of the divergence; >= 0, 6 as published."""

    def __init__(self, beta: float = 6.0) -> None:
        super().__init__()
        check_weight("beta", beta)
        self.beta = beta

    def forward(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, start: RandomStart
    ) -> ObjectiveOutput:
        with use_branch(model, "adv"):
            logits_clean, logits_adv = widen(model(x)), widen(model(x_adv))
            # The authors' code computes the divergence with a clean pass of its own: the gradient
            # is the same, but the running statistics see the clean images twice.
            with torch.no_grad():
                model(x)
        terms = {
            "ce_clean": F.cross_entropy(logits_clean, y),
            "kl": self.beta * divergence(logits_clean, logits_adv),
        }
        return ObjectiveOutput(terms["ce_clean"] + terms["kl"], terms, logits_clean, logits_adv)

    def passes(self, model: nn.Module, x: Tensor, x_adv: Tensor) -> list[Tensor]:
        return [x, x_adv, x]


def divergence(clean: Tensor, adv: Tensor) -> Tensor:
    """Mean over the batch of KL(softmax clean || softmax adv), of logits (N, classes)."""
    # Of logarithms: a probability that underflows would have no gradient but NaN.
    return F.kl_div(
        adv.log_softmax(dim=1), clean.log_softmax(dim=1), reduction="batchmean", log_target=True
    )
