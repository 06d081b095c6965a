"""Triton implementation of the cross-entropy and its gradient."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are pointers and values of Triton, which have no Python type.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.implementation import refuse_second_derivative, warps, wide_dtype
from arat_kernels.layout import aligned
from arat_kernels.offsets import start_of


@triton.jit(do_not_specialize=["target_ptr", "num", "num_classes", "row_stride"])
def cross_entropy_grad_kernel(
    logits_ptr,  # (num, num_classes) any float, rows row_stride apart
    target_ptr,  # (num,) int64 or int32
    dlogits_ptr,  # (num, num_classes) as logits, contiguous
    loss_ptr,  # (num,) WIDE
    num: tl.int32,
    num_classes: tl.int32,
    row_stride: tl.int64,
    ALIGNED: tl.constexpr,  # num_classes and row_stride are multiples of 16
    ONE_BLOCK: tl.constexpr,  # a row fits into a tile and stays in registers
    WIDE: tl.constexpr,  # float32, float64 for float64 logits
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    if ALIGNED:
        num_classes = num_classes // 16 * 16
        row_stride = row_stride // 16 * 16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num
    target = tl.load(target_ptr + row, row_mask, other=0).to(tl.int64)
    known = (target >= 0) & (target < num_classes)
    source = start_of(row, row_stride)
    result = start_of(row, num_classes)
    kind = dlogits_ptr.dtype.element_ty
    if ONE_BLOCK:
        col = tl.arange(0, COLS)
        mask = row_mask[:, None] & (col < num_classes)[None, :]
        at = source[:, None] + col[None, :]
        logits = tl.load(logits_ptr + at, mask, other=float("-inf")).to(WIDE)
        # Rows past the end hold nothing but -inf, whose difference would be NaN.
        peak = tl.where(row_mask, tl.max(logits, 1), 0.0)
        shifted = logits - peak[:, None]
        total = tl.log(tl.sum(tl.exp(shifted), 1))
        hit = col[None, :] == target[:, None]
        chosen = tl.sum(tl.where(hit, shifted, 0.0), 1)
        dlogits = tl.exp(shifted - total[:, None]) - hit.to(WIDE)
        dlogits = tl.where(known[:, None], dlogits, float("nan"))
        tl.store(dlogits_ptr + result[:, None] + col[None, :], dlogits.to(kind), mask)
    else:
        peak = tl.full((ROWS,), float("-inf"), WIDE)
        for start in range(0, num_classes, COLS):
            col = start + tl.arange(0, COLS)
            mask = row_mask[:, None] & (col < num_classes)[None, :]
            at = source[:, None] + col[None, :]
            logits = tl.load(logits_ptr + at, mask, other=float("-inf")).to(WIDE)
            peak = tl.maximum(peak, tl.max(logits, 1))
        peak = tl.where(row_mask, peak, 0.0)
        sums = tl.zeros((ROWS, COLS), WIDE)
        picked = tl.zeros((ROWS, COLS), WIDE)
        for start in range(0, num_classes, COLS):
            col = start + tl.arange(0, COLS)
            mask = row_mask[:, None] & (col < num_classes)[None, :]
            at = source[:, None] + col[None, :]
            logits = tl.load(logits_ptr + at, mask, other=float("-inf")).to(WIDE)
            shifted = logits - peak[:, None]
            sums += tl.exp(shifted)
            picked += tl.where(col[None, :] == target[:, None], shifted, 0.0)
        total = tl.log(tl.sum(sums, 1))
        chosen = tl.sum(picked, 1)
        for start in range(0, num_classes, COLS):
            col = start + tl.arange(0, COLS)
            mask = row_mask[:, None] & (col < num_classes)[None, :]
            at = source[:, None] + col[None, :]
            logits = tl.load(logits_ptr + at, mask, other=float("-inf")).to(WIDE)
            hit = col[None, :] == target[:, None]
            dlogits = tl.exp(logits - peak[:, None] - total[:, None]) - hit.to(WIDE)
            dlogits = tl.where(known[:, None], dlogits, float("nan"))
            tl.store(dlogits_ptr + result[:, None] + col[None, :], dlogits.to(kind), mask)
    tl.store(loss_ptr + row, tl.where(known, total - chosen, float("nan")), row_mask)


@triton.jit(do_not_specialize=["num", "num_classes", "row_stride"])
def cross_entropy_grad_weighted_kernel(
    logits_ptr,  # (num, num_classes) any float, rows row_stride apart
    target_ptr,  # (num, num_classes) any float, contiguous
    dlogits_ptr,  # (num, num_classes) as logits, contiguous
    loss_ptr,  # (num,) WIDE
    num: tl.int32,
    num_classes: tl.int32,
    row_stride: tl.int64,
    ALIGNED: tl.constexpr,  # num_classes and row_stride are multiples of 16
    WIDE: tl.constexpr,  # float32, float64 for float64 logits
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    if ALIGNED:
        num_classes = num_classes // 16 * 16
        row_stride = row_stride // 16 * 16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num
    source = start_of(row, row_stride)
    result = start_of(row, num_classes)
    kind = dlogits_ptr.dtype.element_ty
    peak = tl.full((ROWS,), float("-inf"), WIDE)
    for start in range(0, num_classes, COLS):
        col = start + tl.arange(0, COLS)
        mask = row_mask[:, None] & (col < num_classes)[None, :]
        at = source[:, None] + col[None, :]
        logits = tl.load(logits_ptr + at, mask, other=float("-inf")).to(WIDE)
        peak = tl.maximum(peak, tl.max(logits, 1))
    # Rows past the end hold nothing but -inf, whose difference would be NaN.
    peak = tl.where(row_mask, peak, 0.0)
    sums = tl.zeros((ROWS, COLS), WIDE)
    weights = tl.zeros((ROWS, COLS), WIDE)
    weighed = tl.zeros((ROWS, COLS), WIDE)
    for start in range(0, num_classes, COLS):
        col = start + tl.arange(0, COLS)
        mask = row_mask[:, None] & (col < num_classes)[None, :]
        at = source[:, None] + col[None, :]
        shifted = tl.load(logits_ptr + at, mask, other=float("-inf")).to(WIDE) - peak[:, None]
        place = result[:, None] + col[None, :]
        target = tl.load(target_ptr + place, mask, other=0.0).to(WIDE)
        sums += tl.exp(shifted)
        weights += target
        weighed += tl.where(mask, target * shifted, 0.0)
    total = tl.log(tl.sum(sums, 1))
    weight = tl.sum(weights, 1)
    for start in range(0, num_classes, COLS):
        col = start + tl.arange(0, COLS)
        mask = row_mask[:, None] & (col < num_classes)[None, :]
        at = source[:, None] + col[None, :]
        logits = tl.load(logits_ptr + at, mask, other=float("-inf")).to(WIDE)
        place = result[:, None] + col[None, :]
        target = tl.load(target_ptr + place, mask, other=0.0).to(WIDE)
        probability = tl.exp(logits - peak[:, None] - total[:, None])
        dlogits = probability * weight[:, None] - target
        tl.store(dlogits_ptr + place, dlogits.to(kind), mask)
    tl.store(loss_ptr + row, weight * total - tl.sum(weighed, 1), row_mask)


# Rows and columns of a tile and its warps: a row is read once up to 4096 classes, longer rows loop
# over LOOP_TILE. Ten classes take 20 bytes in 16 bits, which no vector of 16 bytes fits. Every
# access of an odd row has a mask of its own, and two of 1024 are too many for sm_80's registers.
TILES = ((32, 16, 4), (8, 128, 4), (2, 1024, 4), (1, 4096, 8))
ODD_TILES = (*TILES[:2], (1, 1024, 4), TILES[3])
LOOP_TILE = (1, 1024, 4)


def _tile(num_classes: int, all_of_16: bool) -> tuple[int, int, int, bool]:
    """Rows, columns and warps of a tile, and whether it holds whole rows."""
    for rows, cols, num_warps in TILES if all_of_16 else ODD_TILES:
        if num_classes <= cols:
            return rows, cols, num_warps, True
    return *LOOP_TILE, False


@torch.library.custom_op("arat_kernels::cross_entropy_grad", mutates_args=())
def forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as in
    :func:`arat_kernels.cross_entropy_grad.api.cross_entropy_grad`."""
    num, num_classes = logits.shape
    logits = aligned(logits if logits.stride(1) == 1 else logits.contiguous())
    dlogits, loss = _results(logits)
    if num == 0:
        return dlogits, loss
    all_of_16 = num_classes % 16 == 0 and logits.stride(0) % 16 == 0
    rows, cols, num_warps, one_block = _tile(num_classes, all_of_16)
    with torch.cuda.device_of(logits):
        cross_entropy_grad_kernel[(triton.cdiv(num, rows),)](
            logits,
            target.long().contiguous(),
            dlogits,
            loss,
            num,
            num_classes,
            logits.stride(0),
            all_of_16,
            one_block,
            tl.float64 if logits.dtype == torch.float64 else tl.float32,
            rows,
            cols,
            num_warps=warps(num_warps),
        )
    return dlogits, loss


