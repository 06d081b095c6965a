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


@triton.jit
def cross_entropy_grad_kernel(
    logits_ptr,  # (num, num_classes) any float, rows row_stride apart
    target_ptr,  # (num,) int64 or int32
    dlogits_ptr,  # (num, num_classes) as logits, contiguous
    loss_ptr,  # (num,) WIDE
    num,
    num_classes,
    row_stride,
    ONE_BLOCK: tl.constexpr,  # a row fits into a tile and stays in registers
    WIDE: tl.constexpr,  # float32, float64 for float64 logits
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num
    target = tl.load(target_ptr + row, row_mask, other=0).to(tl.int64)
    known = (target >= 0) & (target < num_classes)
    source = row.to(tl.int64) * row_stride
    result = row.to(tl.int64) * num_classes
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


# Rows and columns of a tile and its warps; longer rows loop over LOOP_TILE.
TILES = ((32, 16, 4), (8, 128, 4), (2, 1024, 4), (1, 4096, 8))
LOOP_TILE = (1, 1024, 4)


def _tile(num_classes: int) -> tuple[int, int, int, bool]:
    """Rows, columns and warps of a tile, and whether it holds whole rows."""
    for rows, cols, num_warps in TILES:
        if num_classes <= cols:
            return rows, cols, num_warps, True
    return *LOOP_TILE, False


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _launch(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    num, num_classes = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    dlogits = torch.empty(num, num_classes, dtype=logits.dtype, device=logits.device)
    loss = torch.empty(num, dtype=_wide(logits), device=logits.device)
    if num == 0:
        return dlogits, loss
    rows, cols, num_warps, one_block = _tile(num_classes)
    with torch.cuda.device_of(logits):
        cross_entropy_grad_kernel[(triton.cdiv(num, rows),)](
            logits,
            target.contiguous(),
            dlogits,
            loss,
            num,
            num_classes,
            logits.stride(0),
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
    """Every tile in float32 and bfloat16 for rows that are multiples of 16; and 10 and 100 classes,
    as CIFAR has, in every dtype."""
    tiles = [(*tile, True) for tile in TILES] + [(*LOOP_TILE, False)]
    cases = [
        _case(kind, tile, _tile_name(tile[1], tile[3]), True)
        for tile in tiles
        for kind in ("fp32", "bf16")
    ]
    cases += [
        _case(kind, _tile(num_classes), f"{num_classes} classes", False)
        for num_classes in (10, 100)
        for kind in ("fp32", "bf16", "fp16")
    ]
    return cases


def _case(kind: str, tile: tuple[int, int, int, bool], label: str, aligned: bool) -> AotCase:
    rows, cols, num_warps, one_block = tile
    return AotCase(
        f"cross_entropy_grad_kernel[{kind}, {label}]",
        cross_entropy_grad_kernel,
        {
            "logits_ptr": f"*{kind}",
            "target_ptr": "*i64",
            "dlogits_ptr": f"*{kind}",
            "loss_ptr": "*fp32",
            **dict.fromkeys(("num", "num_classes", "row_stride"), "i32"),
        },
        {"ONE_BLOCK": one_block, "WIDE": tl.float32, "ROWS": rows, "COLS": cols},
        num_warps,
        3,
        "1 read, 1 write" if one_block else "3 reads (the later ones from the L2), 1 write",
        "A row is read once up to 4096 classes; ten classes take 20 bytes of bf16, which no "
        "vector of 16 bytes fits, so their accesses are one element wide.",
        divisible=("logits_ptr", "dlogits_ptr")
        + (("num_classes", "row_stride") if aligned else ()),
        bulk=("logits_ptr", "dlogits_ptr") if cols >= 1024 else (),
    )


def _tile_name(cols: int, one_block: bool) -> str:
    return f"up to {cols} classes" if one_block else f"loop of {cols}"
