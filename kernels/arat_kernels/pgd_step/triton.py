"""Triton implementation of the PGD update and its random start."""

# Kernel arguments have Triton's types, which annotations cannot say.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.implementation import warps
from arat_kernels.layout import aligned, batch_dense, in_layout_of
from arat_kernels.offsets import start_of
from arat_kernels.pgd_step.reference import SPARSITY
from arat_kernels.philox import device as philox
from arat_kernels.philox import streams
from arat_kernels.philox.reference import check_rng
from arat_kernels.rounding import round_to_bf16

# Integers are not specialised on their value; ALIGNED says whether they are multiples of 16, as the
# sizes of most images are.
_PLAIN = ["numel", "size", "num_moved", "rng_ptr", "first_group", "first_sample"]

_START: tl.constexpr = tl.constexpr(streams.RANDOM_START)
_RADIUS: tl.constexpr = tl.constexpr(streams.RANDOM_START_RADIUS)
_TWO_PI: tl.constexpr = tl.constexpr(2 * math.pi)
_MIN_NORM: tl.constexpr = tl.constexpr(1e-12)


@triton.jit
def _clamp(value, low, high):
    """``value`` in [low, high]; NaN stays NaN, which ``tl.minimum`` would drop."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def _norm(sum_of_squares):
    """The norm, not below ``_MIN_NORM``; NaN stays NaN."""
    norm = tl.sqrt(sum_of_squares)
    return tl.where(norm < _MIN_NORM, _MIN_NORM, norm)


@triton.jit
def _high(at, CHANNELS: tl.constexpr, OF_PARTS: tl.constexpr):
    """Where the high part of element ``at`` of channels_last images is, ``OF_PARTS`` channels
    wide."""
    return at // CHANNELS * OF_PARTS + at % CHANNELS


@triton.jit
def _store(x_adv_ptr, parts_ptr, at, x_adv, mask, CHANNELS: tl.constexpr, OF_PARTS: tl.constexpr):
    """An element of x_adv, and both its parts."""
    tl.store(x_adv_ptr + at, x_adv, mask)
    if parts_ptr is not None:
        high = round_to_bf16(x_adv)
        low = round_to_bf16(x_adv - high)
        place = parts_ptr + _high(at, CHANNELS, OF_PARTS)
        tl.store(place, high.to(tl.bfloat16), mask)
        tl.store(place + CHANNELS, low.to(tl.bfloat16), mask)


@triton.jit
def _gradient(grad_ptr, parts_ptr, at, mask, CHANNELS: tl.constexpr, OF_PARTS: tl.constexpr):
    """An element of the gradient of x_adv, which is that of the high parts where there are any."""
    if parts_ptr is not None:
        at = _high(at, CHANNELS, OF_PARTS)
    return tl.load(grad_ptr + at, mask, other=0.0)


@triton.jit(do_not_specialize=_PLAIN)
def pgd_step_linf_kernel(
    x_adv_ptr,  # (numel,) float32, in memory order, changed in place
    grad_ptr,  # (numel,) any float; with parts_ptr as parts
    x_ptr,  # (numel,) as x_adv
    parts_ptr,  # (numel / CHANNELS, OF_PARTS) bfloat16, those of x_adv, or None
    eps,
    alpha,
    numel: tl.int64,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    OF_PARTS: tl.constexpr,
):
    if ALIGNED:
        numel = numel // 16 * 16
    at = start_of(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
    mask = at < numel
    x_adv = tl.load(x_adv_ptr + at, mask)
    x = tl.load(x_ptr + at, mask)
    grad = _gradient(grad_ptr, parts_ptr, at, mask, CHANNELS, OF_PARTS).to(x_adv.dtype)
    # The last alternative is 0, -0 or NaN and stays what it is.
    sign = tl.where(grad > 0, 1.0, tl.where(grad < 0, -1.0, grad)).to(x_adv.dtype)
    moved = _clamp(x_adv + alpha * sign, x - eps, x + eps)
    _store(x_adv_ptr, parts_ptr, at, _clamp(moved, 0.0, 1.0), mask, CHANNELS, OF_PARTS)


@triton.jit(do_not_specialize=_PLAIN)
def pgd_step_l2_kernel(
    x_adv_ptr,  # (N, size) float32, in memory order, changed in place
    grad_ptr,  # (N, size) any float; with parts_ptr as parts
    x_ptr,  # (N, size) as x_adv
    parts_ptr,  # (N, size / CHANNELS, OF_PARTS) bfloat16, those of x_adv, or None
    eps,
    alpha,
    size: tl.int32,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # size <= BLOCK: a sample stays in registers
    CHANNELS: tl.constexpr,
    OF_PARTS: tl.constexpr,
):
    if ALIGNED:
        size = size // 16 * 16
    base = start_of(tl.program_id(0), size)
    at = tl.arange(0, BLOCK)
    if ONE_BLOCK:
        mask = at < size
        x_adv = tl.load(x_adv_ptr + base + at, mask, other=0.0)
        x = tl.load(x_ptr + base + at, mask, other=0.0)
        grad = _gradient(grad_ptr, parts_ptr, base + at, mask, CHANNELS, OF_PARTS).to(x_adv.dtype)
        delta = x_adv + alpha * (grad / _norm(tl.sum(grad * grad))) - x
        length = tl.sqrt(tl.sum(delta * delta))
        scale = tl.where(length > eps, eps / length, 1.0).to(x_adv.dtype)
        value = _clamp(x + delta * scale, 0.0, 1.0)
        _store(x_adv_ptr, parts_ptr, base + at, value, mask, CHANNELS, OF_PARTS)
    else:
        kind = x_adv_ptr.dtype.element_ty
        squares = tl.zeros((BLOCK,), kind)
        for start in range(0, size, BLOCK):
            mask = start + at < size
            place = base + start + at
            grad = _gradient(grad_ptr, parts_ptr, place, mask, CHANNELS, OF_PARTS).to(kind)
            squares += grad * grad
        grad_norm = _norm(tl.sum(squares))
        squares = tl.zeros((BLOCK,), kind)
        for start in range(0, size, BLOCK):
            mask = start + at < size
            x_adv = tl.load(x_adv_ptr + base + start + at, mask, other=0.0)
            x = tl.load(x_ptr + base + start + at, mask, other=0.0)
            place = base + start + at
            grad = _gradient(grad_ptr, parts_ptr, place, mask, CHANNELS, OF_PARTS).to(kind)
            delta = x_adv + alpha * (grad / grad_norm) - x
            squares += delta * delta
        length = tl.sqrt(tl.sum(squares))
        scale = tl.where(length > eps, eps / length, 1.0).to(kind)
        for start in range(0, size, BLOCK):
            mask = start + at < size
            x_adv = tl.load(x_adv_ptr + base + start + at, mask)
            x = tl.load(x_ptr + base + start + at, mask)
            place = base + start + at
            grad = _gradient(grad_ptr, parts_ptr, place, mask, CHANNELS, OF_PARTS).to(kind)
            delta = x_adv + alpha * (grad / grad_norm) - x
            value = _clamp(x + delta * scale, 0.0, 1.0)
            _store(x_adv_ptr, parts_ptr, place, value, mask, CHANNELS, OF_PARTS)


@triton.jit
def _sparse_sign(grad, threshold):
    """-1, 0 or 1, 0 below the threshold; NaN stays NaN."""
    sign = tl.where(grad > 0, 1.0, tl.where(grad < 0, -1.0, grad))
    return tl.where(tl.abs(grad) < threshold, 0.0, sign).to(grad.dtype)


@triton.jit
def _l1_delta(x_adv, grad, x, threshold, length, back):
    """The perturbation after a step of ``length`` along the gradients that reach ``threshold``,
    then ``back`` shorter and cut off by [0, 1]."""
    delta = x_adv + length * _sparse_sign(grad, threshold) - x
    upwards = delta > 0
    size = _clamp(tl.abs(delta) - back, 0.0, tl.where(upwards, 1 - x, x))
    return tl.where(upwards, size, -size)


@triton.jit(do_not_specialize=_PLAIN)
def pgd_step_l1_kernel(
    x_adv_ptr,  # (N, size) float32, in memory order, changed in place
    grad_ptr,  # (N, size) any float; with parts_ptr as parts
    x_ptr,  # (N, size) as x_adv
    parts_ptr,  # (N, size / CHANNELS, OF_PARTS) bfloat16, those of x_adv, or None
    eps,
    alpha,
    size: tl.int32,
    num_moved: tl.int32,  # components that a step moves
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    OF_PARTS: tl.constexpr,
):
    """Both unknown lengths are found exactly, bit by bit: numbers >= 0 are in the order of their
    bits. Each bit is a pass over the sample, which is read from the caches again and again."""
    if ALIGNED:
        size = size // 16 * 16
    base = start_of(tl.program_id(0), size)
    at = tl.arange(0, BLOCK)
    kind: tl.constexpr = x_adv_ptr.dtype.element_ty
    word: tl.constexpr = tl.int64 if kind == tl.float64 else tl.int32
    num_bits: tl.constexpr = kind.primitive_bitwidth - 1
    one = tl.full((), 1, word)
    # The largest number that as many gradients as are to move reach.
    bits = one - one
    for bit in range(num_bits - 1, -1, -1):
        candidate = bits | (one << bit)
        reached = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, size, BLOCK):
            mask = start + at < size
            place = base + start + at
            grad = _gradient(grad_ptr, parts_ptr, place, mask, CHANNELS, OF_PARTS).to(kind)
            reached += (tl.abs(grad) >= candidate.to(kind, bitcast=True)).to(tl.int32)
        bits = tl.where(tl.sum(reached) >= num_moved, candidate, bits)
    threshold = bits.to(kind, bitcast=True)
    moved = tl.zeros((BLOCK,), kind)
    for start in range(0, size, BLOCK):
        mask = start + at < size
        place = base + start + at
        grad = _gradient(grad_ptr, parts_ptr, place, mask, CHANNELS, OF_PARTS).to(kind)
        moved += tl.abs(_sparse_sign(grad, threshold))
    num = tl.sum(moved)
    length = alpha / tl.where(num < 1, 1.0, num)
    # The largest number that is not far enough back into the ball; the next one is.
    bits = one - one
    for bit in range(num_bits - 1, -1, -1):
        candidate = bits | (one << bit)
        back = candidate.to(kind, bitcast=True)
        sizes = tl.zeros((BLOCK,), kind)
        for start in range(0, size, BLOCK):
            mask = start + at < size
            place = base + start + at
            x = tl.load(x_ptr + place, mask, other=0.0)
            x_adv = tl.load(x_adv_ptr + place, mask, other=0.0)
            grad = _gradient(grad_ptr, parts_ptr, place, mask, CHANNELS, OF_PARTS).to(kind)
            sizes += tl.abs(_l1_delta(x_adv, grad, x, threshold, length, back))
        bits = tl.where(tl.sum(sizes) - eps > 0, candidate, bits)
    back = (bits + 1).to(kind, bitcast=True)
    for start in range(0, size, BLOCK):
        mask = start + at < size
        place = base + start + at
        x = tl.load(x_ptr + place, mask)
        x_adv = tl.load(x_adv_ptr + place, mask)
        grad = _gradient(grad_ptr, parts_ptr, place, mask, CHANNELS, OF_PARTS).to(kind)
        delta = _l1_delta(x_adv, grad, x, threshold, length, back)
        value = _clamp(x + delta, 0.0, 1.0)
        _store(x_adv_ptr, parts_ptr, place, value, mask, CHANNELS, OF_PARTS)


@triton.jit(do_not_specialize=_PLAIN)
def random_start_linf_kernel(
    x_ptr,  # (numel,) float32, in memory order
    rng_ptr,  # (2,) int64: seed, offset
    x_adv_ptr,  # (numel,) as x
    eps,
    numel: tl.int64,
    first_group: tl.int64,  # of the batch, where x begins
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,  # four elements each, from one Philox block
):
    if ALIGNED:
        numel = numel // 16 * 16
    first = start_of(tl.program_id(0), GROUPS)
    index = first_group + first + tl.arange(0, GROUPS)
    w0, w1, w2, w3 = philox.random_words(rng_ptr, index, _START)
    word = philox.interleave(w0, w1, w2, w3, GROUPS)
    at = first * 4 + tl.arange(0, 4 * GROUPS)
    mask = at < numel
    x = tl.load(x_ptr + at, mask)
    delta = (2 * philox.unit(word) - 1).to(x.dtype) * eps
    tl.store(x_adv_ptr + at, x + delta, mask)


@triton.jit
def _normals(rng_ptr, index, GROUPS: tl.constexpr):
    w0, w1, w2, w3 = philox.random_words(rng_ptr, index, _START)
    # Near 1 the device's logarithm is an approximation that might have the wrong sign.
    radius0 = tl.sqrt(tl.maximum(-2 * tl.log(1 - philox.unit(w0)), 0.0))
    radius1 = tl.sqrt(tl.maximum(-2 * tl.log(1 - philox.unit(w2)), 0.0))
    angle0 = _TWO_PI * philox.unit(w1)
    angle1 = _TWO_PI * philox.unit(w3)
    return philox.interleave(
        radius0 * tl.cos(angle0),
        radius0 * tl.sin(angle0),
        radius1 * tl.cos(angle1),
        radius1 * tl.sin(angle1),
        GROUPS,
    )


@triton.jit
def _direction(rng_ptr, index, GROUPS: tl.constexpr, L1: tl.constexpr):
    """Normal numbers, in L1 Laplace's."""
    if L1:
        w0, w1, w2, w3 = philox.random_words(rng_ptr, index, _START)
        # The side of 0 and the distance from it, by one word.
        uniform = 2 * philox.unit(philox.interleave(w0, w1, w2, w3, GROUPS)) - 1
        distance = tl.minimum(tl.maximum(-tl.log(1 - tl.abs(uniform)), 0.0), 17.0)
        return tl.where(uniform > 0, distance, -distance)
    else:
        return _normals(rng_ptr, index, GROUPS)


