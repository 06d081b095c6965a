"""Intervals against published numbers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arat_fast.statistics import difference_interval, wilson_interval


@pytest.mark.parametrize(
    ("function", "correct", "num_samples", "expected"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
        (wilson_interval, 81, 263, (0.2553, 0.3662)),
        (wilson_interval, 15, 148, (0.0624, 0.1605)),
        (wilson_interval, 0, 20, (0.0, 0.1611)),
        (wilson_interval, 1, 29, (0.0061, 0.1718)),
        # The same, 873-890, table II, method 10.
        (difference_interval, (56, 48), (70, 80), (0.0524, 0.3339)),
        (difference_interval, (9, 3), (10, 10), (0.1705, 0.8090)),
        (difference_interval, (5, 0), (56, 29), (-0.0381, 0.1926)),
        (difference_interval, (10, 0), (10, 10), (0.6075, 1.0)),
    ],
)
def test_intervals_are_the_published_ones(
    function: Any, correct: Any, num_samples: Any, expected: tuple[float, float]
) -> None:
    assert function(correct, num_samples) == pytest.approx(expected, abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_accuracy(counts: tuple[int, int]) -> None:
    correct, num_samples = counts
    low, high = wilson_interval(correct, num_samples)
    assert 0 <= low <= correct / num_samples <= high <= 1


@pytest.mark.parametrize(("correct", "num_samples"), [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(correct: int, num_samples: int) -> None:
    with pytest.raises(ValueError):
        wilson_interval(correct, num_samples)
