"""CUDA graphs and late inputs for the tests on real hardware."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

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


def on_side_stream(function: Callable[[Tensor], Result], late: Tensor) -> Result:
    """``function(late)`` on a stream where ``late`` is written only after a while: a kernel that
    ran on another stream would see what was there before."""
    static = torch.zeros_like(late)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        static.copy_(late)
        result = function(static)
    torch.cuda.current_stream().wait_stream(stream)
    return result


def need_gib(gib: float) -> None:
    """Skip the test unless the card has that much free memory."""
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, got {free / 2**30:.0f}")
