"""MART: adversarial training that weighs samples by how sure the network is of the clean image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.attacks.pgd import RandomStart
from arat_fast.models.split_batch_norm import use_branch
from arat_fast.objectives import base
from arat_fast.objectives.base import ObjectiveOutput, Paper, widen
from arat_fast.objectives.normal_start import NormalStart, check_weight
from arat_fast.settings import Weight

_FLOOR = 1e-12


class MART(NormalStart):
    """``BCE(f(x_adv), y) + beta * mean_n KL(p(x) || p(x_adv)) * (1 - p(x)_y)``.

    ``p`` are the softmax probabilities, and ``BCE`` is the cross-entropy plus
    ``-log(1 - max_{k != y} p(x_adv)_k)``. Gradients reach both sides of the divergence and the
    weight. The attack maximises the cross-entropy on running statistics, from a start of normal
    noise, whatever ``bn`` and ``random_start`` of the step's attack say. Clean and adversarial
    images pass through the network one after the other. With targets (N, K) the class with the
    largest weight stands for ``y`` outside of the cross-entropy.

    Args:
        beta: weight of the divergence, >= 0; 6 in the published code, 5 in the paper.

    Raises:
        ValueError: ``beta`` is negative.

    Source: Wang et al., ICLR 2020, equation 11; the constants 1.0001, 1.0000001 and 1e-12 that keep
    logarithms and weights positive are those of the authors' code.
    """

    name = "mart"
    label = "MART"
    paper = Paper(
        "https://openreview.net/forum?id=rklOg6EFwS",
        "Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
        "Yisen Wang, Difan Zou, Jinfeng Yi, James Bailey, Xingjun Ma, Quanquan Gu",
        "ICLR 2020",
        "Wang2020Improving",
    )
    ties = ("kl",)

    @dataclass(frozen=True)
    class Settings(base.Settings):
        beta: Weight = 6.0
        """Weight of the divergence; >= 0."""

    def __init__(self, beta: float = 6.0) -> None:
        super().__init__()
        check_weight("beta", beta)
        self.beta = beta

    def forward(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, start: RandomStart
    ) -> ObjectiveOutput:
        with use_branch(model, "adv"):
            logits_clean, logits_adv = widen(model(x)), widen(model(x_adv))
        clean, adv = logits_clean.log_softmax(dim=1), logits_adv.softmax(dim=1)
        two = adv.topk(2, dim=1).indices
        label = y if y.ndim == 1 else y.argmax(dim=1)
        rival = torch.where(two[:, 0] == label, two[:, 1], two[:, 0])
        margin = F.nll_loss((1.0001 - adv + _FLOOR).log(), rival)
        # Of logarithms: a probability that underflows would have no gradient but NaN.
        divergences = F.kl_div((adv + _FLOOR).log(), clean, reduction="none", log_target=True)
        unsure = 1.0000001 - clean.gather(1, label[:, None])[:, 0].exp()
        terms = {
            "ce_adv": F.cross_entropy(logits_adv, y),
            "margin": margin,
            "kl": self.beta * (divergences.sum(dim=1) * unsure).mean(),
        }
        loss = torch.stack(list(terms.values())).sum()
        return ObjectiveOutput(loss, terms, logits_clean, logits_adv)

    def passes(self, model: nn.Module, x: Tensor, x_adv: Tensor) -> list[Tensor]:
        return [x, x_adv]