@triton.jit
def _share(value, L1: tl.constexpr):
    """What an element adds to :func:`_length`'s sum."""
    return tl.abs(value) if L1 else value * value


@triton.jit
def _length(total, L1: tl.constexpr):
    return tl.maximum(total, _MIN_NORM) if L1 else _norm(total)


@triton.jit(do_not_specialize=_PLAIN)
def random_start_radial_kernel(
    x_ptr,  # (N, size) float32, in memory order
    rng_ptr,  # (2,) int64: seed, offset
    x_adv_ptr,  # (N, size) as x
    eps,
    size: tl.int32,
    first_sample: tl.int64,  # of the batch, where x begins
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,  # four elements each, from one Philox block
    ONE_BLOCK: tl.constexpr,  # size <= 4 * GROUPS: a sample stays in registers
    L1: tl.constexpr,
):
    if ALIGNED:
        size = size // 16 * 16
    base = start_of(tl.program_id(0), size)
    sample = first_sample + tl.program_id(0).to(tl.int64)
    kind = x_ptr.dtype.element_ty
    word, _, _, _ = philox.random_words(rng_ptr, sample + tl.zeros((1,), tl.int64), _RADIUS)
    radius = tl.sum(philox.unit(word)).to(kind) * eps
    group = tl.arange(0, GROUPS)
    at = tl.arange(0, 4 * GROUPS)
    if ONE_BLOCK:
        mask = at < size
        drawn = _direction(rng_ptr, (sample << 32) + group, GROUPS, L1).to(kind)
        shares = _share(tl.where(mask, drawn, 0.0), L1)
        scale = radius / _length(tl.sum(shares), L1)
        x = tl.load(x_ptr + base + at, mask)
        tl.store(x_adv_ptr + base + at, x + drawn * scale, mask)
    else:
        # Drawing twice costs less than storing the first draw.
        shares = tl.zeros((4 * GROUPS,), kind)
        for start in range(0, size, 4 * GROUPS):
            drawn = _direction(rng_ptr, (sample << 32) + start // 4 + group, GROUPS, L1).to(kind)
            shares += _share(tl.where(start + at < size, drawn, 0.0), L1)
        scale = radius / _length(tl.sum(shares), L1)
        for start in range(0, size, 4 * GROUPS):
            mask = start + at < size
            drawn = _direction(rng_ptr, (sample << 32) + start // 4 + group, GROUPS, L1).to(kind)
            x = tl.load(x_ptr + base + start + at, mask)
            tl.store(x_adv_ptr + base + start + at, x + drawn * scale, mask)


# Eight elements per thread: two float32 or one 16-bit vector of 16 bytes in flight per tensor, and
# enough blocks for every multiprocessor at batch 128.
LINF_BLOCK, LINF_WARPS = 1024, 4
# One block per sample, so that both norms stay inside it. Largest sample held in registers by a
# block of that size, with its warps (3 x 64 x 64 is 12288); longer ones loop over L2_LOOP_BLOCK,
# and so do odd ones and those with parts over 4096, whose narrow accesses need too many registers.
L2_BLOCKS = ((1024, 4), (4096, 8), (16384, 16))
L2_LOOP_BLOCK, L2_LOOP_WARPS = 4096, 8
# Up to 1024 elements, and above.
L1_BLOCKS = ((1024, 4), (2048, 8))
_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)


def _l2_block(size: int, regular: bool = True) -> tuple[int, int, bool]:
    """Block, warps and whether one block holds a sample of ``size`` elements, ``regular`` where all
    are read by 16 bytes."""
    for block, num_warps in L2_BLOCKS:
        if size <= block and (size % 16 == 0 and regular or block <= L2_LOOP_BLOCK):
            return block, num_warps, True
    return L2_LOOP_BLOCK, L2_LOOP_WARPS, False


@torch.library.custom_op("arat_kernels::pgd_step", mutates_args=("x_adv", "parts"))
def step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    parts: Tensor | None,
    eps: float,
    alpha: float,
    norm: str,
) -> None:
    """Arguments as in :func:`arat_kernels.pgd_step.api.pgd_step`; changes ``x_adv`` and ``parts``
    in place, which are channels_last if there are any."""
    if x_adv.numel() == 0:
        return
    dense = aligned(batch_dense(x_adv))
    # float64 gradients (and 8 bits) are not worth kernels of their own.
    grad = in_layout_of(
        grad if grad.dtype in _GRADIENTS else grad.to(x_adv.dtype),
        dense if parts is None else parts,
    )
    tensors = (dense, grad, in_layout_of(x, dense), parts)
    with torch.cuda.device_of(x_adv):
        _STEPS[norm](*tensors, eps, alpha)
    if dense is not x_adv:
        x_adv.copy_(dense)


