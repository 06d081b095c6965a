"""NaN, zeros, huge numbers, unknown indices and empty batches, by the references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kernels.edges import EDGES, Run, variances


# Sums of many large numbers in float32 are what the kernels are better at.
@pytest.mark.parametrize(
    "edge", [edge for edge in EDGES if edge is not variances], ids=lambda edge: edge.__name__
)
def test_edges(edge: Callable[[Run], None]) -> None:
    edge(lambda operation, tensors: operation.results(tensors, "reference"))
