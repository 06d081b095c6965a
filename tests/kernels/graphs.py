"""CUDA graphs and memory for the tests on real hardware."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

Result = TypeVar("Result")


def capture(function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of one call of ``function``, after warm-up, and the static result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def need_gib(gib: float) -> None:
    """Skip the test unless the card has that much free memory."""
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, got {free / 2**30:.0f}")