step.register_fake(lambda *_: None)


@torch.library.custom_op("arat_kernels::random_start", mutates_args=())
def start(x: Tensor, rng: Tensor, eps: float, norm: str, first: int) -> Tensor:
    """Arguments and results as in :func:`arat_kernels.pgd_step.api.random_start`."""
    check_rng(rng)
    dense = aligned(batch_dense(x))
    x_adv = torch.empty_like(dense)
    if x.numel() == 0:
        return x_adv
    with torch.cuda.device_of(x):
        _STARTS[norm](dense, rng, x_adv, eps, first)
    return x_adv


start.register_fake(lambda x, *_: torch.empty_like(batch_dense(x)))


def _step_linf(
    x_adv: Tensor, grad: Tensor, x: Tensor, parts: Tensor | None, eps: float, alpha: float
) -> None:
    numel = x.numel()
    pgd_step_linf_kernel[(triton.cdiv(numel, LINF_BLOCK),)](
        x_adv,
        grad,
        x,
        parts,
        eps,
        alpha,
        numel,
        numel % 16 == 0,
        LINF_BLOCK,
        *_channels(x, parts),
        num_warps=warps(LINF_WARPS),
    )


def _step_l2(
    x_adv: Tensor, grad: Tensor, x: Tensor, parts: Tensor | None, eps: float, alpha: float
) -> None:
    size = x[0].numel()
    block, num_warps, one_block = _l2_block(size, regular=parts is None)
    pgd_step_l2_kernel[(x.shape[0],)](
        x_adv,
        grad,
        x,
        parts,
        eps,
        alpha,
        size,
        size % 16 == 0,
        block,
        one_block,
        *_channels(x, parts),
        num_warps=warps(num_warps),
    )


