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


def pgd_step_reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float, norm: str
) -> None:
    """Arguments as in :func:`arat_kernels.pgd_step.api.pgd_step`; changes ``x_adv`` in place."""
    grad = grad.to(x_adv.dtype)
    if norm == "Linf":
        sign = torch.where(grad.isnan(), grad, grad.sign())
        moved = x_adv + alpha * sign
        projected = torch.minimum(torch.maximum(moved, x - eps), x + eps)
    else:
        delta = x_adv + alpha * (grad / _norms(grad).clamp_min(MIN_NORM)) - x
        length = _norms(delta)
        projected = x + delta * torch.where(length > eps, eps / length, torch.ones_like(length))
    x_adv.copy_(projected.clamp(0, 1))


def random_start_reference(x: Tensor, rng: Tensor, eps: float, norm: str, first: int) -> Tensor:
    """Arguments and results as in :func:`arat_kernels.pgd_step.api.random_start`."""
    x = x if is_batch_dense(x) else x.contiguous()
    num = x.shape[0]
    size = math.prod(x.shape[1:])
    if norm == "Linf":
        start, end = first * size, (first + num) * size
        groups = torch.arange(start // 4, -(-end // 4), device=x.device)
        words = torch.stack(random_words(rng, groups, RANDOM_START), -1).flatten()
        words = words[start % 4 :][: num * size]
        delta = (2 * _unit(words) - 1).to(x.dtype) * eps
    else:
        groups = torch.arange(-(-size // 4), device=x.device)
        sample = torch.arange(first, first + num, device=x.device)
        w0, w1, w2, w3 = random_words(rng, (sample[:, None] << 32) + groups, RANDOM_START)
        normals = torch.stack((*_box_muller(w0, w1), *_box_muller(w2, w3)), -1)
        direction = normals.flatten(1)[:, :size].to(x.dtype)
        radius = eps * _unit(random_words(rng, sample, RANDOM_START_RADIUS)[0]).to(x.dtype)
        length = torch.linalg.vector_norm(direction, dim=1).clamp_min(MIN_NORM)
        delta = direction * (radius / length)[:, None]
    # The numbers belong to positions in memory, so a channels_last x costs no permutation.
    in_memory_order = torch.empty_like(x)
    in_memory_order.as_strided((x.numel(),), (1,)).copy_(delta.flatten())
    return x + in_memory_order


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
