"""Triton kernels of split BatchNorm, their operators and their gradients.

All tensors (N, C, H, W) are channels_last here: in memory a matrix of rows = N*H*W by C. The rows
of the clean branch come first. Each program works on one *segment* (consecutive rows of one branch)
and one block of channels; where the pooled feature is wanted a segment is one sample.

Forward in training: statistics (one read of x), normalise (one read of x and of the residual, one
write, one bit per element for the backward). Backward: sums (one read of dy and x, one write of the
residual's gradient), input (one read of the masked dy and of x, one write of dx). Statistics and
sums leave partial results per segment, which the program that arrives last combines.

A residual that another layer normalises first comes as that layer's x with its statistics and
parameters: the passes above then normalise both.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are pointers and values of Triton, which have no Python type.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.arrivals import after_the_launch_before, counters, dependence, is_last
from arat_kernels.forks import size_of_few, with_outlets
from arat_kernels.implementation import (
    is_enabled,
    refuse_second_derivative,
    registers,
    warps,
    wide_dtype,
)
from arat_kernels.layout import all_aligned
from arat_kernels.offsets import load_second_gradient, start_of
from arat_kernels.split_batch_norm import one_pass
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
from arat_kernels.split_batch_norm.distributed import (
    gather_statistics,
    move_running_statistics,
    sum_over_group,
)

# Integer arguments are not specialised on their value, so that the launch table below is all there
# is to compile; that channels are a multiple of 16 is said by ALIGNED.
_PLAIN = ["channels", "clean_rows", "rows", "clean_segments", "segment_rows", "height", "width"]


@triton.jit
def _tile(channels, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """What a program works on: the channels with their alignment, its segment, its block of
    channels, the tile's rows and channels, which channels exist, and offsets from the first row."""
    if ALIGNED:
        channels = channels // 16 * 16
    blocks = tl.cdiv(channels, BLOCK_C)
    segment = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    r = tl.arange(0, BLOCK_R)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return channels, segment, block, r, c, c < channels, r[:, None] * channels + c[None, :]


@triton.jit
def segment_of(segment, clean_rows, rows, clean_segments, segment_rows):
    """Branch, first row (64 bits) and number of rows of a segment; none crosses the branches."""
    segment = segment.to(tl.int64)
    adv = segment >= clean_segments
    first = tl.where(
        adv, clean_rows + (segment - clean_segments) * segment_rows, segment * segment_rows
    )
    end = tl.where(adv, rows, clean_rows)
    count = tl.minimum(end - first, segment_rows).to(tl.int32)
    return adv.to(tl.int32), first, count


@triton.jit
def _last_of_branch(counter_ptr, branch, block, channels, clean_segments, BLOCK_C: tl.constexpr):
    """Whether this program is the last on its branch and block of channels; the branch's first
    segment and their number."""
    blocks = tl.cdiv(channels, BLOCK_C)
    adv = branch == 1
    number = tl.where(adv, tl.num_programs(0) // blocks - clean_segments, clean_segments)
    last = is_last(counter_ptr + branch * blocks + block, number)
    return last, tl.where(adv, clean_segments, 0), number


@triton.jit
def _summand(x_ptr, addend_ptr, sum_ptr, at, ok, acc: tl.constexpr):
    """A tile of x, or of its sum with the addend, rounded as it is stored."""
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(acc)
    if addend_ptr is not None:
        added = x + tl.load(addend_ptr + at, mask=ok, other=0.0).to(acc)
        rounded = added.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=ok)
        x = rounded.to(acc)
    return x


