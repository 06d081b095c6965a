"""Graphs, eager calls and compiled ones of the cosine distance at once, whose kernels count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernels.gpu.test_operations import capture, on_gpu
from kernels.operations import assert_equal, distance

from arat_kernels.cosine_invariance import triton as kernels

pytestmark = pytest.mark.gpu

OPERATION = distance(512, (512,) * 4, torch.float32)


def test_graphs_and_eager_calls_at_once_do_not_disturb_each_other() -> None:
    problems = [on_gpu(OPERATION, 100 * i) for i in range(3)]
    expected = [OPERATION.results(tensors, None) for tensors in problems]
    captured = [capture(lambda p=p: OPERATION.results(p, None)) for p in problems[:2]]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    eager = []
    for _ in range(30):
        for (graph, _), stream in zip(captured, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager.append(OPERATION.results(problems[2], None))
    torch.cuda.synchronize()
    for (_, results), value in zip(captured, expected, strict=False):
        assert_equal(results, value)
    for results in eager:
        assert_equal(results, expected[2])


def test_reduce_overhead_between_eager_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of the process is the warm-up of the compiled function, whose allocations go
    to the pool of its graphs; then it is recorded, then replayed, with eager calls in between."""
    monkeypatch.setattr(kernels, "_counters", kernels._Counters())
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda tensors, impl: OPERATION.call(tensors, impl), mode="reduce-overhead", fullgraph=True
    )
    for seed in range(6):
        tensors = on_gpu(OPERATION, 200 * seed)
        found = []
        for call in (compiled, OPERATION.call, compiled, OPERATION.call):
            torch.compiler.cudagraph_mark_step_begin()
            results = replace(OPERATION, call=call).results(tensors, None)
            found.append({name: t.clone() for name, t in results.items()})
        for other in found[1:]:
            assert_equal(other, found[0])
    for counters in (
        *kernels._counters._of_stream.values(),
        *kernels._counters._for_graphs.values(),
    ):
        assert not counters.any()
