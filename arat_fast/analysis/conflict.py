"""Gradient conflict: do the classification loss and the invariance loss pull the same way?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arat_fast.objectives.base import ObjectiveOutput

TOTAL = "classification"
"""Name of the pair that holds the whole classification loss."""


def shared_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of every convolution and linear layer by module path, biases left out."""
    layers = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    named = model.named_parameters()
    return {name.removesuffix(".weight"): weight for name, weight in named if id(weight) in layers}


def gradient_conflict(
    model: nn.Module, output: ObjectiveOutput, ties: tuple[str, ...]
) -> dict[str, Any] | None:
    """Compare the gradients of the two parts of a loss on one batch.

    An entry of a weight conflicts where its two gradients have opposite signs. The share counts
    all entries of the convolution and linear weights of the network, those without any invariance
    gradient (the classifier after the last regularised layer) included, as the official code does.

    Args:
        model: the network that was run; predictors are no part of it.
        output: what the objective returned, not yet differentiated.
        ties: how the names of the terms begin that compare clean and adversarial images, as the
            class of the objective says; the others classify.

    Returns:
        JSON types, None where the loss has only one of the two parts, or where the labels do not
        reach the network, but a guide of it::

            {"pairs": {PAIR: {"share": …, "cosine": …}},
             "layers": {PATH: {"share": …, "cosine": …, "entries": …}},
             "norms": {"classification": …, "invariance": …}, "entries": …, "unrelated": …}

        PAIR is "classification" (the whole classification loss, weights applied) or one of its
        terms ("ce_adv", "ce_clean"), against the whole invariance loss. "layers" is for the first.
        A share and a cosine are None where one of the two gradients is zero throughout.
        "unrelated" is the share that gradients of random signs would have: half of the entries of
        the layers that have both gradients.

    Source: arXiv 2402.14648, and the module ``utils_analysis/grad.py`` of its official code. There
    the sign is that of a float32 product, which vanishes where it underflows; here the signs
    themselves are compared.
    """
    invariance = {name: term for name, term in output.terms.items() if name.startswith(ties)}
    classification = {n: term for n, term in output.terms.items() if n not in invariance}
    if not classification or not invariance:
        return None
    weights = shared_weights(model)
    losses = {TOTAL: torch.stack(list(classification.values())).sum()}
    if len(classification) > 1:
        losses |= classification
    inner = _gradients(torch.stack(list(invariance.values())).sum(), weights)
    sums: dict[str, list[_Sums]] = {}
    for name, loss in losses.items():
        outer = _gradients(loss, weights)
        if name == TOTAL and all(gradient is None for gradient in outer):
            return None
        sums[name] = [
            _compare(*three) for three in zip(weights.values(), outer, inner, strict=True)
        ]
    total = _total(sums[TOTAL])
    compared = sum(part.entries for part in sums[TOTAL] if part.outer and part.inner)
    return {
        "pairs": {name: _record(_total(parts)) for name, parts in sums.items()},
        "layers": {
            path: {**_record(part), "entries": part.entries}
            for path, part in zip(weights, sums[TOTAL], strict=True)
        },
        "norms": {TOTAL: total.outer**0.5, "invariance": total.inner**0.5},
        "entries": total.entries,
        "unrelated": 0.5 * compared / total.entries,
    }


class _Sums(NamedTuple):
    """What share and cosine of two gradients are made of; sums over layers give the total."""

    entries: int
    opposite: int
    dot: float
    outer: float
    inner: float


def _gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)


def _compare(weight: Tensor, outer: Tensor | None, inner: Tensor | None) -> _Sums:
    a, b = (torch.zeros_like(weight) if g is None else g for g in (outer, inner))
    opposite = int((a.sign() * b.sign() < 0).sum())
    a, b = a.double(), b.double()
    products = (float(product.sum()) for product in (a * b, a.square(), b.square()))
    return _Sums(weight.numel(), opposite, *products)


def _total(parts: Iterable[_Sums]) -> _Sums:
    return _Sums(*map(sum, zip(*parts, strict=True)))


def _record(sums: _Sums) -> dict[str, float | None]:
    if sums.outer == 0 or sums.inner == 0:
        return {"share": None, "cosine": None}
    return {
        "share": sums.opposite / sums.entries,
        "cosine": sums.dot / (sums.outer**0.5 * sums.inner**0.5),
    }
