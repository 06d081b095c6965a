"""The cosine kernels on real hardware, beside what all operations promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernels.graphs import capture, need_gib
from kernels.operations import Operation, Tensors, assert_equal, distance
from kernels.support import EPS_OF, to_float64

from arat_kernels.cosine_invariance import cosine_invariance
from arat_kernels.cosine_invariance import triton as kernels

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESNET18 = (512,) * 4
WRN34 = (320,) + (640,) * 10


def case(
    num: int,
    widths: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    targets: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Operation, Tensors]:
    operation = distance(num, widths, targets)
    return operation, {name: t.to("cuda") for name, t in operation.make(seed, dtype).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num", "widths"),
    [(128, RESNET18), (512, WRN34), (33, (7, 100, 31)), (64, (2048,)), (9, (5000, 16)), (2, (3,))],
    ids=str,
)
def test_matches_the_float64_reference(
    dtype: torch.dtype, targets: torch.dtype, num: int, widths: tuple[int, ...]
) -> None:
    operation, tensors = case(num, widths, dtype, targets)
    # Triton's division and root are approximations of 2 ulp, PyTorch's are rounded.
    operation.check(tensors, factor=5.0)
    got, truth = operation.results(tensors, None), operation.results(to_float64(tensors), None)
    torch.testing.assert_close(got["0"].double(), truth["0"], rtol=0, atol=4 * 2.0**-23)


def test_zero_vectors_give_what_torch_gives() -> None:
    operation, tensors = case(8, (64, 5000), torch.float32)
    for i in range(2):
        p, t = tensors[f"p{i}"], tensors[f"t{i}"]
        p[0], t[1] = 0, 0
        p[2] = t[2] = 0
    got, expected = (operation.results(tensors, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_same_bits_every_time() -> None:
    operation, tensors = case(512, WRN34)
    first = operation.results(tensors, None)
    for _ in range(20):
        assert_equal(operation.results(tensors, None), first)


def test_graphs_and_eager_calls_at_once_do_not_disturb_each_other() -> None:
    problems = [case(512, RESNET18, seed=100 * i) for i in range(3)]
    expected = [operation.results(tensors, None) for operation, tensors in problems]
    captured = [capture(lambda p=p: p[0].results(p[1], None)) for p in problems[:2]]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    operation, tensors = problems[2]
    eager = []
    for _ in range(30):
        for (graph, _), stream in zip(captured, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager.append(operation.results(tensors, None))
    torch.cuda.synchronize()
    for (_, results), value in zip(captured, expected, strict=False):
        assert_equal(results, value)
    for results in eager:
        assert_equal(results, expected[2])


def test_more_than_two_to_the_31_elements() -> None:
    need_gib(30)
    num, width = 2**20 + 5, 2048
    numbers = torch.Generator("cuda").manual_seed(0)
    p, t = (torch.empty(num, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    assert p.numel() > 2**31
    for part in (*p.split(2**16), *t.split(2**16)):
        part.normal_(generator=numbers)
    t[-1000:] += p[-1000:]
    p.requires_grad_()
    out = cosine_invariance([p], [t], impl="triton")
    dout = torch.tensor([3.0 * num], device="cuda")
    (dp,) = torch.autograd.grad(out, p, dout)
    sums = [
        cosine_invariance([a.detach().double()], [b.double()], impl="reference") * len(a)
        for a, b in zip(p.split(2**16), t.split(2**16), strict=True)
    ]
    torch.testing.assert_close(out.double(), sum(sums) / num, rtol=1e-5, atol=1e-6)
    tail = p[-8:].detach().double().requires_grad_()
    tail_out = cosine_invariance([tail], [t[-8:]], impl="reference")
    (expected,) = torch.autograd.grad(tail_out, tail, dout.double() * 8 / num)
    # Rounded once to bfloat16, after float32 arithmetic on numbers of size 0.1.
    rounding = EPS_OF[torch.bfloat16] / 2
    torch.testing.assert_close(dp[-8:].double(), expected, rtol=rounding, atol=1e-6)


def test_reduce_overhead_between_eager_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of the process is the warm-up of the compiled function, whose allocations go
    to the pool of its graphs; then it is recorded, then replayed, with eager calls in between."""
    monkeypatch.setattr(kernels, "_counters", kernels._Counters())
    torch._dynamo.reset()
    operation, _ = case(512, RESNET18)
    compiled = torch.compile(
        lambda tensors, impl: operation.call(tensors, impl), mode="reduce-overhead", fullgraph=True
    )
    for seed in range(6):
        _, tensors = case(512, RESNET18, seed=200 * seed)
        found = []
        for call in (compiled, operation.call, compiled, operation.call):
            torch.compiler.cudagraph_mark_step_begin()
            results = replace(operation, call=call).results(tensors, None)
            found.append({name: t.clone() for name, t in results.items()})
        for other in found[1:]:
            assert_equal(other, found[0])
    for counters in (
        *kernels._counters._of_stream.values(),
        *kernels._counters._for_graphs.values(),
    ):
        assert not counters.any()
