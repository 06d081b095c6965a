"""Triton implementation of the cosine distance: one launch in each direction for 11 layers."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are pointers and values of Triton, which have no Python type.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.arrivals import counters, is_last
from arat_kernels.implementation import refuse_second_derivative, warps, wide_dtype
from arat_kernels.layout import aligned
from arat_kernels.offsets import start_of


@triton.jit
def _of_layer(pointers, LAYERS: tl.constexpr):
    """The pointer of this program's layer, out of a tuple."""
    layer = tl.program_id(1)
    pointer = pointers[0]
    for i in tl.static_range(1, LAYERS):
        if layer == i:
            pointer = pointers[i]
    return pointer


@triton.jit
def _width_of_layer(WIDTHS: tl.constexpr, LAYERS: tl.constexpr):
    layer = tl.program_id(1)
    width = layer * 0 + WIDTHS[0]
    for i in tl.static_range(1, LAYERS):
        width = tl.where(layer == i, WIDTHS[i], width)
    return width


@triton.jit
def _tile_of(ptr, base, col, row_mask, width, ALIGNED: tl.constexpr):
    """Pointers into a tile and their mask; the choice of a layer hides from the compiler how both
    are aligned."""
    pointers = ptr + base[:, None] + col[None, :]
    last = width
    if ALIGNED:
        pointers = tl.multiple_of(pointers, (16, 16))
        last = width // 16 * 16
    return pointers, row_mask[:, None] & (col < last)[None, :]


@triton.jit
def _at_least(norm, eps):
    """``norm``, not below ``eps``; NaN stays NaN, which ``tl.maximum`` would drop."""
    return tl.where(norm < eps, eps, norm)


@triton.jit
def _norms_of_rows(
    ptr, base, row_mask, width, ALIGNED: tl.constexpr, WIDE: tl.constexpr, COLS: tl.constexpr
):
    """Norms of rows longer than one tile."""
    squares = tl.zeros((base.shape[0], COLS), WIDE)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        at, mask = _tile_of(ptr, base, col, row_mask, width, ALIGNED)
        value = tl.load(at, mask, other=0.0).to(WIDE)
        squares += value * value
    return tl.sqrt(tl.sum(squares, 1))


@triton.jit
def _cosines_of_rows(
    p_ptr,
    t_ptr,
    base,
    row_mask,
    width,
    p_norm,
    t_norm,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    COLS: tl.constexpr,
):
    """Sums of the products of the normalised rows, longer than one tile."""
    products = tl.zeros((base.shape[0], COLS), WIDE)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        p_at, mask = _tile_of(p_ptr, base, col, row_mask, width, ALIGNED)
        t_at, _ = _tile_of(t_ptr, base, col, row_mask, width, ALIGNED)
        p = tl.load(p_at, mask, other=0.0).to(WIDE) / p_norm[:, None]
        t = tl.load(t_at, mask, other=0.0).to(WIDE) / t_norm[:, None]
        products += p * t
    return tl.sum(products, 1)


