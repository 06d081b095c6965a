"""Triton kernels of split BatchNorm, their operators and their gradients.

All tensors (N, C, H, W) are channels_last here: in memory a matrix of rows = N*H*W by C. The rows
of the clean branch come first. Each program works on one *segment* (consecutive rows of one branch)
and one block of channels; where the pooled feature is wanted a segment is one sample.

Forward in training: statistics (one read of x, partial results per segment), combine (tiny),
normalise (one read of x and of the residual, one write, one bit per element for the backward).
Backward: sums (one read of dy and x, one write of the residual's gradient), combine (tiny), input
(one read of the masked dy and of x, one write of dx).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are pointers and values of Triton, which have no Python type.

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.aot import AotCase
from arat_kernels.implementation import warps
from arat_kernels.layout import aligned, aligned_or_none
from arat_kernels.offsets import start_of
from arat_kernels.split_batch_norm.distributed import (
    gather_statistics,
    move_running_statistics,
    sum_over_group,
)

# Integer arguments are not specialised on their value, so that the launch table below is all there
# is to compile; that channels are a multiple of 16 is said by ALIGNED.
_PLAIN = ["channels", "clean_rows", "rows", "clean_segments", "segments", "segment_rows"]


@triton.jit
def _segment(segment, clean_rows, rows, clean_segments, segment_rows):
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
def _keep_bits(
    mask_ptr, first, inside, block, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The bits that the forward kernel stored for one tile, as booleans (BLOCK_R, BLOCK_C)."""
    width = (channels + 7) // 8
    byte = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    row = tl.arange(0, BLOCK_R)
    ok = inside[:, None] & (byte < width)[None, :]
    at = mask_ptr + start_of(first, width) + row[:, None] * width + byte[None, :]
    packed = tl.load(at, mask=ok, other=0).to(tl.int32)
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_R, BLOCK_C)) != 0


@triton.jit
def _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, row, c_ok, eps):
    """Mean, 1/std, weight/std and bias of one branch's channels, in the statistics' dtype."""
    mean = tl.load(mean_ptr + row, mask=c_ok, other=0.0)
    acc = mean_ptr.dtype.element_ty
    if acc == tl.float64:
        mean = mean.to(tl.float64)
        var = tl.load(var_ptr + row, mask=c_ok, other=1.0).to(tl.float64)
    else:
        mean = mean.to(tl.float32)
        var = tl.load(var_ptr + row, mask=c_ok, other=1.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = rstd
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + row, mask=c_ok, other=0.0).to(rstd.dtype)
    bias = tl.zeros_like(rstd)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + row, mask=c_ok, other=0.0).to(rstd.dtype)
    return mean, rstd, scale, bias


