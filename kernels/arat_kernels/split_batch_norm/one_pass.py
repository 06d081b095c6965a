"""Split BatchNorm in one launch each way, which reads x and dy once; no GPU has run it yet.

A program keeps consecutive rows of one branch and a block of channels in registers, leaves their
partial results, waits for all programs that share the channels, and goes on with what it has kept.
The grid is launched as a cooperative one, so that all its programs are resident. Channels that do
not fit beside each other take turns.

:func:`arat_kernels.implementation.experimental` turns it on.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# Arguments of kernels are pointers and values of Triton, which have no Python type; a tuple grows.

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.arrivals import barrier, counters
from arat_kernels.forks import size_of_few
from arat_kernels.implementation import interpreting, refuse_second_derivative, wide_dtype
from arat_kernels.layout import all_aligned
from arat_kernels.offsets import load_second_gradient, start_of
from arat_kernels.split_batch_norm.device import (
    COMBINED_BYTES,
    affine_of,
    like,
    load_bits,
    merged,
    partial_of,
    programs_of,
    store_bits,
    store_statistics,
    unpacked,
)

_ASSEMBLY = tl.constexpr(not interpreting())
_PLAIN = ["channels", "clean_rows", "rows", "peers", "turns", "height", "width"]


@triton.jit
def _share(turn, rank, clean_rows, rows, channels, KEPT_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Branch, its number of rows and block of channels of a turn; the first row (64 bits) that the
    program of a rank keeps, how many (none below 1), and the offset of the first element."""
    blocks = channels // BLOCK_C
    adv = (turn >= blocks) | (clean_rows == 0)
    begin = tl.where(adv, clean_rows, 0)
    total = tl.where(adv, rows, clean_rows) - begin
    before = start_of(rank, KEPT_R)
    first, block = begin + before, turn % blocks
    count = tl.minimum(total - before, KEPT_R).to(tl.int32)
    return adv.to(tl.int32), total, block, first, count, start_of(first, channels) + block * BLOCK_C


@triton.jit
def _again(x, zero):
    """``x`` as it was loaded, two numbers of 16 bits to a register.

    ``zero`` is a number that the compiler does not know. Otherwise it would keep what it has made
    of ``x`` before the barrier, in twice the registers.
    """
    if _ASSEMBLY and x.dtype.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, $2;",
            "=r,r,r",
            [x, tl.full(x.shape, 0, tl.int16) + zero.to(tl.int16)],
            dtype=x.dtype,
            is_pure=True,
            pack=2,
        )
    return x