# The running statistics are changed in place, where their owner has put them.
@triton.jit(
    do_not_specialize=[*_PLAIN, "momentum", "running_mean_ptr", "running_var_ptr", "tracked_ptr"]
)
def split_batch_norm_statistics_kernel(
    x_ptr,  # (rows, C) any float
    addend_ptr,  # (rows, C) as x, or None
    sum_ptr,  # (rows, C) as x: x + addend, which then is what has the statistics, or None
    partial_ptr,  # (segments, 2, C) accumulator dtype: mean and centred sum of squares
    counter_ptr,  # (2, blocks of channels) int32, zero before and after
    mean_ptr,  # (2, C) accumulator dtype
    var_ptr,  # (2, C) accumulator dtype, biased
    running_mean_ptr,  # (2, C) any float, or None: not updated
    running_var_ptr,  # (2, C) any float, or None
    tracked_ptr,  # (2,) int64, batches that were counted, or None
    channels: tl.int32,
    clean_rows: tl.int64,
    rows: tl.int64,
    clean_segments: tl.int64,
    segment_rows: tl.int64,
    momentum: tl.float32,
    DEPENDENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    after_the_launch_before(DEPENDENT)
    acc = partial_ptr.dtype.element_ty
    channels, segment, block, r, c, c_ok, local = _tile(channels, ALIGNED, BLOCK_R, BLOCK_C)
    branch, first, count = segment_of(segment, clean_rows, rows, clean_segments, segment_rows)

    shift = tl.zeros((BLOCK_C,), acc)
    sums = tl.zeros((BLOCK_R, BLOCK_C), acc)
    squares = tl.zeros((BLOCK_R, BLOCK_C), acc)
    # Narrow accesses have a mask each, which gfx942 keeps in scalar registers: two stages fit.
    for i in tl.range(0, count, BLOCK_R, num_stages=3 if ALIGNED else 2):
        ok = (r < count - i)[:, None] & c_ok[None, :]
        at = start_of(first + i, channels) + local
        x = _summand(x_ptr, addend_ptr, sum_ptr, at, ok, acc)
        if i == 0:
            # Sums around the mean of the first tile: x - shift is exact for x near it, and the
            # shift is at most sqrt(count / BLOCK_R) standard deviations off, so little cancels in
            # the last line. In the loop, whose first loads are then under way.
            shift = tl.sum(x, axis=0) / tl.minimum(count, BLOCK_R).to(acc)
        d = tl.where(ok, x - shift[None, :], 0.0)
        sums += d
        squares += d * d
    of_segment = tl.sum(sums, axis=0)
    offset = of_segment / count.to(acc)
    m2 = tl.sum(squares, axis=0) - of_segment * offset
    m2 = tl.where(m2 < 0.0, 0.0, m2)
    at = partial_ptr + start_of(segment, 2 * channels) + c
    tl.store(at, shift + offset, mask=c_ok)
    tl.store(at + channels, m2, mask=c_ok)

    last, begin, number = _last_of_branch(
        counter_ptr, branch, block, channels, clean_segments, BLOCK_C
    )
    if last:
        total = tl.where(branch == 1, rows - clean_rows, clean_rows)
        partial_ptr += start_of(begin, 2 * channels)
        mean, combined = merged(
            partial_ptr, number, total, segment_rows, channels, c, c_ok, BLOCK_S, BLOCK_C
        )
        store_statistics(
            mean,
            combined,
            total,
            rows,
            branch,
            block * BLOCK_C,
            channels,
            c,
            c_ok,
            mean_ptr,
            var_ptr,
            running_mean_ptr,
            running_var_ptr,
            tracked_ptr,
            momentum,
        )


@triton.jit(do_not_specialize=[*_PLAIN, "eps"])
def split_batch_norm_fwd_kernel(
    x_ptr,  # (rows, C) any float
    residual_ptr,  # (rows, C) as x, or None
    mean_ptr,  # (2, C) float32, or float64 for a float64 x
    var_ptr,  # (2, C) as mean
    weight_ptr,  # (2, C) any float, or None
    bias_ptr,  # (2, C) any float, or None
    residual_mean_ptr,  # (2, C) as mean; or None: the residual is added as it is
    residual_var_ptr,  # (2, C) as mean
    residual_weight_ptr,  # (2, C) any float, or None
    residual_bias_ptr,  # (2, C) any float, or None
    y_ptr,  # (rows, C) as x, or None
    pooled_ptr,  # (N, C) any float, or None; a segment is then one sample
    mask_ptr,  # (rows, ceil(C / 8)) uint8, or None: bit is set where ReLU lets the gradient through
    channels: tl.int32,
    clean_rows: tl.int64,
    rows: tl.int64,
    clean_segments: tl.int64,
    segment_rows: tl.int64,
    eps: tl.float32,
    RELU: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    after_the_launch_before(DEPENDENT)
    channels, segment, block, r, c, c_ok, local = _tile(channels, ALIGNED, BLOCK_R, BLOCK_C)
    branch, first, count = segment_of(segment, clean_rows, rows, clean_segments, segment_rows)
    row = branch * channels + c
    mean, rstd, scale, bias = affine_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, row, c_ok, eps)
    if residual_mean_ptr is not None:
        residual_mean, _, residual_scale, residual_bias = affine_of(
            residual_mean_ptr,
            residual_var_ptr,
            residual_weight_ptr,
            residual_bias_ptr,
            row,
            c_ok,
            eps,
        )
    pooled = tl.zeros((BLOCK_R, BLOCK_C), scale.dtype)
    for i in range(0, count, BLOCK_R):
        inside = r < count - i
        ok = inside[:, None] & c_ok[None, :]
        at = start_of(first + i, channels)
        x = tl.load(x_ptr + at + local, mask=ok, other=0.0).to(scale.dtype)
        z = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if pooled_ptr is not None:
            # `z <= 0` and not tl.maximum, which would turn NaN into 0.
            pooled += tl.where(ok, tl.where(z <= 0.0, 0.0, z), 0.0)
        if residual_ptr is not None:
            other = tl.load(residual_ptr + at + local, mask=ok, other=0.0).to(scale.dtype)
            if residual_mean_ptr is not None:
                other = (other - residual_mean[None, :]) * residual_scale[None, :]
                other += residual_bias[None, :]
            z += other
        if RELU:
            stopped = z <= 0.0
            z = tl.where(stopped, 0.0, z)
            if mask_ptr is not None:
                store_bits(mask_ptr, stopped, first + i, inside, block, channels, BLOCK_R, BLOCK_C)
        if y_ptr is not None:
            tl.store(y_ptr + at + local, z.to(y_ptr.dtype.element_ty), mask=ok)
    if pooled_ptr is not None:
        value = tl.sum(pooled, axis=0) / count.to(scale.dtype)
        value = value.to(pooled_ptr.dtype.element_ty)
        tl.store(pooled_ptr + start_of(segment, channels) + c, value, mask=c_ok)


@triton.jit(do_not_specialize=[*_PLAIN, "eps"])
def split_batch_norm_bwd_sums_kernel(
    dy_ptr,  # (rows, C) as x, or None beside dpooled: y has no reader
    dy_skip_ptr,  # (rows, C) as x, a second gradient of y, or None; or one of every second pixel
    dpooled_ptr,  # (N, C) any float, or None; a segment is then one sample
    x_ptr,  # (rows, C) any float
    mean_ptr,  # (2, C) float32, or float64 for a float64 x
    var_ptr,  # (2, C) as mean
    weight_ptr,  # (2, C) any float, or None
    bias_ptr,  # (2, C) any float, or None
    mask_ptr,  # (rows, ceil(C / 8)) uint8, or None: ReLU, if any, is computed again from x
    residual_ptr,  # (rows, C) as x: a residual that is normalised too, or None
    residual_mean_ptr,  # (2, C) as mean
    residual_var_ptr,  # (2, C) as mean
    partial_ptr,  # (segments, NUMBER, C) as mean: sums of g, the gradient before ReLU, of g * xhat
    counter_ptr,  # (2, blocks of channels) int32, zero before and after
    sums_ptr,  # (2 or 4, 2, C) as mean: both sums, each per branch, and those of the residual
    dresidual_ptr,  # (rows, C) as dy, or None: both gradients where ReLU lets them through
    channels: tl.int32,
    clean_rows: tl.int64,
    rows: tl.int64,
    clean_segments: tl.int64,
    segment_rows: tl.int64,
    height,  # int32, of an image, where dy_skip has every second pixel; or None
    width,  # int32 or None
    eps: tl.float32,
    RELU: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUMBER: tl.constexpr,  # 3 with a residual that is normalised: of g * its xhat; else 2
):
    after_the_launch_before(DEPENDENT)
    channels, segment, block, r, c, c_ok, local = _tile(channels, ALIGNED, BLOCK_R, BLOCK_C)
    branch, first, count = segment_of(segment, clean_rows, rows, clean_segments, segment_rows)
    row = branch * channels + c
    mean, rstd, scale, bias = affine_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, row, c_ok, eps)
    if residual_ptr is not None:
        residual_mean, residual_rstd, _, _ = affine_of(
            residual_mean_ptr, residual_var_ptr, None, None, row, c_ok, eps
        )
        sum_gr = tl.zeros((BLOCK_R, BLOCK_C), scale.dtype)
    if dpooled_ptr is not None:
        of_mean = tl.load(dpooled_ptr + start_of(segment, channels) + c, mask=c_ok, other=0.0)
        dpooled = of_mean.to(scale.dtype) / count.to(scale.dtype)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), scale.dtype)
    sum_gx = tl.zeros((BLOCK_R, BLOCK_C), scale.dtype)
    if mask_ptr is not None:
        bits = load_bits(mask_ptr, first, r < count, block, channels, BLOCK_R, BLOCK_C)
    for i in tl.range(0, count, BLOCK_R, num_stages=3 if ALIGNED else 2):
        inside = r < count - i
        ok = inside[:, None] & c_ok[None, :]
        at = start_of(first + i, channels)
        if dy_ptr is not None:
            g = tl.load(dy_ptr + at + local, mask=ok, other=0.0).to(scale.dtype)
        else:
            g = tl.zeros((BLOCK_R, BLOCK_C), scale.dtype)
        if dy_skip_ptr is not None:
            second = load_second_gradient(
                dy_skip_ptr, at + local, ok, first, i + r, c, channels, height, width
            )
            g += second.to(scale.dtype)
        d = tl.load(x_ptr + at + local, mask=ok, other=0.0).to(scale.dtype) - mean[None, :]
        z = d * scale[None, :] + bias[None, :]
        if mask_ptr is not None:
            g = tl.where(unpacked(bits, BLOCK_R, BLOCK_C), g, 0.0)
            # Of the next tile: Triton loads ahead by 4 bytes a thread at least.
            later, left = first + i + BLOCK_R, r < count - i - BLOCK_R
            bits = load_bits(mask_ptr, later, left, block, channels, BLOCK_R, BLOCK_C)
        elif RELU:
            g = tl.where(z <= 0.0, 0.0, g)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at + local, g.to(dresidual_ptr.dtype.element_ty), mask=ok)
        if dpooled_ptr is not None:
            g += tl.where(ok, tl.where(z <= 0.0, 0.0, dpooled[None, :]), 0.0)
        sum_g += g
        sum_gx += g * tl.where(ok, d, 0.0)
        if residual_ptr is not None:
            other = tl.load(residual_ptr + at + local, mask=ok, other=0.0).to(scale.dtype)
            sum_gr += g * tl.where(ok, other - residual_mean[None, :], 0.0)
    at = partial_ptr + start_of(segment, NUMBER * channels) + c
    tl.store(at, tl.sum(sum_g, axis=0), mask=c_ok)
    tl.store(at + channels, tl.sum(sum_gx, axis=0) * rstd, mask=c_ok)
    if residual_ptr is not None:
        tl.store(at + 2 * channels, tl.sum(sum_gr, axis=0) * residual_rstd, mask=c_ok)

    last, begin, number = _last_of_branch(
        counter_ptr, branch, block, channels, clean_segments, BLOCK_C
    )
    if last:
        total_g = tl.zeros((BLOCK_S, BLOCK_C), scale.dtype)
        total_gx = tl.zeros((BLOCK_S, BLOCK_C), scale.dtype)
        total_gr = tl.zeros((BLOCK_S, BLOCK_C), scale.dtype)
        for k in tl.range(0, number, BLOCK_S, num_stages=3):
            s = (k + tl.arange(0, BLOCK_S)).to(tl.int64)
            ok = (s < number)[:, None] & c_ok[None, :]
            total_g += partial_of(partial_ptr, 0, begin + s, ok, channels, c, NUMBER)
            total_gx += partial_of(partial_ptr, 1, begin + s, ok, channels, c, NUMBER)
            if NUMBER == 3:
                total_gr += partial_of(partial_ptr, 2, begin + s, ok, channels, c, NUMBER)
        at = sums_ptr + branch * channels + c
        of_g = tl.sum(total_g, axis=0)
        tl.store(at, of_g, mask=c_ok)
        tl.store(at + 2 * channels, tl.sum(total_gx, axis=0), mask=c_ok)
        if NUMBER == 3:
            tl.store(at + 4 * channels, of_g, mask=c_ok)
            tl.store(at + 6 * channels, tl.sum(total_gr, axis=0), mask=c_ok)
        if tl.where(branch == 1, clean_rows, rows - clean_rows) == 0:
            # The other branch has no samples, and no program.
            at = sums_ptr + (1 - branch) * channels + c
            for which in tl.static_range(2 * NUMBER - 2):
                tl.store(at + 2 * which * channels, tl.zeros_like(rstd), mask=c_ok)


