"""ARREST: adversarial finetuning that keeps the representations of a natural network."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.attacks.pgd import PGD, RandomStart
from arat_fast.models.features import collect_features
from arat_fast.models.split_batch_norm import use_branch, use_statistics
from arat_fast.objectives import base
from arat_fast.objectives.base import (
    Objective,
    ObjectiveOutput,
    Paper,
    Surroundings,
    widen,
)
from arat_fast.objectives.normal_start import check_weight
from arat_fast.settings import Count, Weight


class ARREST(Objective):
    """``CE(f(x'), y) + distillation * mean_n d(h(x'), h_nat(x))``, from a natural network on.

    - Adversarial finetuning: ``f`` starts with the weights of a naturally trained network.
    - Representation-guided distillation: ``h`` are the representations of ``f``, ``h_nat`` those of
      the frozen natural network, and ``d`` the angular distance, the angle divided by pi, in
      [0, 1]. No gradient reaches ``h_nat``.
    - Noisy replay: ``x'`` is the adversarial image, or the clean image plus uniform noise of the
      same ball where the clean representation has moved too far, ``d(h(x), h_nat(x)) > replay``.

    Args:
        model: the naturally trained network, from which training goes on. The natural network is a
            copy of it in eval mode; see :meth:`adopt`.
        attack: of the training step; gives the ball of the replayed noise.
        layers: module paths whose features are the representation; see
            :func:`arat_fast.models.collect_features`. The distance is their mean.
        distillation: weight of the distance, >= 0.
        replay: distance above which a sample is replayed, >= 0; 1 never replays.

    Raises:
        ValueError: a weight or the threshold is negative.

    Source: Suzuki et al., ICCV 2023 (arXiv 2308.16454), who published no code; not compared with
    the paper's equations, which were not at hand. The three parts are those of its abstract. The
    pair of representations (of f on the adversarial image, of the natural network on the clean one)
    and the angle between them are as later work describes them. Set here: that the replay is
    decided sample by sample, by the representation of the clean image on running statistics; that
    its noise is the uniform start of the attack, clamped to [0, 1]; and both default numbers, which
    are not tuned.
    """

    name = "arrest"
    label = "ARREST"
    paper = Paper(
        "https://arxiv.org/abs/2308.16454",
        "Adversarial Finetuning with Latent Representation Constraint to Mitigate "
        "Accuracy-Robustness Tradeoff",
        "Satoshi Suzuki, Shin'ya Yamaguchi, Shoichiro Takeda, Sekitoshi Kanai, Naoki Makishima, "
        "Atsushi Ando, Ryo Masumura",
        "ICCV 2023",
        "Suzuki2023Adversarial",
    )
    note = (
        "ARREST is a reading of its paper's abstract, without its equations, which were not at "
        "hand; its two weights are set here and not tuned."
    )
    ties = ("distillation",)
    starts_from_natural = True

    @dataclass(frozen=True)
    class Settings(base.Settings):
        layers: tuple[str, ...] = ()
        """Module paths of the layers whose features are the representation; empty for the pooled
        feature before the classifier."""
        teacher: Path | None = None
        """A naturally trained model to start from, a run's folder or its exported weights; without
        one, the run trains it first."""
        teacher_epochs: Count | None = None
        """Epochs of natural training where no teacher is given, before and beside train.epochs;
        >= 1; default as many as train.epochs."""
        distillation: Weight = 10.0
        """Weight of the distance from the natural representations; >= 0."""
        replay: Weight = 0.1
        """Angle over pi by which a clean representation may move before its sample is replayed
        with noise instead of attacked; >= 0, 1 for no replay."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.teacher is not None and self.teacher_epochs is not None:
                raise ValueError(
                    "objective.teacher_epochs is for a run without a teacher, got both: leave one "
                    "out"
                )

        def regularized_layers(self, published: tuple[str, ...]) -> tuple[str, ...]:
            return self.layers or ("avgpool",)

    @classmethod
    def build(cls, settings: Settings, surroundings: Surroundings) -> ARREST:
        if surroundings.norm == "split":
            raise ValueError(
                "arrest goes on from a natural network, which has one BatchNorm, got "
                "model.norm=split: leave --model.norm out"
            )
        return cls(
            surroundings.model,
            surroundings.attack,
            surroundings.layers,
            distillation=settings.distillation,
            replay=settings.replay,
        )

    def __init__(
        self,
        model: nn.Module,
        attack: PGD,
        layers: Sequence[str] = ("avgpool",),
        *,
        distillation: float = 10.0,
        replay: float = 0.1,
    ) -> None:
        super().__init__()
        check_weight("distillation", distillation)
        check_weight("replay", replay)
        self.layers = tuple(layers)
        self.distillation = distillation
        self.replay = replay
        self.noise = dataclasses.replace(attack, random_start=True)
        self.natural = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def adopt(self, model: nn.Module) -> None:
        """Take the present weights of the network for the natural ones."""
        self.natural.load_state_dict(model.state_dict())

    def networks(self) -> list[nn.Module]:
        return [self.natural]

    def train(self, mode: bool = True) -> ARREST:
        super().train(mode)
        self.natural.eval()
        return self

    def forward(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, start: RandomStart
    ) -> ObjectiveOutput:
        with torch.no_grad():
            natural = self._representations(self.natural, x)
            with use_statistics(model, "running"):
                moved = self._distance(self._representations(model, x), natural) > self.replay
            draw = RandomStart(start.generator, start.first)
            noisy = self.noise.start(x, draw, impl=self.impl).clamp_(0, 1)
        x_used = torch.where(moved.view(-1, 1, 1, 1), noisy, x_adv)
        with use_branch(model, "adv"), collect_features(model, self.layers) as features:
            logits = widen(model(x_used))
        distance = self._distance([features[layer] for layer in self.layers], natural).mean()
        terms = {
            "ce_adv": F.cross_entropy(logits, y),
            "distillation": self.distillation * distance,
        }
        loss = terms["ce_adv"] + terms["distillation"]
        return ObjectiveOutput(loss, terms, None, logits, {"replayed": moved.float().mean()})

    def _representations(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        with use_branch(model, "adv"), collect_features(model, self.layers) as features:
            model(x)
        return [features[layer] for layer in self.layers]

    @staticmethod
    def _distance(h: list[Tensor], natural: list[Tensor]) -> Tensor:
        """Mean over the layers of the angular distance of each sample, (N,)."""
        distances = [angular_distance(a, b) for a, b in zip(h, natural, strict=True)]
        return torch.stack(distances).mean(dim=0)


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """Angle between the rows of two tensors divided by pi, (N,) in [0, 1].

    Args:
        a, b: (N, d), same shape. Where they are parallel the gradient is zero.
    """
    # Not arccos of the cosine, which has no finite gradient at parallel vectors.
    u, v = F.normalize(a, dim=1), F.normalize(b, dim=1)
    half = torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    return 2 / math.pi * half
