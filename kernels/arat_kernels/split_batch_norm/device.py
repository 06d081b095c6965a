"""What the kernels of split BatchNorm and their launchers share."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are pointers and values of Triton, which have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.offsets import start_of

# Bytes of partial results at once: two accumulators and two loads of 4 registers per thread. With 8
# some launches spill, for channels that are no multiple of 16.
COMBINED_BYTES = 4096


@triton.jit
def partial_of(partial_ptr, which, segment, ok, channels, c, NUMBER: tl.constexpr):
    """One of ``NUMBER`` results of some segments, by other programs: not from the L1."""
    at = start_of(segment, NUMBER * channels)[:, None] + (which * channels + c)[None, :]
    return tl.load(partial_ptr + at, mask=ok, other=0.0, cache_modifier=".cg")


@triton.jit
def merged(
    partial_ptr,  # the branch's segments
    number,
    total,
    segment_rows,
    channels,
    c,
    c_ok,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and centred sum of squares of a branch from those of its segments."""
    acc = partial_ptr.dtype.element_ty
    s = tl.arange(0, BLOCK_S)
    counts = tl.zeros((BLOCK_S,), acc)
    means = tl.zeros((BLOCK_S, BLOCK_C), acc)
    squares = tl.zeros((BLOCK_S, BLOCK_C), acc)
    # Chan's formula, lane by lane; products in an order that does not overflow before 0 does.
    for i in tl.range(0, number, BLOCK_S, num_stages=3):
        k = (i + s).to(tl.int64)
        ok = (k < number)[:, None] & c_ok[None, :]
        mean = partial_of(partial_ptr, 0, k, ok, channels, c, 2)
        inner = partial_of(partial_ptr, 1, k, ok, channels, c, 2)
        count = tl.minimum(total - k * segment_rows, segment_rows)
        count = tl.where(k < number, count, 0).to(acc)
        share = count / tl.maximum(counts + count, 1.0)
        d = mean - means
        means += d * share[:, None]
        squares += inner + d * (d * (counts * share)[:, None])
        counts += count
    # The first lane's mean is near the others: their differences keep all digits.
    shift = tl.sum(tl.where((s == 0)[:, None], means, 0.0), axis=0)
    offset = tl.sum((means - shift[None, :]) * counts[:, None], axis=0) / total.to(acc)
    d = (means - shift[None, :]) - offset[None, :]
    return shift + offset, tl.sum(squares + d * (d * counts[:, None]), axis=0)


@triton.jit
def store_bits(
    mask_ptr, stopped, first, inside, block, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One bit for each element (BLOCK_R, BLOCK_C) of a tile: whether ReLU has not stopped it."""
    width = (channels + 7) // 8
    bits = tl.reshape(tl.where(stopped, 0, 1), (BLOCK_R, BLOCK_C // 8, 8))
    packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
    byte = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    row = tl.arange(0, BLOCK_R)
    tl.store(
        mask_ptr + start_of(first, width) + row[:, None] * width + byte[None, :],
        packed.to(tl.uint8),
        mask=inside[:, None] & (byte < width)[None, :],
    )


@triton.jit
def load_bits(
    mask_ptr, first, inside, block, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The bits that the forward kernel stored for one tile, packed as they were."""
    width = (channels + 7) // 8
    byte = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    row = tl.arange(0, BLOCK_R)
    ok = inside[:, None] & (byte < width)[None, :]
    at = mask_ptr + start_of(first, width) + row[:, None] * width + byte[None, :]
    return tl.load(at, mask=ok, other=0)


@triton.jit
def unpacked(bits, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The bits of one tile as booleans (BLOCK_R, BLOCK_C)."""
    each = (bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(each, (BLOCK_R, BLOCK_C)) != 0


@triton.jit
def affine_of(mean_ptr, var_ptr, weight_ptr, bias_ptr, row, c_ok, eps):
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


@triton.jit
def store_statistics(
    mean,
    squares,  # centred sum
    total,
    rows,
    branch,
    channel,  # the first
    channels,
    c,
    c_ok,
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,
    momentum,
):
    """What the kernel of the statistics says of its pointers, for one branch and some channels."""
    row = branch * channels + c
    tl.store(mean_ptr + row, mean, mask=c_ok)
    tl.store(var_ptr + row, squares / total.to(mean.dtype), mask=c_ok)
    if total == rows:
        # The other branch has no samples, and no program.
        other = (1 - branch) * channels + c
        tl.store(mean_ptr + other, tl.zeros_like(mean), mask=c_ok)
        tl.store(var_ptr + other, tl.zeros_like(mean), mask=c_ok)
    if tracked_ptr is not None:
        tl.store(tracked_ptr + branch, tl.load(tracked_ptr + branch) + 1, mask=channel == 0)
    if running_mean_ptr is not None:
        unbiased = squares / tl.maximum(total - 1, 1).to(mean.dtype)
        old = tl.load(running_mean_ptr + row, mask=c_ok, other=0.0).to(mean.dtype)
        new = old + momentum * (mean - old)
        tl.store(running_mean_ptr + row, new.to(running_mean_ptr.dtype.element_ty), mask=c_ok)
        old = tl.load(running_var_ptr + row, mask=c_ok, other=0.0).to(mean.dtype)
        new = old + momentum * (unbiased - old)
        tl.store(running_var_ptr + row, new.to(running_var_ptr.dtype.element_ty), mask=c_ok)


def programs_of(x: Tensor, resident: int) -> int:
    """Programs that run at once where a multiprocessor holds ``resident``."""
    if not x.is_cuda:
        return resident
    properties = torch.cuda.get_device_properties(x.device)
    return resident * int(properties.multi_processor_count)


def like(t: Tensor, wanted: bool = True) -> Tensor:
    """Memory for a tensor like ``t``, channels_last; where it is not wanted, nothing."""
    if wanted:
        return torch.empty_like(t, memory_format=torch.channels_last)
    return t.new_empty((0, 0, 0, 0))
