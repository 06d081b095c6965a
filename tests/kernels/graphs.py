"""CUDA graphs for the tests on real hardware."""

from __future__ import annotations

from collections.abc import Callable

import torch

from arat_kernels.checks import Tensors


def capture(function: Callable[[], Tensors]) -> tuple[torch.cuda.CUDAGraph, Tensors]:
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