@triton.jit(do_not_specialize=[*_PLAIN, "eps"])
def split_batch_norm_bwd_input_kernel(
    dy_ptr,  # as above; already stopped by ReLU if neither RELU nor mask_ptr is given
    dy_skip_ptr,  # (rows, C) as x, a second gradient of y, or None; or one of every second pixel
    dx_around_ptr,  # (rows, C) as x, a second gradient of x, or None
    dpooled_ptr,  # (N, C) any float, or None; a segment is then one sample
    x_ptr,  # (rows, C) any float
    mean_ptr,  # (2, C) float32, or float64 for a float64 x
    var_ptr,  # (2, C) as mean
    weight_ptr,  # (2, C) any float, or None
    bias_ptr,  # (2, C) any float, or None
    mask_ptr,  # (rows, ceil(C / 8)) uint8, or None: ReLU, if any, is computed again from x
    residual_ptr,  # (rows, C) as x: a residual that is normalised too, or None
    residual_mean_ptr,  # (2, C) as mean
    residual_var_ptr,  # (2, C) as mean
    residual_weight_ptr,  # (2, C) any float, or None
    sums_ptr,  # (2 or 4, 2, C) as mean, or None: running statistics, which do not depend on x
    counts_ptr,  # (2,) as mean: values behind the statistics, or None: those in the rows here
    dx_ptr,  # (rows, C) as x
    dresidual_ptr,  # (rows, C) as dy, or None; of the residual before it is normalised
    channels: tl.int32,
    clean_rows: tl.int64,
    rows: tl.int64,
    clean_segments: tl.int64,
    segment_rows: tl.int64,
    height,  # int32, of an image, where dy_skip has every second pixel; or None
    width,  # int32 or None
    eps: tl.float32,
    RELU: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    after_the_launch_before(DEPENDENT)
    channels, segment, block, r, c, c_ok, local = _tile(channels, ALIGNED, BLOCK_R, BLOCK_C)
    branch, first, count = segment_of(segment, clean_rows, rows, clean_segments, segment_rows)
    row = branch * channels + c
    mean, rstd, scale, bias = affine_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, row, c_ok, eps)
    if dpooled_ptr is not None:
        of_mean = tl.load(dpooled_ptr + start_of(segment, channels) + c, mask=c_ok, other=0.0)
        dpooled = of_mean.to(scale.dtype) / count.to(scale.dtype)
    if sums_ptr is not None:
        if counts_ptr is None:
            total = tl.where(branch == 1, rows - clean_rows, clean_rows).to(scale.dtype)
        else:
            total = tl.load(counts_ptr + branch)
        mean_g = tl.load(sums_ptr + row, mask=c_ok, other=0.0) / total
        slope = tl.load(sums_ptr + 2 * channels + row, mask=c_ok, other=0.0) / total * rstd
    if residual_ptr is not None:
        residual_mean, residual_rstd, residual_scale, _ = affine_of(
            residual_mean_ptr, residual_var_ptr, residual_weight_ptr, None, row, c_ok, eps
        )
        if sums_ptr is not None:
            residual_slope = tl.load(sums_ptr + 6 * channels + row, mask=c_ok, other=0.0)
            residual_slope = residual_slope / total * residual_rstd
    for i in range(0, count, BLOCK_R):
        inside = r < count - i
        ok = inside[:, None] & c_ok[None, :]
        at = start_of(first + i, channels)
        if dy_ptr is not None:
            g = tl.load(dy_ptr + at + local, mask=ok, other=0.0).to(scale.dtype)
        else:
            g = tl.zeros((BLOCK_R, BLOCK_C), scale.dtype)
        if dy_skip_ptr is not None:
            second = load_second_gradient(
                dy_skip_ptr, at + local, ok, first, i + r, c, channels, height, width
            )
            g += second.to(scale.dtype)
        if sums_ptr is not None or dpooled_ptr is not None or (RELU and mask_ptr is None):
            d = tl.load(x_ptr + at + local, mask=ok, other=0.0).to(scale.dtype) - mean[None, :]
            z = d * scale[None, :] + bias[None, :]
        if mask_ptr is not None:
            bits = load_bits(mask_ptr, first + i, inside, block, channels, BLOCK_R, BLOCK_C)
            g = tl.where(unpacked(bits, BLOCK_R, BLOCK_C), g, 0.0)
        elif RELU:
            g = tl.where(z <= 0.0, 0.0, g)
        if dresidual_ptr is not None:
            of_residual = g
            if residual_ptr is not None:
                if sums_ptr is not None:
                    other = tl.load(residual_ptr + at + local, mask=ok, other=0.0).to(scale.dtype)
                    other -= residual_mean[None, :]
                    of_residual = g - mean_g[None, :] - other * residual_slope[None, :]
                of_residual = of_residual * residual_scale[None, :]
            tl.store(
                dresidual_ptr + at + local,
                of_residual.to(dresidual_ptr.dtype.element_ty),
                mask=ok,
            )
        if dpooled_ptr is not None:
            g += tl.where(z <= 0.0, 0.0, dpooled[None, :])
        if sums_ptr is not None:
            g = g - mean_g[None, :] - d * slope[None, :]
        g = g * scale[None, :]
        if dx_around_ptr is not None:
            g += tl.load(dx_around_ptr + at + local, mask=ok, other=0.0).to(scale.dtype)
        tl.store(dx_ptr + at + local, g.to(dx_ptr.dtype.element_ty), mask=ok)


