"""Confidence intervals of accuracies."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(correct: int, num_samples: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion.

    Args:
        correct: successes, in [0, num_samples].
        num_samples: trials, >= 1.
        z: quantile of the normal distribution.

    Returns:
        lower and upper end, in [0, 1].

    Raises:
        ValueError: counts out of range.

    Source: Wilson, JASA 1927; formula as in Newcombe, Statistics in Medicine 17 (1998) 857-872.
    """
    if num_samples < 1 or not 0 <= correct <= num_samples:
        raise ValueError(
            f"expected num_samples >= 1 and correct in [0, num_samples], got {correct} of "
            f"{num_samples}"
        )
    p = correct / num_samples
    square = z * z / num_samples
    centre = (p + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(p * (1 - p) / num_samples + square / (4 * num_samples))
    lower = 0.0 if correct == 0 else max(0.0, centre - half)
    upper = 1.0 if correct == num_samples else min(1.0, centre + half)
    return lower, upper


def difference_interval(
    correct: tuple[int, int], num_samples: tuple[int, int], z: float = Z_95
) -> tuple[float, float]:
    """Newcombe's hybrid score interval of the difference of two independent proportions.

    Args:
        correct: successes of the first and of the second.
        num_samples: trials of the first and of the second, >= 1.
        z: quantile of the normal distribution.

    Returns:
        lower and upper end of (first - second), in [-1, 1].

    Raises:
        ValueError: counts out of range.

    Source: Newcombe, Statistics in Medicine 17 (1998) 873-890, method 10.
    """
    p, q = (c / n for c, n in zip(correct, num_samples, strict=True))
    p_low, p_high = wilson_interval(correct[0], num_samples[0], z)
    q_low, q_high = wilson_interval(correct[1], num_samples[1], z)
    lower = p - q - math.hypot(p - p_low, q_high - q)
    upper = p - q + math.hypot(p_high - p, q - q_low)
    return lower, upper
