"""Truth in float64 and the error budget that is derived from PyTorch's own run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

EPS_OF = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def few(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """hypothesis with the same ``examples`` in every run; interpreted kernels are slow."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    chosen: Callable[[Callable[..., None]], Callable[..., None]] = settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks
    )
    return chosen


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that no test depends on another."""
    return torch.Generator().manual_seed(seed)


def randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers on the CPU, of any dtype."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def at_an_odd_place(t: Tensor) -> Tensor:
    """The same numbers, laid out the same, not at a multiple of 16 bytes."""
    store = t.new_empty(t.numel() + 1)
    moved = store.as_strided(t.shape, t.stride(), 1)
    assert moved.copy_(t.detach()).data_ptr() % 16
    return moved


def to_float64(value: Any) -> Any:
    """Every floating-point tensor in a nest of tuples, lists and dicts, widened; others as is."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(to_float64(item) for item in value)
    if isinstance(value, dict):
        return {key: to_float64(item) for key, item in value.items()}
    return value


def upstream(like: Tensor, seed: int) -> Tensor:
    """A random gradient of ``like``, of so few binary digits that it is the same in every dtype.

    Made once: a CUDA graph cannot capture the copy from the host.
    """
    key = (like.shape, like.stride(), like.dtype, like.device, seed)
    if key not in _UPSTREAM:
        numbers = (32 * randn(tuple(like.shape), seed, torch.float64)).round() / 32
        _UPSTREAM[key] = torch.empty_like(like.detach()).copy_(numbers)
    return _UPSTREAM[key]


_UPSTREAM: dict[Any, Tensor] = {}


def assert_within_budget(
    got: Tensor, truth: Tensor, baseline: Tensor, name: str = "result", factor: float = 2.0
) -> None:
    """``got`` may be at most ``factor`` times as wrong as ``baseline``, PyTorch's own run.

    Both the root mean square and the largest error are held to
    ``factor * (error(baseline) + eps / 2 * size(truth))``; the last term is what a correctly
    rounded result of ``got``'s dtype may be off by, and keeps a baseline that accumulates in
    float64, as PyTorch's on the CPU does, from forbidding float32.

    Args:
        got: the kernel's result, any floating dtype.
        truth: the same in float64.
        baseline: PyTorch's result from the same low-precision inputs.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)} != {tuple(truth.shape)}"
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64, got {truth.dtype}"
    if truth.numel() == 0:
        return
    assert bool(torch.isfinite(truth).all()), f"{name}: the truth itself is not finite"
    assert bool(torch.isfinite(got).all()), f"{name}: holds NaN or infinity"
    rounding = torch.finfo(got.dtype).eps / 2
    for measure, size in (
        ("rms", lambda t: t.square().mean().sqrt().item()),
        ("max", lambda t: t.abs().max().item()),
    ):
        error = size(got.detach().double() - truth)
        own = size(baseline.detach().double() - truth)
        allowed = factor * (own + rounding * size(truth))
        assert error <= allowed, f"{name}: {measure} error {error:.3e}, allowed {allowed:.3e}"
