"""LBGAT: a naturally trained guide network shows the robust one its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.attacks.pgd import RandomStart
from arat_fast.models.split_batch_norm import use_branch
from arat_fast.objectives import base
from arat_fast.objectives.base import ObjectiveOutput, Paper, Surroundings, widen
from arat_fast.objectives.normal_start import check_weight
from arat_fast.objectives.trades import DivergenceAttack, divergence
from arat_fast.settings import Weight

OWN_CLEAN_BRANCH = "clean-branch"
"""The guide that is no network of its own."""


class LBGAT(DivergenceAttack):
    """``MSE(f(x_adv), g(x)) + CE(g(x), y) + alpha * mean_n KL(softmax f(x) || softmax f(x_adv))``.

    ``g`` is the guide, trained along with ``f`` by the same optimiser; the mean square of the first
    term is over samples and classes. There is no stop-gradient: the first term moves the guide too.
    The labels reach ``f`` through the guide only. The attack is TRADES', whatever ``alpha`` is. The
    clean pass of ``f`` is made even where ``alpha`` is 0: it moves the running statistics, on which
    the attack runs.

    Args:
        guide: any network with the same classes, whose parameters become this objective's; None
            takes the clean branch of the trained network itself, which then has split BatchNorm:
            distillation from the clean branch, as ARAT does it, but of logits.
        alpha: weight of TRADES' divergence, >= 0; 0 or 6 as published.

    Raises:
        ValueError: ``alpha`` is negative.

    Source: Cui et al., ICCV 2021 (arXiv 2011.11164), and the authors' code; equations 3 and 5 of
    the manuscript in their repository, with the published weight 1 of the guide's cross-entropy.
    Where they differ the code is followed: equation 5 prints the divergence the other way round,
    ``KL(f(x_adv) || f(x))``. The passes are made in the code's order: f(x_adv), f(x), g(x).
    """

    name = "lbgat"
    label = "LBGAT"
    paper = Paper(
        "https://arxiv.org/abs/2011.11164",
        "Learnable Boundary Guided Adversarial Training",
        "Jiequan Cui, Shu Liu, Liwei Wang, Jiaya Jia",
        "ICCV 2021",
        "Cui2021Learnable",
    )
    ties = ("mse", "kl")

    @dataclass(frozen=True)
    class Settings(base.Settings):
        alpha: Weight = 0.0
        """Weight of TRADES' divergence, 0 or 6 as published; >= 0."""
        guide: str = ""
        """Model that guides, trained along and then dropped; empty for the trained one's own
        architecture, clean-branch for its clean branch instead of another network."""

        @property
        def splits_batch_norm(self) -> bool:
            return self.guide == OWN_CLEAN_BRANCH

    @classmethod
    def build(cls, settings: Settings, surroundings: Surroundings) -> LBGAT:
        if settings.guide != OWN_CLEAN_BRANCH:
            return cls(surroundings.make_network(settings.guide), settings.alpha)
        if surroundings.norm == "shared":
            raise ValueError(
                "a guide that is the clean branch needs split BatchNorm, got model.norm=shared: "
                "leave --model.norm out"
            )
        return cls(None, settings.alpha)

    def __init__(self, guide: nn.Module | None, alpha: float = 0.0) -> None:
        super().__init__()
        check_weight("alpha", alpha)
        self.guide = guide
        self.alpha = alpha

    def networks(self) -> list[nn.Module]:
        return [] if self.guide is None else [self.guide]

    def forward(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, start: RandomStart
    ) -> ObjectiveOutput:
        with use_branch(model, "adv"):
            logits_adv = widen(model(x_adv))
            with torch.set_grad_enabled(self.alpha > 0):
                logits_clean = widen(model(x))
        if self.guide is None:
            with use_branch(model, "clean"):
                guiding = widen(model(x))
        else:
            guiding = widen(self.guide(x))
        terms = {
            "mse": F.mse_loss(logits_adv, guiding),
            "ce_guide": F.cross_entropy(guiding, y),
        }
        if self.alpha > 0:
            terms["kl"] = self.alpha * divergence(logits_clean, logits_adv)
        loss = torch.stack(list(terms.values())).sum()
        return ObjectiveOutput(loss, terms, logits_clean, logits_adv)

    def passes(self, model: nn.Module, x: Tensor, x_adv: Tensor) -> list[Tensor]:
        return [x_adv, x]