@triton.jit(do_not_specialize=["num"])
def cosine_invariance_fwd_kernel(
    predictions,  # LAYERS pointers: (num, WIDTHS[l]) any float, contiguous
    targets,  # LAYERS pointers: (num, WIDTHS[l]) any float, contiguous
    out_ptr,  # (LAYERS,) WIDE
    partial_ptr,  # (LAYERS, programs per layer) WIDE, uninitialised
    counter_ptr,  # (LAYERS,) int32, zero before and after
    num: tl.int32,
    eps,
    LAYERS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ALIGNED: tl.constexpr,  # every width is a multiple of 16
    ONE_BLOCK: tl.constexpr,  # a row fits into a tile and stays in registers
    WIDE: tl.constexpr,  # float32, float64 for float64 predictions
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    p_ptr = _of_layer(predictions, LAYERS)
    t_ptr = _of_layer(targets, LAYERS)
    width = _width_of_layer(WIDTHS, LAYERS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num
    base = start_of(row, width)
    if ONE_BLOCK:
        col = tl.arange(0, COLS)
        p_at, mask = _tile_of(p_ptr, base, col, row_mask, width, ALIGNED)
        t_at, _ = _tile_of(t_ptr, base, col, row_mask, width, ALIGNED)
        p = tl.load(p_at, mask, other=0.0).to(WIDE)
        t = tl.load(t_at, mask, other=0.0).to(WIDE)
        # Normalised before multiplied, as torch does it: no product can overflow.
        p = p / _at_least(tl.sqrt(tl.sum(p * p, 1)), eps)[:, None]
        t = t / _at_least(tl.sqrt(tl.sum(t * t, 1)), eps)[:, None]
        cosine = tl.sum(p * t, 1)
    else:
        p_norm = _at_least(_norms_of_rows(p_ptr, base, row_mask, width, ALIGNED, WIDE, COLS), eps)
        t_norm = _at_least(_norms_of_rows(t_ptr, base, row_mask, width, ALIGNED, WIDE, COLS), eps)
        cosine = _cosines_of_rows(
            p_ptr, t_ptr, base, row_mask, width, p_norm, t_norm, ALIGNED, WIDE, COLS
        )
    total = tl.sum(tl.where(row_mask, 1 - cosine, 0.0))

    # The program that arrives last adds the sums of all programs of its layer, in a fixed order.
    layer = tl.program_id(1)
    programs = tl.num_programs(0)
    tl.store(partial_ptr + layer * programs + tl.program_id(0), total)
    if is_last(counter_ptr + layer, programs):
        sums = tl.zeros((128,), WIDE)
        for start in range(0, programs, 128):
            other = start + tl.arange(0, 128)
            sums += tl.load(
                partial_ptr + layer * programs + other,
                other < programs,
                other=0.0,
                cache_modifier=".cg",
            )
        tl.store(out_ptr + layer, tl.sum(sums) / num)


@triton.jit
def _gradient(p, t, cosine, p_norm, t_norm, eps, factor):
    """Of ``factor * cos`` with respect to p; torch's clamp passes the norm's gradient through, and
    the norm of a zero vector has gradient 0."""
    inverse = 1 / _at_least(p_norm, eps)
    along = tl.where(p_norm == 0, 0.0, cosine * inverse / p_norm)
    direction = t / _at_least(t_norm, eps)[:, None]
    return factor * (direction * inverse[:, None] - p * along[:, None])


@triton.jit(do_not_specialize=["num"])
def cosine_invariance_bwd_kernel(
    predictions,  # LAYERS pointers: (num, WIDTHS[l]) any float, contiguous
    targets,  # LAYERS pointers: (num, WIDTHS[l]) any float, contiguous
    dpredictions,  # LAYERS pointers: as predictions
    dout_ptr,  # (LAYERS,) WIDE
    num: tl.int32,
    eps,
    LAYERS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    p_ptr = _of_layer(predictions, LAYERS)
    t_ptr = _of_layer(targets, LAYERS)
    dp_ptr = _of_layer(dpredictions, LAYERS)
    width = _width_of_layer(WIDTHS, LAYERS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num
    base = start_of(row, width)
    factor = -tl.load(dout_ptr + tl.program_id(1)) / num
    kind = dp_ptr.dtype.element_ty
    if ONE_BLOCK:
        col = tl.arange(0, COLS)
        p_at, mask = _tile_of(p_ptr, base, col, row_mask, width, ALIGNED)
        t_at, _ = _tile_of(t_ptr, base, col, row_mask, width, ALIGNED)
        p = tl.load(p_at, mask, other=0.0).to(WIDE)
        t = tl.load(t_at, mask, other=0.0).to(WIDE)
        p_norm = tl.sqrt(tl.sum(p * p, 1))
        t_norm = tl.sqrt(tl.sum(t * t, 1))
        p_unit = p / _at_least(p_norm, eps)[:, None]
        cosine = tl.sum(p_unit * (t / _at_least(t_norm, eps)[:, None]), 1)
        dp = _gradient(p, t, cosine, p_norm, t_norm, eps, factor)
        dp_at, _ = _tile_of(dp_ptr, base, col, row_mask, width, ALIGNED)
        tl.store(dp_at, dp.to(kind), mask)
    else:
        p_norm = _norms_of_rows(p_ptr, base, row_mask, width, ALIGNED, WIDE, COLS)
        t_norm = _norms_of_rows(t_ptr, base, row_mask, width, ALIGNED, WIDE, COLS)
        cosine = _cosines_of_rows(
            p_ptr,
            t_ptr,
            base,
            row_mask,
            width,
            _at_least(p_norm, eps),
            _at_least(t_norm, eps),
            ALIGNED,
            WIDE,
            COLS,
        )
        for start in range(0, width, COLS):
            col = start + tl.arange(0, COLS)
            p_at, mask = _tile_of(p_ptr, base, col, row_mask, width, ALIGNED)
            t_at, _ = _tile_of(t_ptr, base, col, row_mask, width, ALIGNED)
            p = tl.load(p_at, mask, other=0.0).to(WIDE)
            t = tl.load(t_at, mask, other=0.0).to(WIDE)
            dp = _gradient(p, t, cosine, p_norm, t_norm, eps, factor)
            dp_at, _ = _tile_of(dp_ptr, base, col, row_mask, width, ALIGNED)
            tl.store(dp_at, dp.to(kind), mask)


# Rows and columns of a tile and its warps; rows longer than the last one's loop over a loop tile.
# At 16 elements per thread both tensors of a tile stay in 32 registers, so that a row is read once;
# batch 128 with 512 features has 32 programs per layer.
# Every access of an odd row has a mask of its own, and 16 rows of them are too many on gfx942.
# Two rows of 2048 in float16 spill on sm_80, from 8 warps too, where the layer is one of several.
TILES = ((16, 128, 4), (4, 512, 4), (2, 1024, 4), (1, 2048, 4))
ODD_TILES = ((8, 128, 4), *TILES[1:])
LOOP_TILE = (2, 1024, 4)
# Two odd rows of float16 and float32 are too many on sm_100.
ODD_LOOP_TILE = (1, 1024, 4)


def _tile(widths: tuple[int, ...]) -> tuple[int, int, int, bool]:
    """Rows, columns and warps of a tile, and whether it holds whole rows."""
    all_of_16 = _multiples_of_16(widths)
    for rows, cols, num_warps in TILES if all_of_16 else ODD_TILES:
        if max(widths) <= cols:
            return rows, cols, num_warps, True
    return *(LOOP_TILE if all_of_16 else ODD_LOOP_TILE), False


def _multiples_of_16(widths: tuple[int, ...]) -> bool:
    return all(width % 16 == 0 for width in widths)


# The numbers of layers that a kernel is compiled for: a launch of another number repeats its last
# layer in the pointers, and no program works on the copies.
LAYER_COUNTS = (1, 4, 11)


def _padded(values: list[Any]) -> tuple[Any, ...]:
    """``values`` with the last one repeated, up to a number that kernels are compiled for."""
    count = next(count for count in LAYER_COUNTS if count >= len(values))
    return tuple(values + values[-1:] * (count - len(values)))


def _launches(layers: int) -> list[slice]:
    """The layers of each launch."""
    most = LAYER_COUNTS[-1]
    return [slice(start, start + most) for start in range(0, layers, most)]


def _constants(predictions: list[Tensor]) -> dict[str, Any]:
    """The constants of both kernels and their warps."""
    widths = _padded([t.shape[1] for t in predictions])
    rows, cols, num_warps, one_block = _tile(widths)
    return {
        "LAYERS": len(widths),
        "WIDTHS": widths,
        "ALIGNED": _multiples_of_16(widths),
        "ONE_BLOCK": one_block,
        "WIDE": tl.float64 if predictions[0].dtype == torch.float64 else tl.float32,
        "ROWS": rows,
        "COLS": cols,
        "num_warps": warps(num_warps),
    }


def _forward_part(predictions: list[Tensor], targets: list[Tensor], eps: float) -> Tensor:
    num, layers = predictions[0].shape[0], len(predictions)
    out = predictions[0].new_empty(layers, dtype=wide_dtype(predictions[0]))
    if num == 0:
        # The mean over nothing.
        return out.fill_(torch.nan)
    constants = _constants(predictions)
    programs = triton.cdiv(num, constants["ROWS"])
    with torch.cuda.device_of(out):
        cosine_invariance_fwd_kernel[(programs, layers)](
            _padded([aligned(t.contiguous()) for t in predictions]),
            _padded([aligned(t.contiguous()) for t in targets]),
            out,
            out.new_empty(layers, programs),
            counters.take(out.device, layers),
            num,
            eps,
            **constants,
        )
    return out


def _backward_part(
    dout: Tensor, predictions: list[Tensor], targets: list[Tensor], eps: float
) -> list[Tensor]:
    num, layers = predictions[0].shape[0], len(predictions)
    predictions = [aligned(t.contiguous()) for t in predictions]
    dpredictions = [torch.empty_like(t) for t in predictions]
    if num == 0:
        return dpredictions
    constants = _constants(predictions)
    with torch.cuda.device_of(dout):
        cosine_invariance_bwd_kernel[(triton.cdiv(num, constants["ROWS"]), layers)](
            _padded(predictions),
            _padded([aligned(t.contiguous()) for t in targets]),
            _padded(dpredictions),
            aligned(dout.contiguous()),
            num,
            eps,
            **constants,
        )
    return dpredictions


@torch.library.custom_op("arat_kernels::cosine_invariance", mutates_args=())
def forward(predictions: list[Tensor], targets: list[Tensor], eps: float) -> Tensor:
    """As :func:`arat_kernels.cosine_invariance.api.cosine_invariance`; targets are in the dtype of
    the predictions or wider."""
    parts = _launches(len(predictions))
    distances = [_forward_part(predictions[part], targets[part], eps) for part in parts]
    return distances[0] if len(parts) == 1 else torch.cat(distances)


@forward.register_fake
def _(predictions: list[Tensor], targets: list[Tensor], eps: float) -> Tensor:
    return predictions[0].new_empty(len(predictions), dtype=wide_dtype(predictions[0]))


@torch.library.custom_op("arat_kernels::cosine_invariance_backward", mutates_args=())
def backward(
    dout: Tensor, predictions: list[Tensor], targets: list[Tensor], eps: float
) -> list[Tensor]:
    """The gradients of the predictions."""
    dpredictions = []
    for part in _launches(len(predictions)):
        dpredictions += _backward_part(dout[part], predictions[part], targets[part], eps)
    return dpredictions


refuse_second_derivative(backward)


@backward.register_fake
def _(dout: Tensor, predictions: list[Tensor], targets: list[Tensor], eps: float) -> list[Tensor]:
    return [torch.empty_like(t.contiguous()) for t in predictions]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    predictions, targets, ctx.eps = inputs
    ctx.save_for_backward(*predictions, *targets)


def _backward(ctx: Any, dout: Tensor) -> tuple[list[Tensor], list[None], None]:
    saved = list(ctx.saved_tensors)
    layers = len(saved) // 2
    return backward(dout, saved[:layers], saved[layers:], ctx.eps), [None] * layers, None


forward.register_autograd(_backward, setup_context=_setup_context)
