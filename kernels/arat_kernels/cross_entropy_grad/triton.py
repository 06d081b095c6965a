"""Triton implementation of the cross-entropy and its gradient."""

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


# Rows and columns of a tile and its warps; longer rows loop over LOOP_TILE. Every access of an odd
# row has a mask of its own, and two of 1024 are too many for sm_80's registers.
TILES = ((32, 16, 4), (8, 128, 4), (2, 1024, 4), (1, 4096, 8))
ODD_TILES = (*TILES[:2], (1, 1024, 4), TILES[3])
LOOP_TILE = (1, 1024, 4)


def _tile(num_classes: int, all_of_16: bool) -> tuple[int, int, int, bool]:
    """Rows, columns and warps of a tile, and whether it holds whole rows."""
    for rows, cols, num_warps in TILES if all_of_16 else ODD_TILES:
        if num_classes <= cols:
            return rows, cols, num_warps, True
    return *LOOP_TILE, False


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _launch(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    num, num_classes = logits.shape
    logits = aligned(logits if logits.stride(1) == 1 else logits.contiguous())
    dlogits = torch.empty(num, num_classes, dtype=logits.dtype, device=logits.device)
    loss = torch.empty(num, dtype=_wide(logits), device=logits.device)
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


@torch.library.custom_op("arat_kernels::cross_entropy_grad", mutates_args=())
def _cross_entropy_grad_op(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _launch(logits, target)


@_cross_entropy_grad_op.register_fake
def _(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=_wide(logits))
    return logits.new_empty(logits.shape), loss


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    dlogits, _ = output
    ctx.mark_non_differentiable(dlogits)
    ctx.save_for_backward(dlogits)


def _backward(ctx: Any, _: Tensor | None, dloss: Tensor) -> tuple[Tensor, None]:
    (dlogits,) = ctx.saved_tensors
    return (dlogits * dloss[:, None]).to(dlogits.dtype), None


_cross_entropy_grad_op.register_autograd(_backward, setup_context=_setup_context)


def cross_entropy_grad_triton(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as in
    :func:`arat_kernels.cross_entropy_grad.api.cross_entropy_grad`."""
    dlogits, loss = _cross_entropy_grad_op(logits, target)
    return dlogits, loss


def aot_cases() -> list[AotCase]:
    """Every tile in every dtype, for rows that are multiples of 16 and for others, as 10, 100 and
    1000 classes are; float64 at 10 classes alone."""
    cases = []
    for num_classes in (16, 128, 1024, 4096, 8192, 10, 100, 1000, 4095, 8191):
        for kind in ("fp32", "bf16", "fp16"):
            cases.append(_case(kind, num_classes))
    cases.append(_case("fp64", 10))
    return cases


def _case(kind: str, num_classes: int) -> AotCase:
    all_of_16 = num_classes % 16 == 0
    rows, cols, num_warps, one_block = _tile(num_classes, all_of_16)
    label = f"up to {cols} classes" if one_block else f"loop of {cols}"
    label += "" if all_of_16 else ", odd numbers"
    wide = "fp64" if kind == "fp64" else "fp32"
    return AotCase(
        f"cross_entropy_grad_kernel[{kind}, {label}]",
        cross_entropy_grad_kernel,
        {
            "logits_ptr": f"*{kind}",
            "target_ptr": "*i64",
            "dlogits_ptr": f"*{kind}",
            "loss_ptr": f"*{wide}",
            "num": "i32",
            "num_classes": "i32",
            "row_stride": "i64",
        },
        {
            "ALIGNED": all_of_16,
            "ONE_BLOCK": one_block,
            "WIDE": tl.float64 if wide == "fp64" else tl.float32,
            "ROWS": rows,
            "COLS": cols,
        },
        num_warps,
        3,
        "1 read, 1 write" if one_block else "3 reads (the later ones from the L2), 1 write",
        "A row is read once up to 4096 classes; ten classes take 20 bytes of bf16, which no "
        "vector of 16 bytes fits, so their accesses are one element wide.",
        bulk=("logits_ptr", "dlogits_ptr") if all_of_16 and cols >= 1024 else (),
    )
