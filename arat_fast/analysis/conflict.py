"""Gradient conflict: do the classification loss and the invariance loss pull the same way?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arat_fast.objectives.base import ObjectiveOutput

TOTAL = "classification"
"""Name of the pair that holds the whole classification loss."""


def shared_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of every convolution and linear layer by module path, biases left out."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[name] = module.weight
    return found


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
    if not _reaches(losses[TOTAL], weights):
        return None
    inner = _gradients(torch.stack(list(invariance.values())).sum(), weights)
    if len(classification) > 1:
        losses |= classification
    pairs: dict[str, dict[str, float | None]] = {}
    layers: dict[str, dict[str, float | None]] = {}
    norms = {"invariance": _norm(inner)}
    for name, loss in losses.items():
        outer = _gradients(loss, weights)
        compared = {path: _Sums(outer[path], inner[path]) for path in weights}
        pairs[name] = _Sums.total(compared.values()).record()
        if name == TOTAL:
            norms[TOTAL] = _norm(outer)
            layers = {
                path: {**sums.record(), "entries": sums.entries} for path, sums in compared.items()
            }
    entries = sum(weight.numel() for weight in weights.values())
    compared_entries = sum(
        weights[path].numel() for path, layer in layers.items() if layer["share"] is not None
    )
    return {
        "pairs": pairs,
        "layers": layers,
        "norms": norms,
        "entries": entries,
        "unrelated": 0.5 * compared_entries / entries,
    }


def mean_conflict(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over batches of what :func:`gradient_conflict` returned, and the spread of the totals.

    Args:
        batches: one record or more, of one network.

    Returns:
        The same structure with means of what is not None; the pairs gain "share_std" and
        "cosine_std", standard deviations over the batches, None for one batch; "num_batches".
    """
    first = batches[0]
    pairs: dict[str, dict[str, float | None]] = {}
    for name in first["pairs"]:
        pairs[name] = {}
        for key in ("share", "cosine"):
            values = [b["pairs"][name][key] for b in batches if b["pairs"][name][key] is not None]
            pairs[name][key] = statistics.fmean(values) if values else None
            pairs[name][f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    layers = {}
    for path, record in first["layers"].items():
        layers[path] = {"entries": record["entries"]}
        for key in ("share", "cosine"):
            values = [b["layers"][path][key] for b in batches if b["layers"][path][key] is not None]
            layers[path][key] = statistics.fmean(values) if values else None
    norms = {name: statistics.fmean(b["norms"][name] for b in batches) for name in first["norms"]}
    return {
        "pairs": pairs,
        "layers": layers,
        "norms": norms,
        "entries": first["entries"],
        "unrelated": statistics.fmean(b["unrelated"] for b in batches),
        "num_batches": len(batches),
    }


class _Sums:
    """What share and cosine of two gradients are made of; sums over layers give the total."""

    def __init__(self, outer: Tensor | None = None, inner: Tensor | None = None) -> None:
        self.entries = self.opposite = 0
        self.dot = self.outer = self.inner = 0.0
        if outer is not None and inner is not None:
            self.entries = outer.numel()
            self.opposite = int((outer.sign() * inner.sign() < 0).sum())
            a, b = outer.double(), inner.double()
            self.dot, self.outer, self.inner = (
                float(value) for value in ((a * b).sum(), a.square().sum(), b.square().sum())
            )

    @classmethod
    def total(cls, parts: Any) -> _Sums:
        result = cls()
        for part in parts:
            for name, value in vars(part).items():
                setattr(result, name, getattr(result, name) + value)
        return result

    def record(self) -> dict[str, float | None]:
        if self.outer == 0 or self.inner == 0:
            return {"share": None, "cosine": None}
        return {
            "share": self.opposite / self.entries,
            "cosine": self.dot / (self.outer**0.5 * self.inner**0.5),
        }


def _reaches(loss: Tensor, weights: Mapping[str, Tensor]) -> bool:
    """Whether the loss depends on any of the weights."""
    found = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in found)


def _gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(
        loss, list(weights.values()), retain_graph=True, materialize_grads=True
    )
    return dict(zip(weights, gradients, strict=True))


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return float(sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5)
