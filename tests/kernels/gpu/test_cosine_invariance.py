"""The cosine kernels on real hardware, beside what all operations promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernels.graphs import capture

from arat_kernels.arrivals import Counters
from arat_kernels.checks import SLACK, assert_equal, distance, on_gpu, to_float64
from arat_kernels.cosine_invariance import triton as kernels

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [(128, (512,) * 4), (512, (320,) + (640,) * 10), (33, (7, 100, 31)), (64, (2048,))]
WIDTHS += [(9, (5000, 16)), (2, (3,))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num", "widths"), WIDTHS, ids=str)
def test_matches_the_float64_reference(
    dtype: torch.dtype, targets: torch.dtype, num: int, widths: tuple[int, ...]
) -> None:
    operation = distance(num, widths, targets)
    tensors = on_gpu(operation, 0, dtype)
    # Triton's division and root are approximations of 2 ulp, PyTorch's are rounded.
    operation.check(tensors, factor=5.0)
    got, truth = operation.results(tensors, None), operation.results(to_float64(tensors), None)
    torch.testing.assert_close(got["0"].double(), truth["0"], rtol=0, atol=4 * SLACK)
    for _ in range(20):
        assert_equal(operation.results(tensors, None), got)


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
    monkeypatch.setattr(kernels, "counters", counters := Counters())
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
    for kept in (*counters.of_stream.values(), *counters.for_graphs[0]):
        assert not kept.any()
