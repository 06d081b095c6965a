"""Triton implementation of the affine map with constants and of the ReLU backward."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are pointers and values of Triton, which have no Python type.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.aot import AotCase
from arat_kernels.implementation import warps
from arat_kernels.layout import in_layout_of, is_batch_dense


@triton.jit
def _tile(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """First row, rows and columns of this program's tile, 64-bit offsets and the mask."""
    col_blocks = tl.cdiv(cols, COLS)
    # Neighbouring programs share the rows, so that whole rows are in flight together.
    first = (tl.program_id(0) // col_blocks).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    col = (tl.program_id(0) % col_blocks) * COLS + tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    return first, col, row[:, None] * cols + col[None, :], mask


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
def frozen_affine_fwd_kernel(
    x_ptr,  # (rows, cols), any float; (NHW, C) for channels_last, (NC, HW) for contiguous
    scale_ptr,  # (channels,) any float, or None
    shift_ptr,  # (channels,) any float
    residual_ptr,  # (rows, cols) as x, or None
    y_ptr,  # (rows, cols) as x
    rows,
    cols,
    channels,
    BY_ROW: tl.constexpr,  # contiguous: the channel is the row modulo channels, else the column
    RELU: tl.constexpr,
    WIDE: tl.constexpr,  # float32, float64 for float64 x
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    first, col, at, mask = _tile(rows, cols, ROWS, COLS)
    y = tl.load(x_ptr + at, mask).to(WIDE)
    if scale_ptr is not None:
        y = y * _constants(scale_ptr, first, col, cols, channels, BY_ROW, ROWS).to(WIDE)
    y = y + _constants(shift_ptr, first, col, cols, channels, BY_ROW, ROWS).to(WIDE)
    if residual_ptr is not None:
        y = y + tl.load(residual_ptr + at, mask).to(WIDE)
    if RELU:
        # NaN stays NaN, as in torch.relu.
        y = tl.where(y <= 0, 0.0, y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def frozen_affine_bwd_kernel(
    dy_ptr,  # (rows, cols), any float, as in the forward
    dy_skip_ptr,  # (rows, cols) as dy, a second gradient of y, or None
    y_ptr,  # (rows, cols) as dy, the saved output, or None without ReLU
    scale_ptr,  # (channels,) any float, or None
    dx_ptr,  # (rows, cols) as dy, or None where not wanted
    dresidual_ptr,  # (rows, cols) as dy, or None where not wanted
    rows,
    cols,
    channels,
    BY_ROW: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    first, col, at, mask = _tile(rows, cols, ROWS, COLS)
    grad = tl.load(dy_ptr + at, mask).to(WIDE)
    if dy_skip_ptr is not None:
        grad = grad + tl.load(dy_skip_ptr + at, mask).to(WIDE)
    if y_ptr is not None:
        grad = tl.where(tl.load(y_ptr + at, mask).to(WIDE) <= 0, 0.0, grad)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + at, grad.to(dresidual_ptr.dtype.element_ty), mask)
    if dx_ptr is not None:
        if scale_ptr is not None:
            grad = grad * _constants(scale_ptr, first, col, cols, channels, BY_ROW, ROWS).to(WIDE)
        tl.store(dx_ptr + at, grad.to(dx_ptr.dtype.element_ty), mask)


TILE, NUM_WARPS = 4096, 8
# Widths of a tile, from the one for the most regular rows down.
COLS_CHOICES = (64, 32, 16)
_TL_WIDE = {torch.float64: tl.float64}


def _cols_of_tile(cols: int) -> int:
    """The widest choice that divides the row; for odd rows, the one that wastes least."""
    for choice in COLS_CHOICES:
        if cols % choice == 0:
            return choice
    return 16 if cols < 16 else 64


def _geometry(t: Tensor) -> tuple[int, int, bool]:
    """Rows, columns and whether the channel belongs to the row, for a dense (N, C, ...)."""
    num, channels = t.shape[:2]
    inner = t[0, 0].numel()
    if inner > 1 and t.is_contiguous():
        return num * channels, inner, True
    return num * inner, channels, False


def _grid(rows: int, cols: int, cols_of_tile: int) -> tuple[int]:
    return (triton.cdiv(rows, TILE // cols_of_tile) * triton.cdiv(cols, cols_of_tile),)


def _launch_forward(
    x: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    x = x if is_batch_dense(x) else x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    residual = None if residual is None else in_layout_of(residual, x)
    rows, cols, by_row = _geometry(x)
    tile = _cols_of_tile(cols)
    with torch.cuda.device_of(x):
        frozen_affine_fwd_kernel[_grid(rows, cols, tile)](
            x,
            None if scale is None else scale.contiguous(),
            shift.contiguous(),
            residual,
            y,
            rows,
            cols,
            x.shape[1],
            by_row,
            relu,
            _TL_WIDE.get(x.dtype, tl.float32),
            TILE // tile,
            tile,
            num_warps=warps(NUM_WARPS),
        )
    return y


def _launch_backward(
    dy: Tensor,
    dy_skip: Tensor | None,
    y: Tensor | None,
    scale: Tensor | None,
    needs_dx: bool,
    needs_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    """``(dx, dresidual)``; one that is not needed is empty."""
    model = dy if y is None else y
    model = model if is_batch_dense(model) else model.contiguous()
    y = None if y is None else model
    dx = torch.empty_like(model) if needs_dx else model.new_empty(0)
    dresidual = torch.empty_like(model) if needs_dresidual else model.new_empty(0)
    if model.numel() == 0:
        return dx, dresidual
    rows, cols, by_row = _geometry(model)
    if scale is None and model.numel() % COLS_CHOICES[-1] == 0:
        # No constants, so the rows may be cut anywhere: full tiles for every width.
        cols = _cols_of_tile(model.numel())
        rows, by_row = model.numel() // cols, False
    tile = _cols_of_tile(cols)
    with torch.cuda.device_of(model):
        frozen_affine_bwd_kernel[_grid(rows, cols, tile)](
            in_layout_of(dy, model),
            None if dy_skip is None else in_layout_of(dy_skip, model),
            y,
            None if scale is None else scale.contiguous(),
            dx if needs_dx else None,
            dresidual if needs_dresidual else None,
            rows,
            cols,
            1 if scale is None else model.shape[1],
            by_row,
            _TL_WIDE.get(model.dtype, tl.float32),
            TILE // tile,
            tile,
            num_warps=warps(NUM_WARPS),
        )
    return dx, dresidual


@torch.library.custom_op("arat_kernels::frozen_affine", mutates_args=())
def _forward_op(
    x: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    return _launch_forward(x, scale, shift, residual, relu)


@_forward_op.register_fake
def _(
    x: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    return torch.empty_like(x if is_batch_dense(x) else x.contiguous())


@torch.library.custom_op("arat_kernels::frozen_affine_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    dy_skip: Tensor | None,
    y: Tensor | None,
    scale: Tensor | None,
    needs_dx: bool,
    needs_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    return _launch_backward(dy, dy_skip, y, scale, needs_dx, needs_dresidual)


@_backward_op.register_fake
def _(
    dy: Tensor,
    dy_skip: Tensor | None,
    y: Tensor | None,
    scale: Tensor | None,
    needs_dx: bool,
    needs_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    model = dy if y is None else y
    model = model if is_batch_dense(model) else model.contiguous()
    return (
        torch.empty_like(model) if needs_dx else model.new_empty(0),
        torch.empty_like(model) if needs_dresidual else model.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, scale, _, _, relu = inputs
    ctx.save_for_backward(output if relu else None, scale)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    y, scale = ctx.saved_tensors
    needs_dx, _, _, needs_dresidual, _ = ctx.needs_input_grad
    if scale is None:
        grad = dy if y is None else _backward_op(dy, None, y, None, True, False)[0]
        return grad if needs_dx else None, None, None, grad if needs_dresidual else None, None
    dx, dresidual = None, dy if needs_dresidual else None
    wants_masked = needs_dresidual and y is not None
    if needs_dx or wants_masked:
        dx, masked = _backward_op(dy, None, y, scale, needs_dx, wants_masked)
        dresidual = masked if wants_masked else dresidual
    return dx if needs_dx else None, None, None, dresidual, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def frozen_affine_triton(
    x: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """Arguments and results as in :func:`arat_kernels.frozen_affine.api.frozen_affine`."""
    y: Tensor = _forward_op(x, scale, shift, residual, relu)
    return y


def relu_backward_triton(dy: Tensor, y: Tensor, dy_skip: Tensor | None) -> Tensor:
    """Arguments and results as in :func:`arat_kernels.frozen_affine.api.relu_backward`."""
    grad: Tensor = _backward_op(dy, dy_skip, y, None, True, False)[0]
    return grad


def aot_cases() -> list[AotCase]:
    """Every tile, dtype and layout with every option on, and every set of options at one tile."""
    note = (
        "Tiles of 4096 elements keep two (bf16) or four (float32) vectors of 16 bytes per thread "
        "and tensor in flight. A tile is as wide as divides the row, at most 64: that fills the "
        "128-byte lines in bf16 and the constants of a tile are loaded once for all its rows."
    )
    every = (True, True, True)
    cases = []
    shapes = [(t, b, kind) for t in COLS_CHOICES for b in (False, True) for kind in _KINDS]
    for tile, by_row, kind in shapes:
        cases.append(_forward_case(tile, by_row, kind, every, note))
        cases.append(_backward_case(tile, by_row, kind, (False, True, True, True, True), note))
    flags = [(scale, res, relu) for scale in (1, 0) for res in (1, 0) for relu in (1, 0)]
    for scale, res, relu in flags[1:]:
        options = (bool(scale), bool(res), bool(relu))
        cases.append(_forward_case(64, False, "bf16", options, note))
    for skip, y, scale, dx, dresidual in (
        (False, True, True, True, False),
        (False, True, True, False, True),
        (False, False, True, True, False),
        (False, True, False, True, False),
        (True, True, False, True, False),
    ):
        cases.append(_backward_case(64, False, "bf16", (skip, y, scale, dx, dresidual), note))
    return cases


_KINDS = ("bf16", "fp16", "fp32")


def _case(
    kernel: Any,
    tile: int,
    by_row: bool,
    kind: str,
    tensors: dict[str, bool],
    constants: dict[str, bool],
    constexprs: dict[str, Any],
    note: str,
) -> AotCase:
    used = [name for name, there in tensors.items() if there]
    absent = [name for name, there in {**tensors, **constants}.items() if not there]
    held = [name for name, there in constants.items() if there]
    flags = [name.lower() for name, on in constexprs.items() if on]
    options = ", ".join([*(name.removesuffix("_ptr") for name in used + held), *flags])
    layout = "contiguous" if by_row else "channels_last"
    reads = [n for n in used if n not in ("y_ptr", "dx_ptr", "dresidual_ptr")]
    if kernel is frozen_affine_bwd_kernel and "y_ptr" in used:
        reads.append("y_ptr")
    writes = [n for n in used if n not in reads]
    return AotCase(
        f"{kernel.__name__}[{kind}, {layout}, {tile} wide: {options}]",
        kernel,
        {
            **{name: f"*{kind}" for name in used},
            **{name: "*fp32" for name in held},
            **dict.fromkeys(("rows", "cols", "channels"), "i32"),
        },
        {
            **dict.fromkeys(absent),
            "BY_ROW": by_row,
            "WIDE": tl.float32,
            "ROWS": TILE // tile,
            "COLS": tile,
            **constexprs,
        },
        NUM_WARPS,
        3,
        f"1 read each of {_names(reads)}, 1 write each of {_names(writes)}",
        note,
        divisible=(*used, *held, "cols", "channels"),
        bulk=tuple(used),
    )


def _names(pointers: list[str]) -> str:
    return " and ".join(name.removesuffix("_ptr") for name in pointers)


def _forward_case(
    tile: int, by_row: bool, kind: str, options: tuple[bool, bool, bool], note: str
) -> AotCase:
    scale, residual, relu = options
    return _case(
        frozen_affine_fwd_kernel,
        tile,
        by_row,
        kind,
        {"x_ptr": True, "residual_ptr": residual, "y_ptr": True},
        {"scale_ptr": scale, "shift_ptr": True},
        {"RELU": relu},
        note,
    )


def _backward_case(
    tile: int, by_row: bool, kind: str, options: tuple[bool, bool, bool, bool, bool], note: str
) -> AotCase:
    skip, y, scale, dx, dresidual = options
    return _case(
        frozen_affine_bwd_kernel,
        tile,
        by_row,
        kind,
        {
            "dy_ptr": True,
            "dy_skip_ptr": skip,
            "y_ptr": y,
            "dx_ptr": dx,
            "dresidual_ptr": dresidual,
        },
        {"scale_ptr": scale},
        {},
        note,
    )
