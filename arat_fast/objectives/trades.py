"""TRADES: cross-entropy on clean images plus the divergence that an attack can cause."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD, AttackLoss
from arat_fast.models.split_batch_norm import use_branch, use_statistics
from arat_fast.objectives.base import Objective, ObjectiveOutput, widen

START_STD = 1e-3
"""Standard deviation of the normal start of the attacks of TRADES and MART."""


class TRADES(Objective):
    """``CE(f(x), y) + beta * mean_n KL(softmax f(x) || softmax f(x_adv))``.

    The attack maximises the same divergence from the clean prediction, on running statistics and
    from a start of normal noise, whatever ``bn`` and ``random_start`` of the step's attack say.
    Clean and adversarial images pass through the network one after the other.

    Args:
        beta: weight of the divergence, >= 0; 6 as published.

    Raises:
        ValueError: ``beta`` is negative.

    Source: Zhang et al., ICML 2019 (arXiv 1901.08573), equation 5 and algorithm 1; the eval mode of
    the attack as in the authors' code.
    """

    def __init__(self, beta: float = 6.0) -> None:
        super().__init__()
        check_beta(beta)
        self.beta = beta

    def own_attack(self, attack: PGD) -> PGD:
        return dataclasses.replace(attack, bn="running")

    def attack_noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
        return normal_start(x, generator)

    @torch.no_grad()
    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss | None:
        with use_branch(model, "adv"), use_statistics(model, "running"):
            clean = widen(model(x)).softmax(dim=1)

        def divergence(logits: Tensor) -> Tensor:
            return F.kl_div(widen(logits).log_softmax(dim=1), clean, reduction="none").sum(dim=1)

        return divergence

    def forward(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveOutput:
        with use_branch(model, "adv"):
            logits_clean, logits_adv = widen(model(x)), widen(model(x_adv))
        # Of logarithms: a probability that underflows would have no gradient but NaN.
        divergence = F.kl_div(
            logits_adv.log_softmax(dim=1),
            logits_clean.log_softmax(dim=1),
            reduction="batchmean",
            log_target=True,
        )
        terms = {"ce_clean": F.cross_entropy(logits_clean, y), "kl": self.beta * divergence}
        return ObjectiveOutput(terms["ce_clean"] + terms["kl"], terms, logits_clean, logits_adv)


def normal_start(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal noise of :data:`START_STD`, shape and dtype of ``x``."""
    return START_STD * torch.empty_like(x).normal_(generator=generator)


def check_beta(beta: float) -> None:
    """ValueError unless ``beta`` is a number >= 0."""
    if not beta >= 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
