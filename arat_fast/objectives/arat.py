"""ARAT: asymmetric representation-regularised adversarial training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.attacks.pgd import RandomStart
from arat_fast.models.features import black_images, collect_features, logits_of
from arat_fast.models.split_batch_norm import (
    Branch,
    SharedBatchNormWarning,
    SplitBatchNorm2d,
    use_branch,
    warn_of_shared,
)
from arat_fast.objectives import base
from arat_fast.objectives.base import (
    Objective,
    ObjectiveOutput,
    Paper,
    Surroundings,
    widen,
)
from arat_fast.objectives.predictor import Predictors
from arat_fast.settings import Weight
from arat_kernels.cosine_invariance import cosine_invariance

Direction = Literal["adv_to_clean", "clean_to_adv", "both", "symmetric"]
Balance = Literal["previous_epoch", "probe", "fixed"]


class ARAT(Objective):
    """Cross-entropy on both branches plus the asymmetric cosine invariance loss.

    ``w_adv * CE(f_adv(x_adv), y) + w_clean * CE(f_clean(x), y)
    + (gamma / L) * sum_l mean_n(1 - cos(h_l(z_adv_l), stopgrad(z_clean_l)))``

    Both halves run in one forward pass of ``[x; x_adv]``. On a network without split BatchNorm a
    BatchNorm therefore normalises with the statistics of the mixture. The official code makes two
    passes instead, ``x`` and then ``x_adv``, so that its one BatchNorm normalises each half by
    itself, and the halves share running statistics, weight and bias alone: ``separate_passes``.

    Args:
        model: the network, used once to find the width of every regularised layer.
        layers: module paths of the regularised layers, L of them; see
            :func:`arat_fast.models.collect_features`.
        image_shape: (C, H, W) of the images.
        gamma: weight of the invariance loss, >= 0.
        stop_gradient: detach the target of the invariance loss.
        predictor: pass the source of the invariance loss through a predictor.
        direction: which features move: "adv_to_clean" (published: adversarial features towards
            clean ones), "clean_to_adv", "both" (mean of the two; each side is source once, through
            the same predictor, and target once), or "symmetric" (one term, gradient to both sides;
            has neither stop-gradient nor predictor).
        balance: "previous_epoch": w_adv = a and w_clean = 1 - a, with a the clean training accuracy
            over the epoch before; "probe": the same, measured before each epoch (official code);
            "fixed": the weights below.
        w_adv, w_clean: fixed weights of the two classification losses, >= 0.
        separate_passes: pass ``x`` and ``x_adv`` through the network one after the other. With
            split BatchNorm the numbers are the same, and one pass is faster.

    Raises:
        ValueError: a layer does not exist, the network takes no such images, ``gamma`` or a weight
            is negative, or switches that exclude each other are set.

    Warns:
        SharedBatchNormWarning: the network has BatchNorm that is not split, or none at all.

    Source: Waseda et al., ICLR 2025 (arXiv 2402.14648), section 4.
    """

    name = "arat"
    label = "ARAT"
    paper = Paper(
        "https://arxiv.org/abs/2402.14648",
        "Rethinking Invariance Regularization in Adversarial Training to Improve "
        "Robustness-Accuracy Trade-off",
        "Futa Waseda, Ching-Chun Chang, Isao Echizen",
        "ICLR 2025",
        "Waseda2025Rethinking",
    )
    ties = ("invariance",)

    @dataclass(frozen=True)
    class Settings(base.Settings):
        gamma: Weight = 30.0
        """Weight of the invariance loss; >= 0."""
        layers: tuple[str, ...] = ()
        """Module paths of the regularised layers; empty for those published for the model."""
        stop_gradient: bool = True
        """Detach the target of the invariance loss."""
        predictor: bool = True
        """Pass the source of the invariance loss through a predictor."""
        direction: Direction = "adv_to_clean"
        """Which features move towards which."""
        balance: Balance = "previous_epoch"
        """Weights of the classification losses: the clean branch's training accuracy over the
        previous epoch, the same measured on the first 1,024 samples before each epoch (official
        code), or fixed."""
        separate_passes: bool = False
        """With model.norm=shared: normalise clean and adversarial images each with their own
        statistics, in two passes (official code), instead of with those of the mixture, in one."""
        w_adv: Weight = 1.0
        """Weight of the adversarial classification loss with balance=fixed; >= 0."""
        w_clean: Weight = 1.0
        """Weight of the clean classification loss with balance=fixed; >= 0."""

        @property
        def splits_batch_norm(self) -> bool:
            return True

        def regularized_layers(self, published: tuple[str, ...]) -> tuple[str, ...]:
            return self.layers or published

        def official(self) -> ARAT.Settings:
            return replace(self, balance="probe", separate_passes=True)

    @classmethod
    def build(cls, settings: Settings, surroundings: Surroundings) -> ARAT:
        shared = surroundings.norm == "shared"
        with warnings.catch_warnings():
            if shared:
                # As it was asked for, or all that the network can have, which the run says.
                warnings.simplefilter("ignore", SharedBatchNormWarning)
            return cls(
                surroundings.model,
                surroundings.layers,
                surroundings.image_shape,
                gamma=settings.gamma,
                stop_gradient=settings.stop_gradient,
                predictor=settings.predictor,
                direction=settings.direction,
                balance=settings.balance,
                w_adv=settings.w_adv,
                w_clean=settings.w_clean,
                # Split BatchNorm separates the halves in one pass.
                separate_passes=settings.separate_passes and shared,
            )

    w_adv: Tensor
    w_clean: Tensor

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        image_shape: tuple[int, int, int],
        *,
        gamma: float = 30.0,
        stop_gradient: bool = True,
        predictor: bool = True,
        direction: Direction = "adv_to_clean",
        balance: Balance = "previous_epoch",
        w_adv: float = 1.0,
        w_clean: float = 1.0,
        separate_passes: bool = False,
    ) -> None:
        super().__init__()
        if not gamma >= 0 or not w_adv >= 0 or not w_clean >= 0:
            raise ValueError(
                f"gamma, w_adv and w_clean must be >= 0, got {gamma}, {w_adv}, {w_clean}"
            )
        if direction == "symmetric" and (stop_gradient or predictor):
            raise ValueError(
                'direction="symmetric" has neither stop-gradient nor predictor, got '
                f"stop_gradient={stop_gradient}, predictor={predictor}: set both to False"
            )
        if not layers:
            raise ValueError(
                "at least one regularised layer is expected, got none; to train without the "
                "invariance loss set gamma to 0"
            )
        self.layers = tuple(layers)
        self.gamma = gamma
        self.stop_gradient = stop_gradient
        self.direction = direction
        self.balance = balance
        self.separate_passes = separate_passes
        warn_of_shared(model)
        widths = feature_widths(model, self.layers, image_shape)
        self.predictors = Predictors(widths) if predictor else None
        # Tensors, so that a captured step sees them change.
        self.register_buffer("w_adv", torch.tensor(float(w_adv)))
        self.register_buffer("w_clean", torch.tensor(float(w_clean)))

    def start_epoch(self, clean_accuracy: float, probe: Callable[[], float] | None = None) -> None:
        """Set the two classification weights from the clean training accuracy, in [0, 1]; a
        ValueError for another number."""
        if self.balance == "fixed":
            return
        a = probe() if self.balance == "probe" and probe is not None else clean_accuracy
        if not 0 <= a <= 1:
            raise ValueError(f"the clean accuracy must lie in [0, 1], got {a}")
        self.w_adv.fill_(a)
        self.w_clean.fill_(1 - a)

    def left_out(self) -> str:
        if self.balance == "fixed" or abs(float(self.w_adv + self.w_clean) - 1) < 1e-3:
            return ""
        return (
            "objective.start_epoch(clean_accuracy) was not called: the two classification losses "
            f"keep the weights {float(self.w_adv):g} and {float(self.w_clean):g}; call it before "
            'each epoch, or set balance="fixed"'
        )

    def forward(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, start: RandomStart
    ) -> ObjectiveOutput:
        if self.separate_passes:
            clean, adv = self._pass(model, "clean", x), self._pass(model, "adv", x_adv)
        else:
            both = self._pass(model, "both", torch.cat([x, x_adv]))
            halves: tuple[Tensor, ...] = _Halves.apply(*both)  # type: ignore[no-untyped-call]
            clean, adv = list(halves[: len(both)]), list(halves[len(both) :])
        (logits_clean, *z_clean), (logits_adv, *z_adv) = clean, adv
        terms = {
            "ce_adv": self.w_adv * F.cross_entropy(logits_adv, y),
            "ce_clean": self.w_clean * F.cross_entropy(logits_clean, y),
        }
        weight = self.gamma / len(self.layers)
        invariance = weight * self._invariance(z_clean, z_adv)
        for layer, value in zip(self.layers, invariance.unbind(), strict=True):
            terms[f"invariance/{layer}"] = value
        loss = torch.stack(list(terms.values())).sum()
        return ObjectiveOutput(loss, terms, logits_clean, logits_adv)

    def passes(self, model: nn.Module, x: Tensor, x_adv: Tensor) -> list[Tensor]:
        if any(isinstance(module, SplitBatchNorm2d) for module in model.modules()):
            return [x_adv]
        return [x, x_adv] if self.separate_passes else [torch.cat([x, x_adv])]

    def _pass(self, model: nn.Module, branch: Branch, images: Tensor) -> list[Tensor]:
        """The logits, then the feature of every regularised layer."""
        with use_branch(model, branch), collect_features(model, self.layers) as features:
            logits = widen(model(images))
        return [logits, *(features[layer] for layer in self.layers)]

    def _invariance(self, z_clean: list[Tensor], z_adv: list[Tensor]) -> Tensor:
        if self.direction == "symmetric":
            return self._distances(z_adv, z_clean)
        distances = []
        if self.direction in ("adv_to_clean", "both"):
            distances.append(self._distances(self._source(z_adv), z_clean))
        if self.direction in ("clean_to_adv", "both"):
            distances.append(self._distances(self._source(z_clean), z_adv))
        if len(distances) == 1:
            return distances[0]
        return (distances[0] + distances[1]) / 2

    def _source(self, z: list[Tensor]) -> list[Tensor]:
        if self.predictors is None:
            return z
        predicted: list[Tensor] = self.predictors(z)
        return predicted

    def _distances(self, p: list[Tensor], z: list[Tensor]) -> Tensor:
        """Mean over the batch of 1 - cos(p, z) of (N, d) each, layer by layer: (L,)."""
        if self.stop_gradient:
            return cosine_invariance(p, z, impl=self.impl)
        means = [
            1 - F.cosine_similarity(widen(source), target, dim=-1).mean()
            for source, target in zip(p, z, strict=True)
        ]
        return torch.stack(means)


class _Halves(torch.autograd.Function):
    """The first halves of tensors, then the second ones. Autograd would make the gradient of each
    tensor in two launches; these are all made in two."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        firsts, seconds = zip(*(tensor.detach().chunk(2) for tensor in tensors), strict=True)
        return *firsts, *seconds

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor, ...]:
        results = [torch.empty_like(like) for like in ctx.saved_tensors]
        places = [tensor.chunk(2)[half] for half in range(2) for tensor in results]
        read = [
            (place, grad) for place, grad in zip(places, given, strict=True) if grad is not None
        ]
        unread = [place for place, grad in zip(places, given, strict=True) if grad is None]
        torch._foreach_copy_([place for place, _ in read], [grad for _, grad in read])
        if unread:
            torch._foreach_zero_(unread)
        return tuple(results)


def feature_widths(
    model: nn.Module, layers: Sequence[str], image_shape: tuple[int, int, int]
) -> list[int]:
    """Width d of the pooled feature of each layer, found by running two black images.

    Args:
        model: any network; neither its buffers nor its mode change.
        layers: module paths.
        image_shape: (C, H, W).

    Raises:
        ValueError: a path does not exist, the network never runs that layer, or as
            :func:`arat_fast.models.features.logits_of`.
    """
    with collect_features(model, layers) as features:
        logits_of(model, black_images(model, image_shape))
    missing = [layer for layer in layers if layer not in features]
    if missing:
        raise ValueError(f"the network's forward pass never runs the layer {missing[0]!r}")
    return [features[layer].shape[1] for layer in layers]