@triton.jit(
    do_not_specialize=[
        *_PLAIN, "momentum", "eps", "running_mean_ptr", "running_var_ptr", "tracked_ptr"
    ]
)  # fmt: skip
def split_batch_norm_fwd_one_pass_kernel(
    x_ptr,  # (rows, C) any float
    residual_ptr,  # (rows, C) as x, or None
    partial_ptr,  # (turns, peers, 2, BLOCK_C) accumulator dtype: mean and centred sum of squares
    counter_ptr,  # (turns, 2) int32, zero before and after
    mean_ptr,  # (2, C) accumulator dtype
    var_ptr,  # (2, C) accumulator dtype, biased
    running_mean_ptr,  # (2, C) any float, or None: not updated
    running_var_ptr,  # (2, C) any float, or None
    tracked_ptr,  # (2,) int64, batches that were counted, or None
    weight_ptr,  # (2, C) any float, or None
    bias_ptr,  # (2, C) any float, or None
    y_ptr,  # (rows, C) as x
    mask_ptr,  # (rows, C / 8) uint8, or None: bit is set where ReLU lets the gradient through
    channels: tl.int32,
    clean_rows: tl.int64,
    rows: tl.int64,
    peers: tl.int32,  # programs that share a turn
    turns: tl.int32,  # branches by blocks of channels
    momentum: tl.float32,
    eps: tl.float32,
    RELU: tl.constexpr,
    TILES: tl.constexpr,  # that a program keeps
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    acc = partial_ptr.dtype.element_ty
    channels = channels // 16 * 16
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    c_ok = tl.full((BLOCK_C,), 1, tl.int1)
    rank = tl.program_id(0) % peers
    for turn in range(tl.program_id(0) // peers, turns, tl.num_programs(0) // peers):
        branch, total, block, first, count, start = _share(
            turn, rank, clean_rows, rows, channels, TILES * BLOCK_R, BLOCK_C
        )
        local = r[:, None] * channels + c[None, :]
        ok = (r < count)[:, None]
        x = tl.load(x_ptr + start + local, mask=ok, other=0.0)
        kept = (x,)
        # As in the kernel of the statistics: around the mean of the first tile.
        shift = tl.sum(x.to(acc), axis=0) / tl.minimum(tl.maximum(count, 1), BLOCK_R).to(acc)
        d = tl.where(ok, x.to(acc) - shift[None, :], 0.0)
        sums = d
        squares = d * d
        for i in tl.static_range(1, TILES):
            ok = (r < count - i * BLOCK_R)[:, None]
            x = tl.load(x_ptr + start + start_of(channels, i * BLOCK_R) + local, mask=ok, other=0.0)
            kept = kept + (x,)  # noqa: RUF005  # Triton knows no other way
            d = tl.where(ok, x.to(acc) - shift[None, :], 0.0)
            sums += d
            squares += d * d
        of_rows = tl.sum(sums, axis=0)
        offset = of_rows / tl.maximum(count, 1).to(acc)
        m2 = tl.sum(squares, axis=0) - of_rows * offset
        m2 = tl.where(m2 < 0.0, 0.0, m2)
        partials = partial_ptr + start_of(peers, 2 * BLOCK_C) * turn
        tl.store(partials + rank * (2 * BLOCK_C) + c, shift + offset)
        tl.store(partials + rank * (2 * BLOCK_C) + BLOCK_C + c, m2)

        zero = barrier(counter_ptr + 2 * turn, peers)
        number = tl.cdiv(total, TILES * BLOCK_R)
        mean, combined = merged(
            partials, number, total, TILES * BLOCK_R, BLOCK_C, c, c_ok, BLOCK_S, BLOCK_C
        )
        of_block = block * BLOCK_C + c
        if rank == 0:
            store_statistics(
                mean,
                combined,
                total,
                rows,
                branch,
                block * BLOCK_C,
                channels,
                of_block,
                c_ok,
                mean_ptr,
                var_ptr,
                running_mean_ptr,
                running_var_ptr,
                tracked_ptr,
                momentum,
            )
        row = branch * channels + of_block
        scale = 1.0 / tl.sqrt(combined / total.to(acc) + eps)
        if weight_ptr is not None:
            scale = scale * tl.load(weight_ptr + row).to(acc)
        bias = tl.zeros_like(mean)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + row).to(acc)
        # Made again, not kept across the barrier.
        count += zero
        local = (r + zero)[:, None] * channels + c[None, :]
        for i in tl.static_range(TILES):
            inside = r < count - i * BLOCK_R
            ok = inside[:, None]
            at = start + start_of(channels, i * BLOCK_R) + local
            z = (_again(kept[i], zero).to(acc) - mean[None, :]) * scale[None, :] + bias[None, :]
            if residual_ptr is not None:
                z += tl.load(residual_ptr + at, mask=ok, other=0.0).to(acc)
            if RELU:
                stopped = z <= 0.0
                z = tl.where(stopped, 0.0, z)
                if mask_ptr is not None:
                    at_row = first + i * BLOCK_R
                    store_bits(mask_ptr, stopped, at_row, inside, block, channels, BLOCK_R, BLOCK_C)
            tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=[*_PLAIN, "eps"])
