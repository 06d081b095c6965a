"""Tensors with several readers, whose gradients one backward kernel adds.

Where an output feeds a convolution and a skip connection, autograd adds their two gradients in a
pass of its own. The kernels of split BatchNorm and of the frozen affine map take both instead, if
the second reader is given :func:`skip_of` the output, or :func:`around` it the input. A projection
that reads every second pixel goes through :func:`read_by`, and has a gradient of those alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

made = False
"""Whether kernels that give outlets have run in this process; the reference never gives any."""


class _Outlets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, node: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.node, ctx.shape = node, y.shape
        ctx.set_materialize_grads(False)
        return y.detach(), y.detach(), few_of(y), x

    @staticmethod
    def backward(
        ctx: Any,
        dy: Tensor | None,
        dy_skip: Tensor | None,
        dy_few: Tensor | None,
        dx_around: Tensor | None,
    ) -> tuple[Tensor | None, None, None]:
        dy, dy_skip = gradients(ctx.shape, dy, dy_skip, dy_few)
        # Nothing else reads what the node made: its backward comes next.
        ctx.node.dy_skip, ctx.node.dx_around = dy_skip, dx_around
        return dy, None, None


def with_outlets(y: Tensor, x: Tensor) -> Tensor:
    """``y`` with :func:`skip_of` and :func:`around` it; the node that made it of ``x``, and whose
    output nothing else may read, finds their gradients as its ``dy_skip`` and ``dx_around``."""
    if torch.compiler.is_compiling():
        return y
    global made
    made = True
    if not y.requires_grad:
        return y
    main, skip, few, beside = _Outlets.apply(y, x.detach(), y.grad_fn)  # type: ignore[no-untyped-call]
    main._skip, main._few = skip, few
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


def reads_few(conv: Any) -> bool:
    """Whether a convolution reads every second pixel both ways and no other."""
    return (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (2, 2), (0, 0))


def is_bare(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of a layer is the forward of ``kind`` and nothing else."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    hooked = hooked or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is kind and not hooked


def read_by(conv: Any, y: Tensor) -> Tensor:
    """``conv(skip_of(y))``; where ``conv`` is a convolution that :func:`reads_few`, the gradient is
    no larger."""
    # Of other widths the backward of split BatchNorm spills.
    if is_bare(conv, nn.Conv2d) and reads_few(conv) and conv.in_channels % 16 == 0:
        return of_few(conv, y)
    out: Tensor = conv(skip_of(y))
    return out


def of_few(conv: Any, y: Tensor) -> Tensor:
    """:func:`read_by` for what computes as a convolution with its ``weight`` that
    :func:`reads_few`."""
    few = every_second(y)
    if few is y:
        out: Tensor = conv(y)
        return out
    read: Tensor = _OfFew.apply(conv(y.detach()), few, conv.weight)  # type: ignore[no-untyped-call]
    return read


def every_second(y: Tensor) -> Tensor:
    """As :func:`skip_of`, of every second pixel both ways, where that is not ``y``."""
    return _outlet(y, "_few", y)


def few_of(y: Tensor) -> Tensor:
    """Every second pixel, both ways, without a gradient."""
    return y.detach()[..., ::2, ::2]


class _OfFew(torch.autograd.Function):
    """What a 1x1 convolution made of some pixels."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, few: Tensor, weight: Tensor) -> Tensor:
        ctx.shape = few.shape
        ctx.save_for_backward(weight)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        weight = ctx.saved_tensors[0].to(dout.dtype)
        # The pixels are not read, but the gradient would not be dense where they are not.
        few = _empty(dout, ctx.shape)
        groups = few.shape[1] // weight.shape[1]
        geometry = (1, 1), (0, 0), (1, 1), False, (0, 0), groups, (True, False, False)
        dfew, _, _ = torch.ops.aten.convolution_backward(dout, few, weight, None, *geometry)
        return dout, dfew, None


def gradients(
    shape: torch.Size, dy: Tensor | None, dy_skip: Tensor | None, few: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of a tensor of ``shape`` and a second one, dense or of every second pixel, from
    those of its readers."""
    if few is not None and (dy is None or dy_skip is not None):
        few = spread(few, shape)
        few = few if dy_skip is None else few + dy_skip
    dy_skip = dy_skip if few is None else few
    return (dy_skip, None) if dy is None else (dy, dy_skip)


def size_of_few(dy: Tensor, dy_skip: Tensor | None) -> tuple[int | None, int | None]:
    """Height and width of ``dy`` where ``dy_skip`` has every second pixel of it."""
    if dy_skip is None or dy_skip.shape == dy.shape:
        return None, None
    return dy.shape[2], dy.shape[3]


def spread(few: Tensor, shape: torch.Size) -> Tensor:
    """Zeros of ``shape`` with the pixels of ``few`` in their places."""
    dense = _empty(few, shape).zero_()
    dense[:, :, ::2, ::2] = few
    return dense


def _empty(like: Tensor, shape: torch.Size) -> Tensor:
    layout = torch.channels_last
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