def _step_l1(
    x_adv: Tensor, grad: Tensor, x: Tensor, parts: Tensor | None, eps: float, alpha: float
) -> None:
    size = x[0].numel()
    block, num_warps = L1_BLOCKS[size > 1024]
    pgd_step_l1_kernel[(x.shape[0],)](
        x_adv,
        grad,
        x,
        parts,
        eps,
        alpha,
        size,
        math.ceil(SPARSITY * size),
        size % 16 == 0,
        block,
        *_channels(x, parts),
        num_warps=warps(num_warps),
    )


def _channels(x: Tensor, parts: Tensor | None) -> tuple[int, int]:
    return (1, 1) if parts is None else (x.shape[1], parts.shape[1])


def _start_linf(x: Tensor, rng: Tensor, x_adv: Tensor, eps: float, first: int) -> None:
    first_group, front = divmod(first * x[0].numel(), 4)
    if not front:
        _draw_linf(x, rng, x_adv, eps, first_group)
        return
    # Where the batch's groups of four do not begin with x, a front that is thrown away.
    longer = x.new_zeros(1, front + x.numel())
    longer[0, front:] = x.as_strided((x.numel(),), (1,))
    drawn = torch.empty_like(longer)
    _draw_linf(longer, rng, drawn, eps, first_group)
    x_adv.as_strided((x.numel(),), (1,)).copy_(drawn[0, front:])


