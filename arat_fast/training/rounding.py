"""Weights of matrix products in the precision of the step, all rounded at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from arat_fast.distributed.gradients import in_buckets
from arat_fast.objectives.predictor import PredictorStack

# Subclasses may do more with a weight than multiply by it.
_PRODUCTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("weight", "bias"),
    nn.Linear: ("weight", "bias"),
    PredictorStack: ("weight1", "weight2", "bias2"),
}


@contextmanager
def rounded_weights(
    modules: Iterable[nn.Module], dtype: torch.dtype, *, by_bucket: bool = False
) -> Iterator[None]:
    """Let convolutions and linear layers inside the context read weights rounded to ``dtype``.

    Autocast rounds each by a launch of its own, and each gradient by another; here all are rounded
    together, to the same bits, and so are their gradients. The parameters stay as they are, and get
    the gradients: only the attribute ``weight`` is another tensor.

    Args:
        modules: networks and what else holds such layers; their parameters must not change
            meanwhile.
        dtype: of the matrix products, torch.bfloat16.
        by_bucket: together are those that travel together between processes
            (:data:`arat_fast.distributed.gradients.BUCKET_BYTES`), so that the first gradients can
            leave while the backward pass still runs.
    """
    places: dict[nn.Parameter, list[tuple[dict[str, Any], str]]] = {}
    for module in {part: None for whole in modules for part in whole.modules()}:
        for name in _PRODUCTS.get(type(module), ()):
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.dtype == torch.float32:
                places.setdefault(parameter, []).append((vars(module), name))
    for trained in (True, False):
        found = [p for p in places if p.requires_grad is trained]
        for bucket in in_buckets(found) if by_bucket else [found]:
            copies: tuple[Tensor, ...] = _Rounded.apply(dtype, *bucket)  # type: ignore[no-untyped-call]
            for parameter, copy in zip(bucket, copies, strict=True):
                for attributes, name in places[parameter]:
                    attributes[name] = copy
    try:
        yield
    finally:
        for attributes, name in (place for each in places.values() for place in each):
            del attributes[name]


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """The parameters themselves for a while, inside of :func:`rounded_weights`: for what runs
    ``model`` without autocast."""
    places = [(vars(m), name) for m in model.modules() for name in _PRODUCTS.get(type(m), ())]
    taken = [(own, name, own.pop(name)) for own, name in places if name in own]
    try:
        yield
    finally:
        for attributes, name, copy in taken:
            attributes[name] = copy


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_converted(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = iter(_converted([grad for grad in grads if grad is not None], torch.float32))
        return None, *(None if grad is None else next(wide) for grad in grads)


def _converted(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    given = list(tensors)
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in given]
    if given:
        torch._foreach_copy_(results, given)
    return results
