"""Triton implementation of the affine map with constants and of the ReLU backward."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are pointers and values of Triton, which have no Python type.

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.arrivals import after_the_launch_before, dependence
from arat_kernels.forks import size_of_few, spread, with_outlets
from arat_kernels.implementation import refuse_second_derivative, warps, wide_dtype
from arat_kernels.layout import aligned, batch_dense, in_layout_of
from arat_kernels.offsets import load_second_gradient, start_of

# Integers are not specialised on their value; ALIGNED says whether cols is a multiple of 16.
_PLAIN = ["rows", "cols", "channels", "height", "width"]


@triton.jit
def _tile(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """First row, rows and columns of this program's tile, 64-bit offsets and the mask."""
    col_blocks = tl.cdiv(cols, COLS)
    # Neighbouring programs share the rows, so that whole rows are in flight together.
    first = start_of(tl.program_id(0) // col_blocks, ROWS)
    row = first + tl.arange(0, ROWS)
    col = (tl.program_id(0) % col_blocks) * COLS + tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    return first, col, start_of(row, cols)[:, None] + col[None, :], mask


@triton.jit
def _constants(ptr, first, col, cols, channels, BY_ROW: tl.constexpr, ROWS: tl.constexpr):
    """The tile's constants, one per row or one per column, ready to broadcast."""
    if BY_ROW:
        # One 64-bit division for the tile; those of its rows are 32 bits wide.
        channel = ((first % channels).to(tl.int32) + tl.arange(0, ROWS)) % channels
        return tl.load(ptr + channel)[:, None]
    else:
        return tl.load(ptr + col, col < cols, other=0.0)[None, :]


@triton.jit
def _bits(bits_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where the bits of this program's tile are: in one piece, eight to a byte."""
    size: tl.constexpr = ROWS * COLS // 8
    return bits_ptr + start_of(tl.program_id(0), size) + tl.arange(0, size)


@triton.jit(do_not_specialize=_PLAIN)
def frozen_affine_fwd_kernel(
    x_ptr,  # (rows, cols), any float; (NHW, C) for channels_last, (NC, HW) for contiguous
    addend_ptr,  # (rows, cols) as x, or None
    sum_ptr,  # (rows, cols) as x: x + addend, or None
    scale_ptr,  # (channels,) any float, or None
    shift_ptr,  # (channels,) any float
    residual_ptr,  # (rows, cols) as x, or None
    y_ptr,  # (rows, cols) as x
    bits_ptr,  # (programs, ROWS * COLS / 8) uint8: 1 where ReLU lets the gradient through; or None
    rows: tl.int64,
    cols: tl.int32,
    channels: tl.int32,
    DEPENDENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_ROW: tl.constexpr,  # contiguous: the channel is the row modulo channels, else the column
    RELU: tl.constexpr,
    WIDE: tl.constexpr,  # float32, float64 for float64 x
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    after_the_launch_before(DEPENDENT)
    if ALIGNED:
        cols = cols // 16 * 16
    first, col, at, mask = _tile(rows, cols, ROWS, COLS)
    y = tl.load(x_ptr + at, mask).to(WIDE)
    if addend_ptr is not None:
        # Rounded as it is stored: that is what the backward and other readers see.
        x = (y + tl.load(addend_ptr + at, mask).to(WIDE)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, x, mask)
        y = x.to(WIDE)
    if scale_ptr is not None:
        y = y * _constants(scale_ptr, first, col, cols, channels, BY_ROW, ROWS).to(WIDE)
    y = y + _constants(shift_ptr, first, col, cols, channels, BY_ROW, ROWS).to(WIDE)
    if residual_ptr is not None:
        y = y + tl.load(residual_ptr + at, mask).to(WIDE)
    # The gradient is masked by the output that is stored.
    y = y.to(y_ptr.dtype.element_ty)
    if RELU:
        # NaN stays NaN, as in torch.relu.
        stopped = y.to(WIDE) <= 0
        y = tl.where(stopped, 0.0, y)
        if bits_ptr is not None:
            bits = tl.reshape(tl.where(stopped, 0, 1), (ROWS * COLS // 8, 8))
            packed = tl.sum(bits << tl.arange(0, 8)[None, :], axis=1)
            tl.store(_bits(bits_ptr, ROWS, COLS), packed.to(tl.uint8))
    tl.store(y_ptr + at, y, mask)


@triton.jit(do_not_specialize=_PLAIN)
def frozen_affine_bwd_kernel(
    dy_ptr,  # (rows, cols), any float, as in the forward
    dy_skip_ptr,  # as dy, a second gradient of y, or one of every second pixel; or None
    dx_around_ptr,  # (rows, cols) as dy, a second gradient of x, or None
    y_ptr,  # (rows, cols) as dy, the saved output, or None: the bits, or no ReLU
    bits_ptr,  # (programs, ROWS * COLS / 8) uint8, as in the forward, or None
    scale_ptr,  # (channels,) any float, or None
    dx_ptr,  # (rows, cols) as dy, or None where not wanted
    dresidual_ptr,  # (rows, cols) as dy, or None where not wanted
    height,  # int32, of an image, where dy_skip has every second pixel; or None
    width,  # int32 or None
    rows: tl.int64,
    cols: tl.int32,
    channels: tl.int32,
    DEPENDENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_ROW: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    after_the_launch_before(DEPENDENT)
    if ALIGNED:
        cols = cols // 16 * 16
    first, col, at, mask = _tile(rows, cols, ROWS, COLS)
    grad = tl.load(dy_ptr + at, mask).to(WIDE)
    if dy_skip_ptr is not None:
        r = tl.arange(0, ROWS)
        second = load_second_gradient(dy_skip_ptr, at, mask, first, r, col, cols, height, width)
        grad = grad + second.to(WIDE)
    if y_ptr is not None:
        grad = tl.where(tl.load(y_ptr + at, mask).to(WIDE) <= 0, 0.0, grad)
    if bits_ptr is not None:
        packed = tl.load(_bits(bits_ptr, ROWS, COLS)).to(tl.int32)
        bits = (packed[:, None] >> tl.arange(0, 8)[None, :]) & 1
        grad = tl.where(tl.reshape(bits, (ROWS, COLS)) != 0, grad, 0.0)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + at, grad.to(dresidual_ptr.dtype.element_ty), mask)
    if dx_ptr is not None:
        if scale_ptr is not None:
            grad = grad * _constants(scale_ptr, first, col, cols, channels, BY_ROW, ROWS).to(WIDE)
        if dx_around_ptr is not None:
            grad = grad + tl.load(dx_around_ptr + at, mask).to(WIDE)
        tl.store(dx_ptr + at, grad.to(dx_ptr.dtype.element_ty), mask)


# A tile keeps two (16 bits) or four (float32) vectors of 16 bytes per thread and tensor in flight.
# It is as wide as divides the row, at most 64: that fills the 128-byte lines in 16 bits, and the
# constants of a tile are loaded once for all its rows.
TILE, NUM_WARPS = 4096, 8
# Widths of a tile, from the one for the most regular rows down.
COLS_CHOICES = (64, 32, 16)


def _constant(constant: Tensor | None, x: Tensor) -> Tensor | None:
    """``constant`` as the kernels read it, in the dtype they compute in."""
    return None if constant is None else aligned(constant.to(wide_dtype(x)).contiguous())


def _cols_of_tile(cols: int) -> int:
    """The widest choice that divides the row; for odd rows, the one that wastes least."""
    for choice in COLS_CHOICES:
        if cols % choice == 0:
            return choice
    return 16 if cols < 16 else 64


def _geometry(t: Tensor) -> tuple[int, int, bool]:
    """Rows, columns and whether the channel belongs to the row, for a dense (N, C, ...)."""
    num, channels = t.shape[:2]
    inner = math.prod(t.shape[2:])
    if inner > 1 and t.is_contiguous():
        return num * channels, inner, True
    return num * inner, channels, False


def _cut(t: Tensor, rows: int, cols: int, by_row: bool) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and sizes and constants of both kernels."""
    tile = _cols_of_tile(cols)
    return (triton.cdiv(rows, TILE // tile) * triton.cdiv(cols, tile),), {
        "rows": rows,
        "cols": cols,
        "channels": t.shape[1],
        "ALIGNED": cols % 16 == 0,
        "BY_ROW": by_row,
        "WIDE": tl.float64 if t.dtype == torch.float64 else tl.float32,
        "ROWS": TILE // tile,
        "COLS": tile,
        "num_warps": warps(NUM_WARPS),
        **dependence(),
    }


@torch.library.custom_op("arat_kernels::frozen_affine", mutates_args=())
def forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    addend: Tensor | None,
    save_bits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as in :mod:`arat_kernels.frozen_affine.api`; the result, ``x + addend`` and ReLU's
    bits, the last two empty where they are not wanted."""
    x = aligned(batch_dense(x))
    y, summed, bits = _forward_results(x, addend, save_bits)
    if x.numel() == 0:
        return y, summed, bits
    grid, sizes = _cut(x, *_geometry(x))
    with torch.cuda.device_of(x):
        frozen_affine_fwd_kernel[grid](
            x,
            None if addend is None else in_layout_of(addend, x),
            None if addend is None else summed,
            _constant(scale, x),
            _constant(shift, x),
            None if residual is None else in_layout_of(residual, x),
            y,
            bits if save_bits else None,
            RELU=relu,
            **sizes,
        )
    return y, summed, bits


def _forward_results(
    x: Tensor, addend: Tensor | None, save_bits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(batch_dense(x))
    (programs,), _ = _cut(y, *_geometry(y))
    bits = y.new_empty((programs if save_bits else 0, TILE // 8), dtype=torch.uint8)
    return y, y.new_empty(0) if addend is None else torch.empty_like(y), bits


forward.register_fake(lambda *given: _forward_results(given[0], *given[5:]))


@torch.library.custom_op("arat_kernels::frozen_affine_backward", mutates_args=())
def backward(
    dy: Tensor,
    dy_skip: Tensor | None,
    dx_around: Tensor | None,
    y: Tensor | None,
    scale: Tensor | None,
    needs_dx: bool,
    needs_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    """``(dx, dresidual)``; one that is not needed is empty. ``dy_skip``, dense or of every second
    pixel, is added to ``dy``, ``dx_around`` to ``dx``. ``y`` is the output, or the bits of one that
    lies as ``dy`` does."""
    has_bits = y is not None and y.dtype == torch.uint8
    model = aligned(batch_dense(dy if y is None or has_bits else y))
    dx, dresidual = _backward_results(dy, dy_skip, dx_around, y, scale, needs_dx, needs_dresidual)
    if model.numel() == 0:
        return dx, dresidual
    rows, cols, by_row = _geometry(model)
    if dy_skip is not None and size_of_few(model, dy_skip)[0]:
        if by_row:
            dy_skip = spread(dy_skip, model.shape)
        else:
            dy_skip = aligned(dy_skip.contiguous(memory_format=torch.channels_last))
    few = size_of_few(model, dy_skip)
    if scale is None and few[0] is None:
        # No constants, so it does not matter where rows are cut: full tiles for every width.
        by_row = False
        if model.numel() % COLS_CHOICES[-1] == 0:
            rows, cols = model.numel() // COLS_CHOICES[-1], COLS_CHOICES[-1]
    grid, sizes = _cut(model, rows, cols, by_row)
    with torch.cuda.device_of(model):
        frozen_affine_bwd_kernel[grid](
            in_layout_of(dy, model),
            dy_skip if few[0] else None if dy_skip is None else in_layout_of(dy_skip, model),
            None if dx_around is None else in_layout_of(dx_around, model),
            None if y is None or has_bits else model,
            y if has_bits else None,
            _constant(scale, model),
            dx if needs_dx else None,
            dresidual if needs_dresidual else None,
            *few,
            **sizes,
        )
    return dx, dresidual


refuse_second_derivative(backward)


@backward.register_fake
def _backward_results(
    dy: Tensor,
    dy_skip: Tensor | None,
    dx_around: Tensor | None,
    y: Tensor | None,
    scale: Tensor | None,
    needs_dx: bool,
    needs_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    model = batch_dense(dy if y is None or y.dtype == torch.uint8 else y)
    return (
        torch.empty_like(model) if needs_dx else model.new_empty(0),
        torch.empty_like(model) if needs_dresidual else model.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scale, relu, addend, save_bits = inputs[1], *inputs[4:]
    y, _, bits = output
    ctx.has_sum = addend is not None
    ctx.layout = torch.contiguous_format if y.is_contiguous() else torch.channels_last
    ctx.save_for_backward(bits if save_bits else y if relu else None, scale)
    ctx.set_materialize_grads(False)
    ctx.dy_skip = ctx.dx_around = None


def _backward(
    ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    y, scale = ctx.saved_tensors
    dy_skip, dx_around = ctx.dy_skip, dsum if ctx.has_sum else ctx.dx_around
    ctx.dy_skip = ctx.dx_around = None
    if dy is None:
        if dx_around is None:
            return (None,) * 7
        dy = torch.zeros_like(dx_around)
    needs_dx, _, _, needs_dresidual, _, needs_daddend, _ = ctx.needs_input_grad
    if scale is None:
        grad = dy if y is None else backward(dy, None, None, y, None, True, False)[0]
        given = grad if needs_dresidual else None
        return grad if needs_dx else None, None, None, given, None, None, None
    dx, dresidual = None, dy if needs_dresidual else None
    wants_masked = needs_dresidual and y is not None
    wants_dx = needs_dx or needs_daddend
    if wants_dx or wants_masked:
        dy = dy.contiguous(memory_format=ctx.layout)
        dx, masked = backward(dy, dy_skip, dx_around, y, scale, wants_dx, wants_masked)
        dresidual = masked if wants_masked else dresidual
    return (
        dx if needs_dx else None,
        None,
        None,
        dresidual,
        None,
        dx if needs_daddend else None,
        None,
    )


forward.register_autograd(_backward, setup_context=_setup_context)


def frozen_affine_triton(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result, and ``x + addend``, of which another reader takes
    :func:`arat_kernels.forks.around`; ``x`` without one."""
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, residual, addend)
    )
    save_bits = differentiable and relu and scale is not None
    y, summed, _ = forward(x, scale, shift, residual, relu, addend, save_bits)
    summed = x if addend is None else summed
    return with_outlets(y, summed) if relu and scale is not None else y, summed