def _draw_linf(x: Tensor, rng: Tensor, x_adv: Tensor, eps: float, first_group: int) -> None:
    numel = x.numel()
    random_start_linf_kernel[(triton.cdiv(numel, LINF_BLOCK),)](
        x,
        rng,
        x_adv,
        eps,
        numel,
        first_group,
        numel % 16 == 0,
        LINF_BLOCK // 4,
        num_warps=warps(LINF_WARPS),
        # Product and sum are rounded each, as the reference's are.
        enable_fp_fusion=False,
    )


def _start_radial(x: Tensor, rng: Tensor, x_adv: Tensor, eps: float, first: int, l1: bool) -> None:
    size = x[0].numel()
    block, num_warps, one_block = _l2_block(size)
    random_start_radial_kernel[(x.shape[0],)](
        x,
        rng,
        x_adv,
        eps,
        size,
        first,
        size % 16 == 0,
        block // 4,
        one_block,
        l1,
        num_warps=warps(num_warps),
    )


_STEPS = {"Linf": _step_linf, "L2": _step_l2, "L1": _step_l1}
_STARTS: dict[str, Callable[..., None]] = {
    "Linf": _start_linf,
    "L2": partial(_start_radial, l1=False),
    "L1": partial(_start_radial, l1=True),
}