@triton.jit(do_not_specialize=_PLAIN)
def split_batch_norm_statistics_kernel(
    x_ptr,  # (rows, C) any float
    partial_ptr,  # (segments, 2, C) accumulator dtype: mean and centred sum of squares
    channels: tl.int32,
    clean_rows: tl.int64,
    rows: tl.int64,
    clean_segments: tl.int64,
    segment_rows: tl.int64,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if ALIGNED:
        channels = channels // 16 * 16
    acc = partial_ptr.dtype.element_ty
    blocks = tl.cdiv(channels, BLOCK_C)
    segment = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    branch, first, count = _segment(segment, clean_rows, rows, clean_segments, segment_rows)
    r = tl.arange(0, BLOCK_R)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    local = r[:, None] * channels + c[None, :]

    ok = (r < count)[:, None] & c_ok[None, :]
    x = tl.load(x_ptr + start_of(first, channels) + local, mask=ok, other=0.0).to(acc)
    # Sums around the mean of the first tile: x - shift is exact for x near it, and the shift is at
    # most sqrt(count / BLOCK_R) standard deviations off, so little cancels in the last line.
    shift = tl.sum(x, axis=0) / tl.minimum(count, BLOCK_R).to(acc)
    d = tl.where(ok, x - shift[None, :], 0.0)
    sums = d
    squares = d * d
    for i in tl.range(BLOCK_R, count, BLOCK_R, num_stages=3):
        ok = (r < count - i)[:, None] & c_ok[None, :]
        x = tl.load(x_ptr + start_of(first + i, channels) + local, mask=ok, other=0.0).to(acc)
        d = tl.where(ok, x - shift[None, :], 0.0)
        sums += d
        squares += d * d
    total = tl.sum(sums, axis=0)
    offset = total / count.to(acc)
    m2 = tl.sum(squares, axis=0) - total * offset
    m2 = tl.where(m2 < 0.0, 0.0, m2)
    at = partial_ptr + start_of(segment, 2 * channels) + c
    tl.store(at, shift + offset, mask=c_ok)
    tl.store(at + channels, m2, mask=c_ok)


# The running statistics are changed in place, where their owner has put them.
@triton.jit(do_not_specialize=[*_PLAIN, "momentum", "running_mean_ptr", "running_var_ptr"])
def split_batch_norm_combine_kernel(
    partial_ptr,  # (segments, 2, C) accumulator dtype: mean and centred sum of squares
    mean_ptr,  # (2, C) accumulator dtype
    var_ptr,  # (2, C) accumulator dtype, biased
    running_mean_ptr,  # (2, C) any float, or None: not updated
    running_var_ptr,  # (2, C) any float, or None
    channels: tl.int32,
    clean_rows: tl.int64,
    rows: tl.int64,
    clean_segments: tl.int64,
    segments: tl.int64,
    segment_rows: tl.int64,
    momentum: tl.float32,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    acc = partial_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    adv = tl.program_id(1) == 1
    total = tl.where(adv, rows - clean_rows, clean_rows)
    first = tl.where(adv, clean_segments, 0)
    number = tl.where(adv, segments - clean_segments, clean_segments)
    s = tl.arange(0, BLOCK_S)
    partial_ptr += start_of(first, 2 * channels)
    present = c_ok & (total > 0)
    share = 1.0 / tl.maximum(total, 1).to(acc)

    # The first partial mean is near the others: their differences keep all digits.
    shift = tl.load(partial_ptr + c, mask=present, other=0.0)
    weighted = tl.zeros((BLOCK_C,), acc)
    for i in range(0, number, BLOCK_S):
        k = (i + s).to(tl.int64)
        ok = (k < number)[:, None] & c_ok[None, :]
        count = tl.minimum(total - k * segment_rows, segment_rows)
        at = partial_ptr + start_of(k, 2 * channels)[:, None] + c[None, :]
        mean = tl.load(at, mask=ok, other=0.0)
        weighted += tl.sum(
            tl.where(ok, (mean - shift[None, :]) * count.to(acc)[:, None], 0.0), axis=0
        )
    offset = weighted * share
    m2 = tl.zeros((BLOCK_C,), acc)
    for i in range(0, number, BLOCK_S):
        k = (i + s).to(tl.int64)
        ok = (k < number)[:, None] & c_ok[None, :]
        count = tl.minimum(total - k * segment_rows, segment_rows)
        at = partial_ptr + start_of(k, 2 * channels)[:, None] + c[None, :]
        mean = tl.load(at, mask=ok, other=0.0)
        inner = tl.load(at + channels, mask=ok, other=0.0)
        d = (mean - shift[None, :]) - offset[None, :]
        m2 += tl.sum(tl.where(ok, inner + d * d * count.to(acc)[:, None], 0.0), axis=0)
    mean = shift + offset
    row = tl.program_id(1) * channels + c
    tl.store(mean_ptr + row, mean, mask=c_ok)
    tl.store(var_ptr + row, m2 * share, mask=c_ok)
    if running_mean_ptr is not None:
        unbiased = m2 * (1.0 / tl.maximum(total - 1, 1).to(acc))
        old = tl.load(running_mean_ptr + row, mask=present, other=0.0).to(acc)
        new = old + momentum * (mean - old)
        tl.store(running_mean_ptr + row, new.to(running_mean_ptr.dtype.element_ty), mask=present)
        old = tl.load(running_var_ptr + row, mask=present, other=0.0).to(acc)
        new = old + momentum * (unbiased - old)
        tl.store(running_var_ptr + row, new.to(running_var_ptr.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=[*_PLAIN, "eps"])
def split_batch_norm_fwd_kernel(
    x_ptr,  # (rows, C) any float
    residual_ptr,  # (rows, C) as x, or None
    mean_ptr,  # (2, C) float32, or float64 for a float64 x
    var_ptr,  # (2, C) as mean
    weight_ptr,  # (2, C) any float, or None
    bias_ptr,  # (2, C) any float, or None
    y_ptr,  # (rows, C) as x
    pooled_ptr,  # (N, C) as mean, or None; a segment is then one sample
    mask_ptr,  # (rows, ceil(C / 8)) uint8, or None: bit is set where ReLU lets the gradient through
    channels: tl.int32,
    clean_rows: tl.int64,
    rows: tl.int64,
    clean_segments: tl.int64,
    segment_rows: tl.int64,
    eps: tl.float32,
    RELU: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if ALIGNED:
        channels = channels // 16 * 16
    blocks = tl.cdiv(channels, BLOCK_C)
    segment = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    branch, first, count = _segment(segment, clean_rows, rows, clean_segments, segment_rows)
    r = tl.arange(0, BLOCK_R)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    local = r[:, None] * channels + c[None, :]
    mean, rstd, scale, bias = _affine(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, branch * channels + c, c_ok, eps
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
            z += tl.load(residual_ptr + at + local, mask=ok, other=0.0).to(scale.dtype)
        if RELU:
            stopped = z <= 0.0
            z = tl.where(stopped, 0.0, z)
            if mask_ptr is not None:
                width = (channels + 7) // 8
                bits = tl.reshape(tl.where(stopped, 0, 1), (BLOCK_R, BLOCK_C // 8, 8))
                packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
                byte = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
                tl.store(
                    mask_ptr + start_of(first + i, width) + r[:, None] * width + byte[None, :],
                    packed.to(tl.uint8),
                    mask=inside[:, None] & (byte < width)[None, :],
                )
        tl.store(y_ptr + at + local, z.to(y_ptr.dtype.element_ty), mask=ok)
    if pooled_ptr is not None:
        value = tl.sum(pooled, axis=0) / count.to(scale.dtype)
        tl.store(pooled_ptr + start_of(segment, channels) + c, value, mask=c_ok)


@triton.jit(do_not_specialize=[*_PLAIN, "eps"])
def split_batch_norm_bwd_sums_kernel(
    dy_ptr,  # (rows, C) as x
    dpooled_ptr,  # (N, C) as mean, or None; a segment is then one sample
    x_ptr,  # (rows, C) any float
    mean_ptr,  # (2, C) float32, or float64 for a float64 x
    var_ptr,  # (2, C) as mean
    weight_ptr,  # (2, C) any float, or None
    bias_ptr,  # (2, C) any float, or None
    mask_ptr,  # (rows, ceil(C / 8)) uint8, or None: ReLU, if any, is computed again from x
    partial_ptr,  # (segments, 2, C) as mean: sums of g and of g * xhat, g the gradient before ReLU
    dresidual_ptr,  # (rows, C) as dy, or None: dy where ReLU lets it through
    channels: tl.int32,
    clean_rows: tl.int64,
    rows: tl.int64,
    clean_segments: tl.int64,
    segment_rows: tl.int64,
    eps: tl.float32,
    RELU: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if ALIGNED:
        channels = channels // 16 * 16
    blocks = tl.cdiv(channels, BLOCK_C)
    segment = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    branch, first, count = _segment(segment, clean_rows, rows, clean_segments, segment_rows)
    r = tl.arange(0, BLOCK_R)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    local = r[:, None] * channels + c[None, :]
    mean, rstd, scale, bias = _affine(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, branch * channels + c, c_ok, eps
    )
    if dpooled_ptr is not None:
        dpooled = tl.load(dpooled_ptr + start_of(segment, channels) + c, mask=c_ok, other=0.0).to(
            scale.dtype
        ) / count.to(scale.dtype)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), scale.dtype)
    sum_gx = tl.zeros((BLOCK_R, BLOCK_C), scale.dtype)
    for i in tl.range(0, count, BLOCK_R, num_stages=3):
        inside = r < count - i
        ok = inside[:, None] & c_ok[None, :]
        at = start_of(first + i, channels)
        g = tl.load(dy_ptr + at + local, mask=ok, other=0.0).to(scale.dtype)
        d = tl.load(x_ptr + at + local, mask=ok, other=0.0).to(scale.dtype) - mean[None, :]
        z = d * scale[None, :] + bias[None, :]
        if mask_ptr is not None:
            keep = _keep_bits(mask_ptr, first + i, inside, block, channels, BLOCK_R, BLOCK_C)
            g = tl.where(keep, g, 0.0)
        elif RELU:
            g = tl.where(z <= 0.0, 0.0, g)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at + local, g.to(dresidual_ptr.dtype.element_ty), mask=ok)
        if dpooled_ptr is not None:
            g += tl.where(ok, tl.where(z <= 0.0, 0.0, dpooled[None, :]), 0.0)
        sum_g += g
        sum_gx += g * tl.where(ok, d, 0.0)
    at = partial_ptr + start_of(segment, 2 * channels) + c
    tl.store(at, tl.sum(sum_g, axis=0), mask=c_ok)
    tl.store(at + channels, tl.sum(sum_gx, axis=0) * rstd, mask=c_ok)


@triton.jit(do_not_specialize=_PLAIN)
def split_batch_norm_bwd_combine_kernel(
    partial_ptr,  # (segments, 2, C) accumulator dtype
    sums_ptr,  # (2, 2, C) accumulator dtype: sums of g and of g * xhat, each per branch
    channels: tl.int32,
    clean_segments: tl.int64,
    segments: tl.int64,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    acc = partial_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    adv = tl.program_id(1) == 1
    first = tl.where(adv, clean_segments, 0)
    number = tl.where(adv, segments - clean_segments, clean_segments)
    s = tl.arange(0, BLOCK_S)
    sum_g = tl.zeros((BLOCK_S, BLOCK_C), acc)
    sum_gx = tl.zeros((BLOCK_S, BLOCK_C), acc)
    for i in range(0, number, BLOCK_S):
        k = (i + s).to(tl.int64)
        ok = (k < number)[:, None] & c_ok[None, :]
        at = partial_ptr + start_of(first + k, 2 * channels)[:, None] + c[None, :]
        sum_g += tl.load(at, mask=ok, other=0.0)
        sum_gx += tl.load(at + channels, mask=ok, other=0.0)
    row = tl.program_id(1) * channels + c
    tl.store(sums_ptr + row, tl.sum(sum_g, axis=0), mask=c_ok)
    tl.store(sums_ptr + 2 * channels + row, tl.sum(sum_gx, axis=0), mask=c_ok)


@triton.jit(do_not_specialize=[*_PLAIN, "eps"])
def split_batch_norm_bwd_input_kernel(
    dy_ptr,  # (rows, C) as x; already stopped by ReLU if neither RELU nor mask_ptr is given
    dpooled_ptr,  # (N, C) as mean, or None; a segment is then one sample
    x_ptr,  # (rows, C) any float
    mean_ptr,  # (2, C) float32, or float64 for a float64 x
    var_ptr,  # (2, C) as mean
    weight_ptr,  # (2, C) any float, or None
    bias_ptr,  # (2, C) any float, or None
    mask_ptr,  # (rows, ceil(C / 8)) uint8, or None: ReLU, if any, is computed again from x
    sums_ptr,  # (2, 2, C) as mean, or None: running statistics, which do not depend on x
    counts_ptr,  # (2,) as mean: values behind the statistics, or None: those in the rows here
    dx_ptr,  # (rows, C) as x
    dresidual_ptr,  # (rows, C) as dy, or None
    channels: tl.int32,
    clean_rows: tl.int64,
    rows: tl.int64,
    clean_segments: tl.int64,
    segment_rows: tl.int64,
    eps: tl.float32,
    RELU: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if ALIGNED:
        channels = channels // 16 * 16
    blocks = tl.cdiv(channels, BLOCK_C)
    segment = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    branch, first, count = _segment(segment, clean_rows, rows, clean_segments, segment_rows)
    r = tl.arange(0, BLOCK_R)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    local = r[:, None] * channels + c[None, :]
    row = branch * channels + c
    mean, rstd, scale, bias = _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, row, c_ok, eps)
    if dpooled_ptr is not None:
        dpooled = tl.load(dpooled_ptr + start_of(segment, channels) + c, mask=c_ok, other=0.0).to(
            scale.dtype
        ) / count.to(scale.dtype)
    if sums_ptr is not None:
        if counts_ptr is None:
            total = tl.where(branch == 1, rows - clean_rows, clean_rows).to(scale.dtype)
        else:
            total = tl.load(counts_ptr + branch)
        mean_g = tl.load(sums_ptr + row, mask=c_ok, other=0.0) / total
        slope = tl.load(sums_ptr + 2 * channels + row, mask=c_ok, other=0.0) / total * rstd
    for i in range(0, count, BLOCK_R):
        inside = r < count - i
        ok = inside[:, None] & c_ok[None, :]
        at = start_of(first + i, channels)
        g = tl.load(dy_ptr + at + local, mask=ok, other=0.0).to(scale.dtype)
        if sums_ptr is not None or dpooled_ptr is not None or (RELU and mask_ptr is None):
            d = tl.load(x_ptr + at + local, mask=ok, other=0.0).to(scale.dtype) - mean[None, :]
            z = d * scale[None, :] + bias[None, :]
        if mask_ptr is not None:
            keep = _keep_bits(mask_ptr, first + i, inside, block, channels, BLOCK_R, BLOCK_C)
            g = tl.where(keep, g, 0.0)
        elif RELU:
            g = tl.where(z <= 0.0, 0.0, g)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at + local, g.to(dresidual_ptr.dtype.element_ty), mask=ok)
        if dpooled_ptr is not None:
            g += tl.where(z <= 0.0, 0.0, dpooled[None, :])
        if sums_ptr is not None:
            g = g - mean_g[None, :] - d * slope[None, :]
        tl.store(dx_ptr + at + local, (g * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=ok)


# The reductions get three programs of 8 warps per multiprocessor. On sm_90 their registers
# (docs/kernels.md) let all three be resident, 38% occupancy and more, in the statistics and in the
# backward without pooled features; with them in 16 bits, and in most kernels for channels that are
# no multiple of 16, two are (25%) and the third follows.
_BLOCKS_PER_MULTIPROCESSOR = 3
_NUM_WARPS = 8
_STREAMING_TILES = 4
_COMBINE = {"BLOCK_S": 64, "BLOCK_C": 8}
_COMBINE_WARPS = 4
# Elements per tile by bytes per element: one or two 16-byte accesses per thread and tensor. The
# pooled forward and the backward hold more values in registers.
_STATISTICS_TILE = {2: 4096, 4: 2048, 8: 1024}
_FORWARD_TILE = {2: 4096, 4: 2048, 8: 1024}
_POOLED_TILE = {2: 2048, 4: 1024, 8: 1024}
_BACKWARD_TILE = {2: 2048, 4: 1024, 8: 1024}
_BLOCK_C = (16, 32, 64)


@dataclass(frozen=True)
class _Launch:
    """How the rows and channels are cut up; ``integers`` in the order of the kernels' arguments."""

    grid: tuple[int]
    segments: int
    integers: tuple[int, ...]
    clean_segments: int
    segment_rows: int
    constants: dict[str, Any]


def _blocks(tile: dict[int, int], itemsize: int, channels: int) -> dict[str, int]:
    block_c = next((block for block in _BLOCK_C if channels <= block), _BLOCK_C[-1])
    return {"BLOCK_R": tile[itemsize] // block_c, "BLOCK_C": block_c}


def _programs(x: Tensor) -> int:
    if not x.is_cuda:
        return _BLOCKS_PER_MULTIPROCESSOR
    properties = torch.cuda.get_device_properties(x.device)
    return _BLOCKS_PER_MULTIPROCESSOR * int(properties.multi_processor_count)


def _plan(
    x: Tensor, clean: int, tile: dict[int, int], per_sample: bool, most_tiles: int | None
) -> _Launch:
    """Cut ``x`` into segments: samples, or as many rows as give each program even work.

    Args:
        most_tiles: the most tiles a segment may have; None: as few segments as fill the GPU, for
            kernels that leave one partial result each.
    """
    n, channels, height, width = x.shape
    blocks = _blocks(tile, x.element_size(), channels)
    channel_blocks = triton.cdiv(channels, blocks["BLOCK_C"])
    area = height * width
    clean_rows, rows = clean * area, n * area
    if per_sample:
        segment_rows = area
    else:
        tiles = triton.cdiv(clean_rows, blocks["BLOCK_R"])
        tiles += triton.cdiv(rows - clean_rows, blocks["BLOCK_R"])
        each = triton.cdiv(tiles * channel_blocks, _programs(x))
        segment_rows = blocks["BLOCK_R"] * (each if most_tiles is None else min(each, most_tiles))
    clean_segments = triton.cdiv(clean_rows, segment_rows)
    segments = clean_segments + triton.cdiv(rows - clean_rows, segment_rows)
    return _Launch(
        grid=(segments * channel_blocks,),
        segments=segments,
        integers=(channels, clean_rows, rows, clean_segments, segment_rows),
        clean_segments=clean_segments,
        segment_rows=segment_rows,
        constants={"ALIGNED": channels % 16 == 0, **blocks, "num_warps": warps(_NUM_WARPS)},
    )


def _combine_grid(channels: int) -> tuple[int, int]:
    return triton.cdiv(channels, _COMBINE["BLOCK_C"]), 2


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _mask_shape(x: Tensor) -> tuple[int, int]:
    n, channels, height, width = x.shape
    return n * height * width, (channels + 7) // 8


@torch.library.custom_op(
    "arat_kernels::split_batch_norm_statistics", mutates_args=("running_mean", "running_var")
)
def statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    clean: int,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (2, C), of ``x``; moves the running ones if they are given."""
    plan = _plan(x, clean, _STATISTICS_TILE, per_sample=False, most_tiles=None)
    channels = x.shape[1]
    dtype = _accumulator(x)
    partial = torch.empty((plan.segments, 2, channels), dtype=dtype, device=x.device)
    mean = torch.empty((2, channels), dtype=dtype, device=x.device)
    var = torch.empty_like(mean)
    with torch.cuda.device_of(x):
        split_batch_norm_statistics_kernel[plan.grid](
            aligned(x), partial, *plan.integers, **plan.constants
        )
        split_batch_norm_combine_kernel[_combine_grid(channels)](
            partial,
            mean,
            var,
            running_mean,
            running_var,
            *plan.integers[:4],
            plan.segments,
            plan.segment_rows,
            momentum,
            **_COMBINE,
            num_warps=warps(_COMBINE_WARPS),
        )
    return mean, var


@statistics.register_fake
def _(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    clean: int,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    mean = x.new_empty((2, x.shape[1]), dtype=_accumulator(x))
    return mean, torch.empty_like(mean)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the pooled feature and ReLU's bits; the last two are empty where they are not wanted.

    ``counts``, ``batch_statistics`` and ``group_name`` say how ``mean`` and ``var`` depend on
    ``x``, which the backward needs.
    """
    tile = _POOLED_TILE if pooled else _FORWARD_TILE
    plan = _plan(x, clean, tile, per_sample=pooled, most_tiles=_STREAMING_TILES)
    y, features, mask = _normalize_outputs(x, pooled, save_mask)
    with torch.cuda.device_of(x):
        split_batch_norm_fwd_kernel[plan.grid](
            aligned(x),
            aligned_or_none(residual),
            aligned(mean),
            aligned(var),
            aligned_or_none(weight),
            aligned_or_none(bias),
            y,
            features if pooled else None,
            mask if save_mask else None,
            *plan.integers,
            eps,
            RELU=relu,
            **plan.constants,
        )
    return y, features, mask


def _normalize_outputs(x: Tensor, pooled: bool, save_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    features = x.new_empty(x.shape[:2] if pooled else (0, 0), dtype=_accumulator(x))
    mask = x.new_empty(_mask_shape(x) if save_mask else (0, 0), dtype=torch.uint8)
    return y, features, mask


@normalize.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    return _normalize_outputs(x, pooled, save_mask)


@torch.library.custom_op("arat_kernels::split_batch_norm_backward_sums", mutates_args=())
def backward_sums(
    dy: Tensor,
    dpooled: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    """The gradients of bias and weight, (2, 2, C); and the residual's, or nothing."""
    plan = _plan(x, clean, _BACKWARD_TILE, per_sample=dpooled is not None, most_tiles=None)
    channels = x.shape[1]
    partial = torch.empty((plan.segments, 2, channels), dtype=mean.dtype, device=x.device)
    sums = torch.empty((2, 2, channels), dtype=mean.dtype, device=x.device)
    dresidual = _like_or_empty(dy, want_dresidual)
    with torch.cuda.device_of(x):
        split_batch_norm_bwd_sums_kernel[plan.grid](
            aligned(dy),
            aligned_or_none(dpooled),
            aligned(x),
            aligned(mean),
            aligned(var),
            aligned_or_none(weight),
            aligned_or_none(bias),
            mask,
            partial,
            dresidual if want_dresidual else None,
            *plan.integers,
            eps,
            RELU=relu,
            **plan.constants,
        )
        split_batch_norm_bwd_combine_kernel[_combine_grid(channels)](
            partial,
            sums,
            channels,
            plan.clean_segments,
            plan.segments,
            **_COMBINE,
            num_warps=warps(_COMBINE_WARPS),
        )
    return sums, dresidual


def _like_or_empty(like: Tensor, wanted: bool) -> Tensor:
    if wanted:
        return torch.empty_like(like, memory_format=torch.channels_last)
    return like.new_empty((0, 0, 0, 0))


@backward_sums.register_fake
def _(
    dy: Tensor,
    dpooled: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    return mean.new_empty((2, 2, x.shape[1])), _like_or_empty(dy, want_dresidual)


@torch.library.custom_op("arat_kernels::split_batch_norm_backward_input", mutates_args=())
def backward_input(
    dy: Tensor,
    dpooled: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    sums: Tensor | None,
    counts: Tensor | None,
    clean: int,
    eps: float,
    relu: bool,
    want_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x; and the residual's, or nothing."""
    plan = _plan(
        x, clean, _BACKWARD_TILE, per_sample=dpooled is not None, most_tiles=_STREAMING_TILES
    )
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dresidual = _like_or_empty(dy, want_dresidual)
    with torch.cuda.device_of(x):
        split_batch_norm_bwd_input_kernel[plan.grid](
            aligned(dy),
            aligned_or_none(dpooled),
            aligned(x),
            aligned(mean),
            aligned(var),
            aligned_or_none(weight),
            aligned_or_none(bias),
            mask,
            aligned_or_none(sums),
            aligned_or_none(counts),
            dx,
            dresidual if want_dresidual else None,
            *plan.integers,
            eps,
            RELU=relu,
            **plan.constants,
        )
    return dx, dresidual


@backward_input.register_fake
def _(
    dy: Tensor,
    dpooled: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    sums: Tensor | None,
    counts: Tensor | None,
    clean: int,
    eps: float,
    relu: bool,
    want_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        _like_or_empty(dy, want_dresidual),
    )


_X, _RESIDUAL, _WEIGHT, _BIAS = 0, 1, 4, 5


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, mean, var, weight, bias, counts = inputs[:7]
    ctx.clean, ctx.eps, ctx.relu, ctx.pooled, save_mask = inputs[7:12]
    ctx.batch_statistics, ctx.group_name = inputs[12:]
    ctx.has_residual = residual is not None
    ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    mask = output[2] if save_mask else None
    ctx.save_for_backward(x, mean, var, weight, bias, counts, mask)


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


def _backward(ctx: Any, dy: Tensor, dpooled: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, var, weight, bias, counts, mask = ctx.saved_tensors
    want_x, want_weight, want_bias = (_asked(ctx, index) for index in (_X, _WEIGHT, _BIAS))
    want_residual = ctx.has_residual and _asked(ctx, _RESIDUAL)
    dy = dy.contiguous(memory_format=torch.channels_last)
    features = dpooled.contiguous() if ctx.pooled else None
    affine = (x, mean, var, weight, bias)
    # Without ReLU the residual's gradient is dy itself, and nothing has to be written.
    write_residual = want_residual and ctx.relu
    dresidual = dy if want_residual else None
    relu = ctx.relu
    sums = total = dx = dweight = dbias = None
    if want_weight or want_bias or (want_x and ctx.batch_statistics):
        sums, written = backward_sums(
            dy, features, *affine, mask, ctx.clean, ctx.eps, relu, write_residual
        )
        if write_residual:
            # Already stopped by ReLU: the next pass reads it in place of dy and the bits.
            dy = dresidual = written
            mask, relu, write_residual = None, False, False
        dbias = sums[0].to(bias.dtype) if want_bias else None
        dweight = sums[1].to(weight.dtype) if want_weight else None
        if ctx.batch_statistics:
            total = sums
            if ctx.group_name is not None and want_x:
                total = sum_over_group(sums, ctx.group_name)
    if want_x or write_residual:
        dx, written = backward_input(
            dy, features, *affine, mask, total, counts, ctx.clean, ctx.eps, relu, write_residual
        )
        if write_residual:
            dresidual = written
    return (dx if want_x else None, dresidual, None, None, dweight, dbias, *[None] * 8)


normalize.register_autograd(_backward, setup_context=_setup_context)


def split_batch_norm_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    sizes: tuple[int, int],
    *,
    training: bool,
    update_running_stats: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    return_pooled: bool,
    group_name: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results as in :func:`arat_kernels.split_batch_norm.api.split_batch_norm`."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    # The kernels have no variants for narrower parameters, which (2, C) would not repay.
    wide = _accumulator(x)
    weight = None if weight is None else weight.to(wide).contiguous()
    bias = None if bias is None else bias.to(wide).contiguous()
    clean = sizes[0]
    counts = None
    if training:
        update = update_running_stats and group_name is None
        mean, var = statistics(
            x.detach(),
            running_mean if update else None,
            running_var if update else None,
            clean,
            momentum,
        )
        if group_name is not None:
            area = x.shape[2] * x.shape[3]
            rows = (clean * area, sizes[1] * area)
            mean, var, counts = gather_statistics(mean, var, rows, group_name)
            if update_running_stats:
                move_running_statistics(running_mean, running_var, mean, var, counts, momentum)
    else:
        mean, var = (buffer.to(wide) for buffer in (running_mean, running_var))
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, residual)
    )
    # Without a residual ReLU's mask follows from x, which the backward reads anyway.
    save_mask = relu and residual is not None and differentiable
    y, pooled, _ = normalize(
        x,
        residual,
        mean,
        var,
        weight,
        bias,
        counts,
        clean,
        eps,
        relu,
        return_pooled,
        save_mask,
        training,
        group_name if training else None,
    )
    if not channels_last:
        y = y.contiguous()
    return y, pooled if return_pooled else None


_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
_INTEGERS = {
    "channels": "i32",
    "clean_rows": "i64",
    "rows": "i64",
    "clean_segments": "i64",
    "segments": "i64",
    "segment_rows": "i64",
}
# Representatives of each entry of _BLOCK_C; the last three are no multiples of 16, so that their
# accesses are narrow.
_CHANNELS = (16, 32, 64, 12, 28, 60)


def aot_cases() -> list[AotCase]:
    """Every block shape and alignment in every dtype with all that a kernel can be given, float64
    with 64 channels alone; in bf16 with 64 channels the combinations that layers use."""
    cases = []
    for kind, channels in product(("bf16", "fp16", "fp32"), _CHANNELS):
        cases += _bulk_cases(kind, channels, _EVERYTHING)
    cases += _bulk_cases("fp64", 64, _EVERYTHING)
    cases += _bulk_cases("bf16", 64, _VARIANTS)
    cases += _combine_cases()
    return list({case.name: case for case in cases}.values())


@dataclass(frozen=True)
class _Variant:
    """Which of the optional tensors of the kernels are there.

    Args:
        label: of the variant, in the names of its cases.
        gradient: a backward follows.
        batch: the statistics are those of the batch.
        counts: of several processes.
        dresidual: the residual's gradient is asked for.
        kernels: the last words of the names of those that are compiled; None: all of a layer.
    """

    label: str
    residual: bool = True
    affine: bool = True
    pooled: bool = True
    relu: bool = True
    gradient: bool = True
    batch: bool = True
    counts: bool = False
    dresidual: bool = True
    kernels: tuple[str, ...] | None = None


# All that each kernel can be given at once; its other launches do less of the same. A backward
# without the bits of ReLU computes it again and is not less.
_EVERYTHING = [
    _Variant("", kernels=("statistics", "fwd", "bwd_sums")),
    _Variant("bn+add+relu", pooled=False, kernels=("fwd",)),
    _Variant("bn+relu+pooled", residual=False, kernels=("bwd_sums",)),
    _Variant("bn+relu+pooled, counts", residual=False, counts=True, kernels=("bwd_input",)),
    _Variant(
        "bn+add+relu+pooled, constant residual, counts",
        counts=True,
        dresidual=False,
        kernels=("bwd_input",),
    ),
    _Variant("bn+add+relu+pooled, running", batch=False, kernels=("bwd_input",)),
]
_INPUT = ("bwd_input",)
_VARIANTS = [
    _Variant("bn", residual=False, pooled=False, relu=False),
    _Variant("bn+relu", residual=False, pooled=False),
    _Variant("bn+relu+pooled", residual=False),
    _Variant("bn+add", pooled=False, relu=False),
    _Variant("bn+add+relu", pooled=False),
    _Variant("bn+add+relu, no gradient", pooled=False, gradient=False),
    _Variant("bn+add+relu, no affine", pooled=False, affine=False),
    _Variant("bn+add+relu, running", pooled=False, batch=False, kernels=_INPUT),
    _Variant("bn+relu, running", residual=False, pooled=False, batch=False, kernels=_INPUT),
    _Variant("bn+relu+pooled, running", residual=False, batch=False, kernels=_INPUT),
    _Variant("bn+add+relu, counts", pooled=False, counts=True, kernels=_INPUT),
    _Variant("bn+add+relu+pooled, counts", counts=True, kernels=_INPUT),
]


def _bulk_cases(kind: str, channels: int, variants: list[_Variant]) -> list[AotCase]:
    acc = "fp64" if kind == "fp64" else "fp32"
    all_of_16 = channels % 16 == 0
    cases = []

    def add(
        kernel: Any,
        variant: _Variant,
        tile: dict[int, int],
        pointers: dict[str, str | None],
        bulk: tuple[str, ...],
        moved: str,
        **constexprs: Any,
    ) -> None:
        which = kernel.__name__.removeprefix("split_batch_norm_").removesuffix("_kernel")
        if variant.kernels is not None and which not in variant.kernels:
            return
        types = {name: f"*{type_}" for name, type_ in pointers.items() if type_ is not None}
        scalars = {name: kind_ for name, kind_ in _INTEGERS.items() if name in kernel.arg_names}
        if "eps" in kernel.arg_names:
            scalars["eps"] = "fp32"
        blocks = _blocks(tile, _SIZES[kind], channels)
        details = f"{kind}, C {channels}{', ' if variant.label else ''}{variant.label}"
        cases.append(
            AotCase(
                name=f"{kernel.__name__}[{details}]",
                kernel=kernel,
                signature={**types, **scalars},
                constexprs={
                    **{name: None for name, type_ in pointers.items() if type_ is None},
                    **constexprs,
                    **blocks,
                    "ALIGNED": all_of_16,
                },
                num_warps=_NUM_WARPS,
                num_stages=3,
                bytes_per_element=moved,
                note=(
                    "64 channels of 16 bits are a 128-byte line; rows fill the tile up to one or "
                    "two 16-byte accesses per thread and tensor, so that several blocks of 8 warps "
                    "are resident and hide latency."
                ),
                bulk=bulk if all_of_16 else (),
            )
        )

    size = _SIZES[kind]
    for v in variants:
        if v.kernels is not None:
            add(
                split_batch_norm_statistics_kernel,
                v,
                _STATISTICS_TILE,
                {"x_ptr": kind, "partial_ptr": acc},
                ("x_ptr",),
                f"{size}: x read",
            )
        affine = {name: acc if v.affine else None for name in ("weight_ptr", "bias_ptr")}
        mask = "u8" if v.relu and v.residual and v.gradient else None
        add(
            split_batch_norm_fwd_kernel,
            v,
            _POOLED_TILE if v.pooled else _FORWARD_TILE,
            {
                "x_ptr": kind,
                "residual_ptr": kind if v.residual else None,
                "mean_ptr": acc,
                "var_ptr": acc,
                **affine,
                "y_ptr": kind,
                "pooled_ptr": acc if v.pooled else None,
                "mask_ptr": mask,
            },
            ("x_ptr", "y_ptr", *(("residual_ptr",) if v.residual else ())),
            f"{size * (3 if v.residual else 2)}{' + 1/8' if mask else ''}: x"
            f"{', residual' if v.residual else ''} read, y{', mask' if mask else ''} written",
            RELU=v.relu,
        )
        if not v.gradient:
            continue
        shared = {
            "dy_ptr": kind,
            "dpooled_ptr": acc if v.pooled else None,
            "x_ptr": kind,
            "mean_ptr": acc,
            "var_ptr": acc,
            **affine,
        }
        dresidual = kind if v.residual and v.relu and v.dresidual else None
        written = ("dresidual_ptr",) if dresidual else ()
        if v.batch and not v.counts:
            add(
                split_batch_norm_bwd_sums_kernel,
                v,
                _BACKWARD_TILE,
                {**shared, "mask_ptr": mask, "partial_ptr": acc, "dresidual_ptr": dresidual},
                ("dy_ptr", "x_ptr", *written),
                f"{size * (3 if dresidual else 2)}{' + 1/8' if mask else ''}: dy, x"
                f"{', mask' if mask else ''} read{', dresidual written' if dresidual else ''}",
                RELU=v.relu,
            )
        # In training the sums kernel has left the residual's gradient, already stopped by ReLU.
        stopped = v.batch and dresidual is not None
        masked = mask if not stopped else None
        written = ("dresidual_ptr",) if dresidual and not stopped else ()
        reads_x = v.batch or v.pooled or (v.relu and masked is None and not stopped)
        add(
            split_batch_norm_bwd_input_kernel,
            v,
            _BACKWARD_TILE,
            {
                **shared,
                "mask_ptr": masked,
                "sums_ptr": acc if v.batch else None,
                "counts_ptr": acc if v.counts else None,
                "dx_ptr": kind,
                "dresidual_ptr": dresidual if written else None,
            },
            ("dy_ptr", "dx_ptr", *(("x_ptr",) if reads_x else ()), *written),
            f"{size * (2 + reads_x + len(written))}{' + 1/8' if masked else ''}: dy"
            f"{', x' if reads_x else ''}{', mask' if masked else ''} read, dx"
            f"{', dresidual' if written else ''} written",
            RELU=v.relu and not stopped,
        )
    return cases


def _combine_cases() -> list[AotCase]:
    note = "8 channels are a 32-byte sector; a tile of 64 segments keeps the loop short."
    cases = []
    forward = split_batch_norm_combine_kernel
    buffers = ("running_mean_ptr", "running_var_ptr")
    for acc, running in (
        ("fp32", None),
        ("fp32", "fp32"),
        ("fp32", "bf16"),
        ("fp32", "fp16"),
        ("fp64", None),
        ("fp64", "fp64"),
    ):
        pointers = dict.fromkeys(("partial_ptr", "mean_ptr", "var_ptr"), f"*{acc}")
        given = dict.fromkeys(buffers, f"*{running}") if running else {}
        label = f", running {running}" if running else ""
        cases.append(
            AotCase(
                name=f"{forward.__name__}[{acc}{label}]",
                kernel=forward,
                signature={**pointers, **given, **_INTEGERS, "momentum": "fp32"},
                constexprs={**({} if running else dict.fromkeys(buffers)), **_COMBINE},
                num_warps=_COMBINE_WARPS,
                num_stages=3,
                bytes_per_element="per segment and channel 12: mean twice, squares once",
                note=note,
            )
        )
    backward = split_batch_norm_bwd_combine_kernel
    integers = {name: _INTEGERS[name] for name in ("channels", "clean_segments", "segments")}
    cases += [
        AotCase(
            name=f"{backward.__name__}[{acc}]",
            kernel=backward,
            signature={"partial_ptr": f"*{acc}", "sums_ptr": f"*{acc}", **integers},
            constexprs=dict(_COMBINE),
            num_warps=_COMBINE_WARPS,
            num_stages=3,
            bytes_per_element="per segment and channel 8: both sums",
            note=note,
        )
        for acc in ("fp32", "fp64")
    ]
    return cases