def split_batch_norm_bwd_one_pass_kernel(
    dy_ptr,  # (rows, C) as x
    dy_skip_ptr,  # (rows, C) as x, a second gradient of y, or None; or one of every second pixel
    dx_around_ptr,  # (rows, C) as x, a second gradient of x, or None
    x_ptr,  # (rows, C) any float
    mean_ptr,  # (2, C) float32, or float64 for a float64 x
    var_ptr,  # (2, C) as mean
    weight_ptr,  # (2, C) any float, or None
    bias_ptr,  # (2, C) any float, or None
    mask_ptr,  # (rows, C / 8) uint8, or None: ReLU, if any, is computed again from x
    partial_ptr,  # (turns, peers, 2, BLOCK_C) as mean: sums of g, before ReLU, of g * xhat
    counter_ptr,  # (turns, 2) int32, zero before and after
    sums_ptr,  # (2, 2, C) as mean: both sums, each per branch
    dx_ptr,  # (rows, C) as x
    dresidual_ptr,  # (rows, C) as dy, or None: both gradients where ReLU lets them through
    channels: tl.int32,
    clean_rows: tl.int64,
    rows: tl.int64,
    peers: tl.int32,  # programs that share a turn
    turns: tl.int32,  # branches by blocks of channels
    height,  # int32, of an image, where dy_skip has every second pixel; or None
    width,  # int32 or None
    eps: tl.float32,
    RELU: tl.constexpr,
    TILES: tl.constexpr,  # of x and as many of dy that a program keeps
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    acc = partial_ptr.dtype.element_ty
    channels = channels // 16 * 16
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    c_ok = tl.full((BLOCK_C,), 1, tl.int1)
    rank = tl.program_id(0) % peers
    for turn in range(tl.program_id(0) // peers, turns, tl.num_programs(0) // peers):
        branch, total, block, first, count, start = _share(
            turn, rank, clean_rows, rows, channels, TILES * BLOCK_R, BLOCK_C
        )
        local = r[:, None] * channels + c[None, :]
        row = branch * channels + block * BLOCK_C + c
        mean, rstd, scale, bias = affine_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, row, c_ok, eps)
        kept_x = ()
        kept_g = ()
        sum_g = tl.zeros((BLOCK_R, BLOCK_C), acc)
        sum_gx = tl.zeros((BLOCK_R, BLOCK_C), acc)
        for i in tl.static_range(TILES):
            inside = r < count - i * BLOCK_R
            ok = inside[:, None]
            at = start + start_of(channels, i * BLOCK_R) + local
            x = tl.load(x_ptr + at, mask=ok, other=0.0)
            g = tl.load(dy_ptr + at, mask=ok, other=0.0).to(acc)
            if dy_skip_ptr is not None:
                second = load_second_gradient(
                    dy_skip_ptr,
                    at,
                    ok,
                    first,
                    i * BLOCK_R + r,
                    block * BLOCK_C + c,
                    channels,
                    height,
                    width,
                )
                g += second.to(acc)
            d = x.to(acc) - mean[None, :]
            if mask_ptr is not None:
                at_row = first + i * BLOCK_R
                bits = load_bits(mask_ptr, at_row, inside, block, channels, BLOCK_R, BLOCK_C)
                g = tl.where(unpacked(bits, BLOCK_R, BLOCK_C), g, 0.0)
            elif RELU:
                g = tl.where(d * scale[None, :] + bias[None, :] <= 0.0, 0.0, g)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + at, g.to(dresidual_ptr.dtype.element_ty), mask=ok)
            kept_x = kept_x + (x,)  # noqa: RUF005  # Triton knows no other way
            # The second number of the grid is 0, which the compiler does not know.
            kept_g = kept_g + (_again(g.to(x.dtype), tl.program_id(1)),)  # noqa: RUF005
            sum_g += g
            sum_gx += g * d
        partials = partial_ptr + start_of(peers, 2 * BLOCK_C) * turn
        tl.store(partials + rank * (2 * BLOCK_C) + c, tl.sum(sum_g, axis=0))
        tl.store(partials + rank * (2 * BLOCK_C) + BLOCK_C + c, tl.sum(sum_gx, axis=0) * rstd)

        zero = barrier(counter_ptr + 2 * turn, peers)
        s = tl.arange(0, BLOCK_S)
        total_g = tl.zeros((BLOCK_S, BLOCK_C), acc)
        total_gx = tl.zeros((BLOCK_S, BLOCK_C), acc)
        for k in tl.range(0, peers, BLOCK_S):
            which = (k + s).to(tl.int64)
            there = (which < peers)[:, None] & c_ok[None, :]
            total_g += partial_of(partials, 0, which, there, BLOCK_C, c, 2)
            total_gx += partial_of(partials, 1, which, there, BLOCK_C, c, 2)
        of_g = tl.sum(total_g, axis=0)
        of_gx = tl.sum(total_gx, axis=0)
        row += zero
        if rank == 0:
            tl.store(sums_ptr + row, of_g)
            tl.store(sums_ptr + 2 * channels + row, of_gx)
            if total == rows:
                # The other branch has no samples, and no turn.
                other = (1 - branch) * channels + block * BLOCK_C + c
                tl.store(sums_ptr + other, tl.zeros_like(of_g))
                tl.store(sums_ptr + 2 * channels + other, tl.zeros_like(of_g))
        # Made again, not kept across the barrier.
        mean, rstd, scale, _ = affine_of(mean_ptr, var_ptr, weight_ptr, None, row, c_ok, eps)
        mean_g = of_g / total.to(acc)
        slope = of_gx / total.to(acc) * rstd
        count += zero
        local = (r + zero)[:, None] * channels + c[None, :]
        for i in tl.static_range(TILES):
            ok = (r < count - i * BLOCK_R)[:, None]
            at = start + start_of(channels, i * BLOCK_R) + local
            d = _again(kept_x[i], zero).to(acc) - mean[None, :]
            g = _again(kept_g[i], zero).to(acc) - mean_g[None, :] - d * slope[None, :]
            g = g * scale[None, :]
            if dx_around_ptr is not None:
                g += tl.load(dx_around_ptr + at, mask=ok, other=0.0).to(acc)
            tl.store(dx_ptr + at, g.to(dx_ptr.dtype.element_ty), mask=ok)