@torch.library.custom_op("arat_kernels::cross_entropy_grad_weighted", mutates_args=())
def forward_weighted(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`forward`, with weights of the classes."""
    num, num_classes = logits.shape
    logits = aligned(logits if logits.stride(1) == 1 else logits.contiguous())
    dlogits, loss = _results(logits)
    if num == 0:
        return dlogits, loss
    all_of_16 = num_classes % 16 == 0 and logits.stride(0) % 16 == 0
    rows, cols, num_warps, _ = _tile(min(num_classes, LOOP_TILE[1]), all_of_16)
    # Three sums a row are held in registers.
    rows = max(rows // 2, 1)
    with torch.cuda.device_of(logits):
        cross_entropy_grad_weighted_kernel[(triton.cdiv(num, rows),)](
            logits,
            aligned(target.contiguous()),
            dlogits,
            loss,
            num,
            num_classes,
            logits.stride(0),
            all_of_16,
            tl.float64 if logits.dtype == torch.float64 else tl.float32,
            rows,
            cols,
            num_warps=warps(num_warps),
        )
    return dlogits, loss


@forward_weighted.register_fake
@forward.register_fake
def _results(logits: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return (
        logits.new_empty(logits.shape),
        logits.new_empty(logits.shape[0], dtype=wide_dtype(logits)),
    )


@torch.library.custom_op("arat_kernels::cross_entropy_grad_backward", mutates_args=())
def backward(logits: Tensor, dlogits: Tensor, dloss: Tensor) -> Tensor:
    """The gradient of the losses. It depends on ``logits`` through ``dlogits``, which autograd does
    not know: an operator, so that it can refuse to be differentiated."""
    return (dlogits * dloss[:, None]).to(dlogits.dtype)


refuse_second_derivative(backward)
backward.register_fake(lambda logits, dlogits, dloss: torch.empty_like(dlogits))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    dlogits, _ = output
    ctx.mark_non_differentiable(dlogits)
    ctx.save_for_backward(inputs[0], dlogits)


def _backward(ctx: Any, _: Tensor | None, dloss: Tensor) -> tuple[Tensor, None]:
    return backward(*ctx.saved_tensors, dloss), None


for operator in (forward, forward_weighted):
    operator.register_autograd(_backward, setup_context=_setup_context)