# Programs per multiprocessor of the reductions, all resident, so that they begin and end together,
# and the registers that this leaves a thread. One less with other tensors, and one less where
# channels are no multiple of 16, or they would spill (tests/kernels/aot).
RESIDENT = 3
_REGISTERS = {3: 80, 2: 128, 1: 255}
_NUM_WARPS = 8
_STREAMING_TILES = 4
# Elements per tile by bytes per element: one or two 16-byte accesses per thread and tensor, so that
# several blocks are resident and hide latency. The pooled forward and the backward hold more values
# in registers.
_STATISTICS_TILE = {2: 4096, 4: 2048, 8: 1024}
_FORWARD_TILE = {2: 4096, 4: 2048, 8: 1024}
_POOLED_TILE = {2: 2048, 4: 1024, 8: 1024}
_BACKWARD_TILE = {2: 2048, 4: 1024, 8: 1024}
# 64 channels of 16 bits are a 128-byte line.
_BLOCK_C = (16, 32, 64)


@dataclass(frozen=True)
class _Launch:
    """How the rows and channels are cut up; ``integers`` in the order of the kernels' arguments."""

    grid: tuple[int]
    segments: int
    integers: tuple[int, ...]
    constants: dict[str, Any]


def _plan(
    x: Tensor,
    clean: int,
    tile: dict[int, int],
    per_sample: bool,
    most_tiles: int | None,
    more: bool = False,
) -> _Launch:
    """Cut ``x`` into segments: samples, or as many rows as give each program even work.

    Args:
        most_tiles: the most tiles a segment may have; None: as few segments as fill the GPU, for
            kernels that leave one partial result each.
        more: whether a program reads more tensors than x and dy.
    """
    n, channels, height, width = x.shape
    block_c = next((block for block in _BLOCK_C if channels <= block), _BLOCK_C[-1])
    block_r = tile[x.element_size()] // block_c
    channel_blocks = triton.cdiv(channels, block_c)
    resident = RESIDENT - more - (channels % 16 > 0)
    area = height * width
    clean_rows, rows = clean * area, n * area
    if per_sample:
        segment_rows = area
    else:
        tiles = triton.cdiv(clean_rows, block_r) + triton.cdiv(rows - clean_rows, block_r)
        each = triton.cdiv(tiles * channel_blocks, programs_of(x, resident))
        segment_rows = block_r * (each if most_tiles is None else min(each, most_tiles))
    clean_segments = triton.cdiv(clean_rows, segment_rows)
    segments = clean_segments + triton.cdiv(rows - clean_rows, segment_rows)
    return _Launch(
        grid=(segments * channel_blocks,),
        segments=segments,
        integers=(channels, clean_rows, rows, clean_segments, segment_rows),
        constants={
            "ALIGNED": channels % 16 == 0,
            "BLOCK_R": block_r,
            "BLOCK_C": block_c,
            "num_warps": warps(_NUM_WARPS),
            **(registers(_REGISTERS[resident]) if most_tiles is None else {}),
            **dependence(),
        },
    )


