"""Confidence intervals of accuracies."""

from __future__ import annotations

import base64
import math

import numpy as np
from numpy.typing import NDArray


def wilson_interval(correct: int, num_samples: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion.

    Args:
        correct: successes, in [0, num_samples].
        num_samples: trials, >= 1.

    Returns:
        lower and upper end, in [0, 1].

    Raises:
        ValueError: counts out of range.
    """
    from scipy.stats import binomtest  # A second at start-up, which most commands do without.

    interval = binomtest(correct, num_samples).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def difference_interval(
    correct: tuple[int, int], num_samples: tuple[int, int]
) -> tuple[float, float]:
    """Newcombe's hybrid 95 % score interval of the difference of two independent proportions.

    Args:
        correct: successes of the first and of the second.
        num_samples: trials of the first and of the second, >= 1.

    Returns:
        lower and upper end of (first - second), in [-1, 1].

    Raises:
        ValueError: counts out of range.

    Source: Newcombe, Statistics in Medicine 17 (1998) 873-890, method 10.
    """
    p, q = (c / n for c, n in zip(correct, num_samples, strict=True))
    p_low, p_high = wilson_interval(correct[0], num_samples[0])
    q_low, q_high = wilson_interval(correct[1], num_samples[1])
    lower = p - q - math.hypot(p - p_low, q_high - q)
    upper = p - q + math.hypot(p_high - p, q - q_low)
    return lower, upper


def paired_interval(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[float, float]:
    """95 % interval of the difference of two mean accuracies on the same images.

    What is uncertain is how other images would come out, by the standard error over the images of
    their mean difference; the networks are as they are.

    Args:
        first, second: (seeds, num_samples), which images were right.

    Returns:
        lower and upper end of (first - second), in [-1, 1].
    """
    difference = first.mean(axis=0) - second.mean(axis=0)
    half = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
    return float(difference.mean() - half), float(difference.mean() + half)


def pack(right: NDArray[np.bool_]) -> str:
    """(num_samples,) bools as bits in base64, for JSON."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpack(text: str, num_samples: int) -> NDArray[np.bool_]:
    """What :func:`pack` was given."""
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=num_samples).astype(bool)