# Tiles that a program keeps, one program a multiprocessor, whose threads have 255 registers each:
# at most 96 and 2 x 32 KiB. With more, some spill (tests/kernels/aot).
_TILES = {"forward": (4, 8, 12, 16, 20, 24), "backward": (2, 4, 6, 8)}
_TILE_BYTES = 4096
_NUM_WARPS = 8
# Turns of 8 channels share what memory gives at once, 32 bytes; backward they would spill.
_BLOCK_C = {"forward": (64, 32, 16, 8), "backward": (64, 32, 16)}


@dataclass(frozen=True)
class _Cut:
    """How a launch shares out a tensor; ``integers`` in the order of the kernels' arguments."""

    turns: int
    peers: int
    grid: tuple[int]
    integers: tuple[int, ...]
    constants: dict[str, Any]

    def combining(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for partial results of the dtype of ``wide``, and the counters."""
        shape = (self.turns, self.peers, 2, self.constants["BLOCK_C"])
        return wide.new_empty(shape), counters.take(wide.device, 2 * self.turns)


def _cut(x: Tensor, clean: int, which: Literal["forward", "backward"]) -> _Cut | None:
    """All turns at once, if programs suffice, else the widest blocks of channels whose rows fit;
    as few tiles a program as that needs."""
    n, channels, height, width = x.shape
    area, programs = height * width, programs_of(x, 1)
    rows = max(clean, n - clean) * area
    for at_once, block_c, tiles in product((True, False), _BLOCK_C[which], _TILES[which]):
        block_r = _TILE_BYTES // x.element_size() // block_c
        peers = triton.cdiv(rows, tiles * block_r)
        turns = channels // block_c * (2 if 0 < clean < n else 1)
        if channels % block_c == 0 and peers * (turns if at_once else 1) <= programs:
            return _Cut(
                turns,
                peers,
                (peers * min(turns, programs // peers),),
                (channels, clean * area, n * area, peers, turns),
                {
                    "TILES": tiles,
                    "BLOCK_R": block_r,
                    "BLOCK_C": block_c,
                    "BLOCK_S": COMBINED_BYTES // wide_dtype(x).itemsize // block_c,
                    "num_warps": _NUM_WARPS,
                    # Else the compiler spills to make room for a second program.
                    "maxnreg": 255,
                    "launch_cooperative_grid": True,
                },
            )
    return None


def fits(x: Tensor, clean: int, which: Literal["forward", "backward"]) -> bool:
    """Whether registers hold what is kept of (N, C, H, W), and channels are a multiple of 16; not
    on AMD's cards, whose assembly is another."""
    known = torch.version.hip is None and x.shape[1] % 16 == 0
    return known and _cut(x, clean, which) is not None


@torch.library.custom_op(
    "arat_kernels::split_batch_norm_one_pass",
    mutates_args=("running_mean", "running_var", "tracked"),
)
def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    clean: int,
    momentum: float,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, ReLU's bits or nothing, and mean and biased variance, (2, C), of ``x``; moves the running
    ones and counts the batch of each branch if they are given."""
    y, mask, mean, var = _results(x, save_mask)
    cut = _cut(x, clean, "forward")
    assert cut is not None
    with torch.cuda.device_of(x):
        split_batch_norm_fwd_one_pass_kernel[cut.grid](
            *all_aligned(x, residual),
            *cut.combining(mean),
            mean,
            var,
            running_mean,
            running_var,
            tracked,
            *all_aligned(weight, bias),
            y,
            mask if save_mask else None,
            *cut.integers,
            momentum,
            eps,
            RELU=relu,
            **cut.constants,
        )
    return y, mask, mean, var


def _results(x: Tensor, save_mask: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, channels, height, width = x.shape
    mask_shape = (n * height * width, channels // 8) if save_mask else (0, 0)
    mean = x.new_empty((2, channels), dtype=wide_dtype(x))
    return like(x), x.new_empty(mask_shape, dtype=torch.uint8), mean, torch.empty_like(mean)


forward.register_fake(lambda *given: _results(given[0], given[11]))


@torch.library.custom_op("arat_kernels::split_batch_norm_one_pass_backward", mutates_args=())
def backward(
    dy: Tensor,
    dy_skip: Tensor | None,
    dx_around: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    clean: int,
    eps: float,
    relu: bool,
    want_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of bias and weight (2, 2, C), and ``dy`` where ReLU lets it through, or
    nothing. ``dy_skip``, dense or of every second pixel, is added to ``dy``, ``dx_around`` to the
    gradient of x."""
    dx, sums, dresidual = _gradients(x, mean, want_dresidual)
    cut = _cut(x, clean, "backward")
    assert cut is not None
    with torch.cuda.device_of(x):
        split_batch_norm_bwd_one_pass_kernel[cut.grid](
            *all_aligned(dy, dy_skip, dx_around, x, mean, var, weight, bias),
            mask,
            *cut.combining(mean),
            sums,
            dx,
            dresidual if want_dresidual else None,
            *cut.integers,
            *size_of_few(x, dy_skip),
            eps,
            RELU=relu,
            **cut.constants,
        )
    return dx, sums, dresidual


def _gradients(x: Tensor, mean: Tensor, want_dresidual: bool) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), mean.new_empty((2, *mean.shape)), like(x, want_dresidual)


backward.register_fake(lambda *given: _gradients(given[3], given[4], given[12]))
refuse_second_derivative(backward)