def _combining(x: Tensor, plan: _Launch, wide: Tensor, number: int = 2) -> tuple[Tensor, Tensor]:
    """Memory for partial results of (number, C) and the counters of a kernel that combines them."""
    blocks, shape = plan.grid[0] // plan.segments, (plan.segments, number, x.shape[1])
    return wide.new_empty(shape), counters.take(x.device, 2 * blocks)


@torch.library.custom_op(
    "arat_kernels::split_batch_norm_statistics",
    mutates_args=("running_mean", "running_var", "tracked"),
)
def statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    clean: int,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (2, C), of ``x``; moves the running ones and counts the batch of
    each branch if they are given."""
    mean, var = _statistics_results(x)
    moved = running_mean, running_var, tracked
    _launch_statistics(x, None, None, mean, var, moved, clean, momentum)
    return mean, var


def _launch_statistics(
    x: Tensor,
    addend: Tensor | None,
    summed: Tensor | None,
    mean: Tensor,
    var: Tensor,
    moved: tuple[Tensor | None, Tensor | None, Tensor | None],
    clean: int,
    momentum: float,
) -> None:
    # 16 channels a program spill at three of them, under Triton 3.8.
    more = addend is not None or x.shape[1] <= 16
    plan = _plan(x, clean, _STATISTICS_TILE, False, None, more)
    with torch.cuda.device_of(x):
        split_batch_norm_statistics_kernel[plan.grid](
            *all_aligned(x, addend),
            summed,
            *_combining(x, plan, mean),
            mean,
            var,
            *moved,
            *plan.integers,
            momentum,
            BLOCK_S=COMBINED_BYTES // mean.element_size() // plan.constants["BLOCK_C"],
            **plan.constants,
        )


def _statistics_results(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    mean = x.new_empty((2, x.shape[1]), dtype=wide_dtype(x))
    return mean, torch.empty_like(mean)


statistics.register_fake(_statistics_results)


@torch.library.custom_op(
    "arat_kernels::split_batch_norm_sum_statistics",
    mutates_args=("running_mean", "running_var", "tracked"),
)
def sum_statistics(
    x: Tensor,
    addend: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    clean: int,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x + addend``, rounded to their dtype, and its :func:`statistics`."""
    summed, mean, var = _sum_results(x)
    moved = running_mean, running_var, tracked
    _launch_statistics(x, addend, summed, mean, var, moved, clean, momentum)
    return summed, mean, var


