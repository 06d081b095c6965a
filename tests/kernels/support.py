"""What the tests of the kernels share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import HealthCheck, settings

EPS_OF = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def few(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """hypothesis with the same ``examples`` in every run; interpreted kernels are slow."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    chosen: Callable[[Callable[..., None]], Callable[..., None]] = settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks
    )
    return chosen
