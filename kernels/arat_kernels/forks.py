"""Tensors with several readers, whose gradients one backward kernel adds.

Where an output feeds a convolution and a skip connection, autograd adds their two gradients in a
pass of its own. The kernels of split BatchNorm and of the frozen affine map take both instead, if
the second reader is given :func:`skip_of` the output, or :func:`around` it the input.
Blocks look for them only where :data:`made` says that there are any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

made = False
"""Whether a kernel of this process has ever given outlets; the reference never does."""


class _Outlets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, node: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.node = node
        ctx.set_materialize_grads(False)
        return y.detach(), y.detach(), x

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dy_skip: Tensor | None, dx_around: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if dy is None:
            dy, dy_skip = dy_skip, None
        # Nothing else reads what the node made: its backward comes next.
        ctx.node.dy_skip, ctx.node.dx_around = dy_skip, dx_around
        return dy, None, None


def with_outlets(y: Tensor, x: Tensor) -> Tensor:
    """``y`` with :func:`skip_of` and :func:`around` it; the node that made it of ``x``, and whose
    output nothing else may read, finds their gradients as its ``dy_skip`` and ``dx_around``."""
    if not y.requires_grad or torch.compiler.is_compiling():
        return y
    global made
    made = True
    main, skip, beside = _Outlets.apply(y, x.detach(), y.grad_fn)  # type: ignore[no-untyped-call]
    main._skip = skip
    if x.requires_grad:
        main._around = beside
    given: Tensor = main
    return given


def skip_of(y: Tensor) -> Tensor:
    """``y`` for its second reader, such as the connection around a block.

    From the kernels, after a ReLU, another tensor with the same memory: the gradient of its readers
    is added inside of the backward of what made ``y``, and is no part of the gradient of ``y``
    itself. Otherwise ``y``.
    """
    return _outlet(y, "_skip", y)


def around(y: Tensor, x: Tensor) -> Tensor:
    """``x`` for its second reader, where the normalisation with ReLU that made ``y`` of it is the
    first; as :func:`skip_of`."""
    return _outlet(y, "_around", x)


def _outlet(y: Tensor, name: str, otherwise: Tensor) -> Tensor:
    # torch.fx traces with what is no tensor and has every attribute, Dynamo sees no attributes.
    if torch.compiler.is_compiling():
        return otherwise
    found: Tensor = vars(y).get(name, otherwise)
    return found