def _sum_results(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), *_statistics_results(x)


sum_statistics.register_fake(_sum_results)


class _Sum(torch.autograd.Function):
    """:func:`sum_statistics`; PyTorch lets no operator have a gradient that changes an input."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = sum_statistics(*given)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, dsum: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return dsum, dsum, *[None] * 5


@torch.library.custom_op("arat_kernels::split_batch_norm_normalize", mutates_args=())
def normalize(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    counts: Tensor | None,
    clean: int,
    eps: float,
    relu: bool,
    pooled: bool,
    save_mask: bool,
    batch_statistics: bool,
    group_name: str | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    only_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the pooled feature and ReLU's bits; the last two are empty where they are not wanted. With
    ``only_mean`` y is empty, and the pooled feature, its mean, has the dtype of ``x``.

    ``counts``, ``batch_statistics`` and ``group_name`` say how ``mean`` and ``var`` depend on
    ``x``, which the backward needs. With a ``residual_mean`` the residual is normalised too.
    """
    second = residual_mean, residual_var, residual_weight, residual_bias
    tile = _POOLED_TILE if pooled else _FORWARD_TILE
    plan = _plan(x, clean, tile, per_sample=pooled, most_tiles=_STREAMING_TILES)
    y, features, mask = _normalize_results(x, pooled, save_mask, only_mean)
    with torch.cuda.device_of(x):
        split_batch_norm_fwd_kernel[plan.grid](
            *all_aligned(x, residual, mean, var, weight, bias, *second),
            None if only_mean else y,
            features if pooled else None,
            mask if save_mask else None,
            *plan.integers,
            eps,
            RELU=relu,
            **plan.constants,
        )
    return y, features, mask


