"""Plain PyTorch definition of the PGD update and its random start; any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arat_kernels.layout import is_batch_dense
from arat_kernels.philox.reference import random_words
from arat_kernels.philox.streams import RANDOM_START, RANDOM_START_RADIUS

# F.normalize's floor: a zero gradient moves nothing.
MIN_NORM = 1e-12
SPARSITY = 0.05
"""Share of the components that a step in L1 moves."""


def pgd_step_reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float, norm: str
) -> None:
    """Arguments as in :func:`arat_kernels.pgd_step.api.pgd_step`; changes ``x_adv`` in place."""
    x_adv.copy_(STEPS[norm](x_adv, grad.to(x_adv.dtype), x, eps, alpha).clamp(0, 1))


def random_start_reference(x: Tensor, rng: Tensor, eps: float, norm: str, first: int) -> Tensor:
    """Arguments and results as in :func:`arat_kernels.pgd_step.api.random_start`."""
    delta = STARTS[norm](x, rng, eps, first)
    x = x if is_batch_dense(x) else x.contiguous()
    # The numbers belong to positions in memory, so a channels_last x costs no permutation.
    in_memory_order = torch.empty_like(x)
    in_memory_order.as_strided((x.numel(),), (1,)).copy_(delta.flatten())
    return x + in_memory_order


def _step_linf(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float) -> Tensor:
    sign = torch.where(grad.isnan(), grad, grad.sign())
    moved = x_adv + alpha * sign
    return torch.minimum(torch.maximum(moved, x - eps), x + eps)


def _step_l2(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float) -> Tensor:
    delta = x_adv + alpha * (grad / _norms(grad).clamp_min(MIN_NORM)) - x
    length = _norms(delta)
    return x + delta * torch.where(length > eps, eps / length, torch.ones_like(length))


def _step_l1(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float) -> Tensor:
    sizes = grad.abs().flatten(1)
    if sizes.numel() == 0:
        return x_adv
    threshold = sizes.topk(math.ceil(SPARSITY * sizes.shape[1]), dim=1).values[:, -1:]
    flat = grad.flatten(1)
    sign = torch.where(flat.isnan(), flat, torch.where(sizes < threshold, 0.0, flat.sign()))
    moved = x_adv.flatten(1) + alpha * sign / sign.abs().sum(dim=1, keepdim=True).clamp_min(1)
    return project_l1(x.flatten(1), moved, eps).view_as(x)


def project_l1(x: Tensor, moved: Tensor, eps: float) -> Tensor:
    """The points of the L1 ball around ``x`` that also lie in [0, 1], nearest to ``moved``.

    Every component moves towards ``x`` by the same length, as far as it is not cut off by the range
    before; that length is where a piecewise linear function of it, known at its bends, equals eps.

    Args:
        x: centres (N, d), in [0, 1].
        moved: (N, d).
        eps: radius, >= 0.

    Source: Croce and Hein, ICML 2021 (arXiv 2103.01208), proposition 2.2.
    """
    size = (moved - x).abs()
    room = torch.where(moved > x, 1 - x, x)
    # Moved back by t, a component has the length min(max(size - t, 0), room): as t falls, it grows
    # from t = size on, until it fills its room.
    bends, order = torch.cat([size, (size - room).clamp_min(0)], dim=1).sort(dim=1, descending=True)
    slope = torch.where(order < size.shape[1], 1, -1).cumsum(dim=1).to(size.dtype)
    # At each bend, the sum of the lengths.
    total = torch.nn.functional.pad((slope[:, :-1] * -bends.diff(dim=1)).cumsum(dim=1), (1, 0))
    last = (total <= eps).sum(dim=1, keepdim=True).sub(1).clamp_min(0)
    bend, left = bends.gather(1, last), eps - total.gather(1, last)
    shift = bend - left / slope.gather(1, last).clamp_min(1)
    length = torch.minimum((size - shift.clamp_min(0)).clamp_min(0), room)
    length = length * (eps / length.sum(dim=1, keepdim=True).clamp_min(MIN_NORM)).clamp_max(1)
    return x + length * (moved - x).sign()


def _start_linf(x: Tensor, rng: Tensor, eps: float, first: int) -> Tensor:
    num, size = x.shape[0], math.prod(x.shape[1:])
    start, end = first * size, (first + num) * size
    groups = torch.arange(start // 4, -(-end // 4), device=x.device)
    words = torch.stack(random_words(rng, groups, RANDOM_START), -1).flatten()
    words = words[start % 4 :][: num * size]
    return (2 * _unit(words) - 1).to(x.dtype) * eps


def _start_l2(x: Tensor, rng: Tensor, eps: float, first: int) -> Tensor:
    sample, (w0, w1, w2, w3) = _words_by_sample(x, rng, first)
    normals = torch.stack((*_box_muller(w0, w1), *_box_muller(w2, w3)), -1)
    direction = normals.flatten(1)[:, : math.prod(x.shape[1:])].to(x.dtype)
    length: Tensor = torch.linalg.vector_norm(direction, dim=1).clamp_min(MIN_NORM)
    return direction * (_radii(x, rng, eps, sample) / length)[:, None]


def _start_l1(x: Tensor, rng: Tensor, eps: float, first: int) -> Tensor:
    sample, words = _words_by_sample(x, rng, first)
    # Laplace: the side of 0 and the distance from it, by one word.
    uniform = 2 * _unit(torch.stack(words, -1).flatten(1)[:, : math.prod(x.shape[1:])]) - 1
    direction = (-uniform.sign() * torch.log1p(-uniform.abs())).nan_to_num(posinf=17, neginf=-17)
    length = direction.abs().sum(dim=1).clamp_min(MIN_NORM)
    return direction.to(x.dtype) * (_radii(x, rng, eps, sample) / length)[:, None]


def _words_by_sample(x: Tensor, rng: Tensor, first: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Places of the samples (N,), and four words for every four elements of each, (N, groups)."""
    groups = torch.arange(-(-math.prod(x.shape[1:]) // 4), device=x.device)
    sample = torch.arange(first, first + x.shape[0], device=x.device)
    return sample, random_words(rng, (sample[:, None] << 32) + groups, RANDOM_START)


def _radii(x: Tensor, rng: Tensor, eps: float, sample: Tensor) -> Tensor:
    return eps * _unit(random_words(rng, sample, RANDOM_START_RADIUS)[0]).to(x.dtype)


def _norms(t: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)), keepdim=True)
    return norms


def _unit(word: Tensor) -> Tensor:
    """[0, 1) in float32 from a 32-bit word, in steps of 2^-24."""
    return (word >> 8).float() * 2.0**-24


def _box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normal numbers from two words, in float32."""
    radius = (-2 * torch.log(1 - _unit(word0))).sqrt()
    angle = (2 * math.pi) * _unit(word1)
    return radius * angle.cos(), radius * angle.sin()


STEPS = {"Linf": _step_linf, "L2": _step_l2, "L1": _step_l1}
STARTS = {"Linf": _start_linf, "L2": _start_l2, "L1": _start_l1}