def _normalize_results(
    x: Tensor, pooled: bool, save_mask: bool, only_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, height, width = x.shape
    dtype = x.dtype if only_mean else wide_dtype(x)
    features = x.new_empty((n, channels) if pooled else (0, 0), dtype=dtype)
    mask_shape = (n * height * width, (channels + 7) // 8) if save_mask else (0, 0)
    return like(x, not only_mean), features, x.new_empty(mask_shape, dtype=torch.uint8)


normalize.register_fake(
    lambda *given: _normalize_results(given[0], given[10], given[11], given[18])
)


@torch.library.custom_op("arat_kernels::split_batch_norm_backward_sums", mutates_args=())
def backward_sums(
    dy: Tensor | None,
    dy_skip: Tensor | None,
    dpooled: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    clean: int,
    eps: float,
    relu: bool,
    want_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of bias and weight, (2, 2, C), or with those of a ``residual`` that is
    normalised too, (4, 2, C); and ``dy`` where ReLU lets it through, or nothing. ``dy_skip``, dense
    or of every second pixel, is added to ``dy``."""
    more = dpooled is not None or dy_skip is not None or residual is not None
    plan = _plan(x, clean, _BACKWARD_TILE, dpooled is not None, None, more)
    sums, dresidual = _sums_results(x, mean, residual, want_dresidual)
    with torch.cuda.device_of(x):
        split_batch_norm_bwd_sums_kernel[plan.grid](
            *all_aligned(dy, dy_skip, dpooled, x, mean, var, weight, bias),
            mask,
            *all_aligned(residual, residual_mean, residual_var),
            *_combining(x, plan, mean, len(sums) // 2 + 1),
            sums,
            dresidual if want_dresidual else None,
            *plan.integers,
            *size_of_few(x, dy_skip),
            eps,
            RELU=relu,
            BLOCK_S=COMBINED_BYTES // mean.element_size() // plan.constants["BLOCK_C"],
            NUMBER=len(sums) // 2 + 1,
            **plan.constants,
        )
    return sums, dresidual


def _sums_results(
    x: Tensor, mean: Tensor, residual: Tensor | None, want_dresidual: bool
) -> tuple[Tensor, Tensor]:
    number = 2 if residual is None else 4
    return mean.new_empty((number, *mean.shape)), like(x, want_dresidual)


backward_sums.register_fake(lambda *given: _sums_results(given[3], given[4], given[9], given[15]))


@torch.library.custom_op("arat_kernels::split_batch_norm_backward_input", mutates_args=())
def backward_input(
    dy: Tensor | None,
    dy_skip: Tensor | None,
    dx_around: Tensor | None,
    dpooled: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    sums: Tensor | None,
    counts: Tensor | None,
    clean: int,
    eps: float,
    relu: bool,
    want_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x; and the residual's, or nothing. ``dy_skip``, dense or of every second
    pixel, is added to ``dy``, ``dx_around`` to the result. With a ``residual_mean`` the residual is
    normalised too."""
    per_sample = dpooled is not None
    plan = _plan(x, clean, _BACKWARD_TILE, per_sample, most_tiles=_STREAMING_TILES)
    dx, dresidual = like(x), like(x, want_dresidual)
    with torch.cuda.device_of(x):
        split_batch_norm_bwd_input_kernel[plan.grid](
            *all_aligned(dy, dy_skip, dx_around, dpooled, x, mean, var, weight, bias),
            mask,
            *all_aligned(residual, residual_mean, residual_var, residual_weight, sums, counts),
            dx,
            dresidual if want_dresidual else None,
            *plan.integers,
            *size_of_few(x, dy_skip),
            eps,
            RELU=relu,
            **plan.constants,
        )
    return dx, dresidual


backward_input.register_fake(lambda *given: (like(given[4]), like(given[4], given[19])))


# x, the residual, and weight and bias of both.
_DIFFERENTIABLE = (0, 1, 4, 5, 16, 17)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, mean, var, weight, bias, counts = inputs[:7]
    ctx.clean, ctx.eps, ctx.relu, ctx.pooled, save_mask = inputs[7:12]
    ctx.batch_statistics, ctx.group_name, *second, ctx.only_mean = inputs[12:]
    ctx.has_residual = residual is not None
    ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    mask = output[2] if save_mask else None
    second = [residual, *second[:3]] if second[0] is not None else [None] * 4
    ctx.save_for_backward(x, mean, var, weight, bias, counts, mask, *second)
    ctx.set_materialize_grads(False)
    ctx.dy_skip = ctx.dx_around = None


def _asked(ctx: Any, index: int) -> bool:
    """Whether this backward pass wants the gradient of an input.

    ``needs_input_grad`` is about the forward: it stays true for a weight when
    ``torch.autograd.grad(loss, x)`` leaves the weight out, as the attack does.
    """
    if not ctx.needs_input_grad[index]:
        return False
    node = ctx.next_functions[ctx.tensors.index(index)][0]
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # PyTorch refuses to say so of a leaf that is itself a target of torch.autograd.grad.
        return True


def _backward(
    ctx: Any, dy: Tensor | None, dpooled: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    x, mean, var, weight, bias, counts, mask, *second = ctx.saved_tensors
    features = dpooled.contiguous() if ctx.pooled and dpooled is not None else None
    if ctx.only_mean:
        dy = None
    if dy is None and (features is None or ctx.has_residual):
        dy = torch.zeros_like(x)
    dy, dy_skip, dx_around = (
        None if t is None else t.contiguous(memory_format=torch.channels_last)
        for t in (dy, ctx.dy_skip, ctx.dx_around)
    )
    ctx.dy_skip = ctx.dx_around = None
    want_x, want_residual, *want_rows = (_asked(ctx, index) for index in _DIFFERENTIABLE)
    normalized_too = second[0] is not None
    affine = (x, mean, var, weight, bias)
    # Without ReLU the gradient of a residual is dy itself, and nothing has to be written.
    write_residual = want_residual and (ctx.relu or normalized_too)
    dresidual = dy if want_residual else None
    relu = ctx.relu
    total = dx = None
    rows: list[Tensor | None] = [None] * 4
    stopped = want_residual and relu
    plain = ctx.batch_statistics and ctx.group_name is None and features is None
    if want_x and plain and not normalized_too and _in_one_pass(x, ctx.clean, "backward"):
        dx, sums, written = one_pass.backward(
            dy, dy_skip, dx_around, *affine, mask, ctx.clean, ctx.eps, relu, stopped
        )
        dresidual = written if stopped else dresidual
        rows = [sums[i] if want else None for i, want in zip((1, 0), want_rows[:2], strict=True)]
        return dx, dresidual, None, None, *rows, *[None] * 13
    if any(want_rows) or ((want_x or write_residual) and ctx.batch_statistics):
        sums, written = backward_sums(
            dy, dy_skip, features, *affine, mask, *second[:3], ctx.clean, ctx.eps, relu, stopped
        )
        if stopped:
            # By ReLU: the next pass reads it in place of dy and the bits.
            dy = dresidual = written
            dy_skip, mask, relu, write_residual = None, None, False, normalized_too
        rows = [sums[i] if want else None for i, want in zip((1, 0, 3, 2), want_rows, strict=True)]
        if ctx.batch_statistics:
            total = sums
            if ctx.group_name is not None and want_x:
                total = sum_over_group(sums, ctx.group_name)
    if want_x or write_residual:
        dx, written = backward_input(
            dy,
            dy_skip,
            dx_around,
            features,
            *affine,
            mask,
            *second,
            total,
            counts,
            ctx.clean,
            ctx.eps,
            relu,
            write_residual,
        )
        if write_residual:
            dresidual = written
    given = (dx if want_x else None, dresidual, None, None, *rows[:2], *[None] * 10, *rows[2:])
    return *given, None


normalize.register_autograd(_backward, setup_context=_setup_context)


def _in_one_pass(x: Tensor, clean: int, which: Literal["forward", "backward"]) -> bool:
    return is_enabled("one_pass") and one_pass.fits(x, clean, which)


class _OnePass(torch.autograd.Function):
    """:func:`normalize` by the statistics of ``x``, which move the running ones; PyTorch lets no
    operator have a gradient that changes an input."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        """The inputs of :func:`normalize`, without mean and variance, and what moves."""
        x, residual, _, _, weight, bias, _, clean, eps, relu, _, save_mask = given[:12]
        *moved, momentum = given[19:]
        y, mask, mean, var = one_pass.forward(
            x, residual, weight, bias, *moved, clean, momentum, eps, relu, save_mask
        )
        _setup_context(ctx, (x, residual, mean, var, *given[4:19]), (y, y, mask))
        ctx.tensors = [i for i, value in enumerate(given) if isinstance(value, Tensor)]
        found: Tensor = y
        return found

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, dy, None, None), *[None] * 4


for operator in (backward_sums, backward_input):
    refuse_second_derivative(operator)


def add_with_statistics(
    x: Tensor,
    addend: Tensor,
    moved: tuple[Tensor | None, Tensor | None, Tensor | None],
    clean: int,
    momentum: float,
) -> Tensor:
    """``x + addend`` of one shape, dtype and layout, channels_last, with its statistics for the
    layer that reads it next, in the same pass.

    Args:
        x, addend: (N, C, H, W).
        moved: that layer's running mean and variance and its count of batches, which move now; or
            three times None.
        clean: samples of the clean branch, at the front.
        momentum: of that layer.
    """
    summed, mean, var = _Sum.apply(x, addend, *moved, clean, momentum)
    summed._statistics = clean, summed._version, moved[0], mean, var
    if moved[0] is not None:
        vars(moved[0])["_moved"] = True
    found: Tensor = summed
    return found


def _known_statistics(
    x: Tensor, clean: int, running_mean: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Those that came with ``x``, if ``running_mean`` is what moved with them.

    Raises:
        ValueError: it moved with another tensor, and would move twice.
    """
    if torch.compiler.is_compiling():
        return None
    moved = running_mean is not None and vars(running_mean).pop("_moved", False)
    found = vars(x).get("_statistics")
    if found is None or found[:2] != (clean, x._version) or found[2] is not running_mean:
        if moved:
            raise ValueError(
                "a layer's running statistics moved with a sum that it then did not read: no hook "
                "may replace or change the output of a residual block of this network"
            )
        return None
    mean, var = found[3:]
    return mean, var


def split_batch_norm_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    sizes: tuple[int, int],
    training: bool,
    update_running_stats: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    return_pooled: bool,
    group_name: str | None,
    tracked: Tensor | None = None,
    second: tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor] | None = None,
    only_mean: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`arat_kernels.split_batch_norm.reference.split_batch_norm_reference`; ``second``
    normalises the residual in the same way: weight, bias, running mean and variance, and the count
    of batches. It goes neither with ``return_pooled`` nor with ``group_name``. With ``only_mean``,
    ``relu`` and no residual the result is the mean of y over H and W, (N, C), alone."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    # The kernels have no variants for narrower parameters, which (2, C) would not repay.
    wide = wide_dtype(x)
    affine = [weight, bias, *(second[:2] if second else (None, None))]
    affine = [None if row is None else row.to(wide).contiguous() for row in affine]
    clean = sizes[0]
    residual_mean = residual_var = None
    counts = None
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, residual, *affine)
    )
    # Without a residual ReLU's mask follows from x, which the backward reads anyway.
    save_mask = relu and residual is not None and differentiable
    flags = (relu, return_pooled or only_mean, save_mask, training)
    if training:
        moved = (running_mean, running_var)
        alone = update_running_stats and group_name is None
        here = (*moved, tracked) if alone else (None, None, None)
        known = _known_statistics(x, clean, here[0])
        plain = second is None and group_name is None and not (return_pooled or only_mean)
        plain = plain and not torch.compiler.is_compiling()
        if known is None and plain and _in_one_pass(x, clean, "forward"):
            none = (None,) * 6
            inputs = (x, residual, *none[:2], *affine[:2], None, clean, eps, *flags, *none[:5])
            y = _OnePass.apply(*inputs, False, *here, momentum)
            return _with_outlets(y, x, channels_last, relu), None
        mean, var = known or statistics(x.detach(), *here, clean, momentum)
        if second is not None:
            assert residual is not None
            here = second[2:] if alone else (None, None, None)
            residual_mean, residual_var = statistics(residual.detach(), *here, clean, momentum)
        if group_name is not None:
            area = x.shape[2] * x.shape[3]
            rows = (clean * area, sizes[1] * area)
            mean, var, counts = gather_statistics(mean, var, rows, group_name)
            if update_running_stats:
                move_running_statistics(*moved, mean, var, counts, momentum)
                if tracked is not None:
                    (tracked if all(sizes) else tracked[0 if sizes[0] else 1]).add_(1)
    else:
        mean, var = running_mean.to(wide), running_var.to(wide)
        if second is not None:
            residual_mean, residual_var = second[2].to(wide), second[3].to(wide)
        group_name = None
    y, pooled, _ = normalize(
        x,
        residual,
        mean,
        var,
        *affine[:2],
        counts,
        clean,
        eps,
        *flags,
        group_name,
        residual_mean,
        residual_var,
        *affine[2:],
        only_mean,
    )
    if only_mean:
        return pooled, None
    return _with_outlets(y, x, channels_last, relu), pooled if return_pooled else None


def _with_outlets(y: Tensor, x: Tensor, channels_last: bool, relu: bool) -> Tensor:
    """``y`` in the layout that ``x`` was given in, with outlets where the kernels read them."""
    if not channels_last:
        return y.contiguous()
    return with_outlets(y, x) if relu else y
