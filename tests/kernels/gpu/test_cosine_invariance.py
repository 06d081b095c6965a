"""The cosine kernels on real hardware."""

from __future__ import annotations

import pytest
import torch
from kernels.graphs import capture, need_gib, on_side_stream
from kernels.support import EPS_OF, assert_within_budget, at_an_odd_place, randn, to_float64
from torch import Tensor

from arat_kernels.cosine_invariance import cosine_invariance
from arat_kernels.cosine_invariance import triton as kernels

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESNET18 = (512,) * 4
WRN34 = (320,) + (640,) * 10


def case(
    num: int,
    widths: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    predictions = [randn((num, w), seed + i) for i, w in enumerate(widths)]
    targets = [
        (p + randn((num, w), seed + 50 + i)).relu()
        for i, (p, w) in enumerate(zip(predictions, widths, strict=True))
    ]
    return (
        [p.to("cuda", dtype) for p in predictions],
        [t.to("cuda", target_dtype) for t in targets],
        randn((len(widths),), seed + 99).to("cuda"),
    )


def run(predictions: list[Tensor], targets: list[Tensor], dout: Tensor, impl: str) -> list[Tensor]:
    leaves = [p.detach().requires_grad_() for p in predictions]
    out = cosine_invariance(leaves, targets, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num", "widths"),
    [(128, RESNET18), (512, WRN34), (33, (7, 100, 31)), (64, (2048,)), (9, (5000, 16)), (2, (3,))],
    ids=str,
)
def test_matches_the_float64_reference(
    dtype: torch.dtype, target_dtype: torch.dtype, num: int, widths: tuple[int, ...]
) -> None:
    arguments = case(num, widths, dtype, target_dtype)
    got, baseline = run(*arguments, "triton"), run(*arguments, "reference")
    truth = run(*to_float64(arguments), "reference")
    torch.testing.assert_close(got[0].double(), truth[0], rtol=0, atol=4 * 2.0**-23)
    for i, (mine, theirs, exact) in enumerate(zip(got, baseline, truth, strict=True)):
        if i > 0:
            # Triton's division and root are approximations of 2 ulp, PyTorch's are rounded.
            assert_within_budget(mine, exact, theirs, f"gradient {i}", factor=5.0)


def test_tensors_at_odd_places() -> None:
    predictions, targets, dout = case(65, (512, 320), torch.bfloat16)
    expected = run(predictions, targets, dout, "triton")
    moved = [[at_an_odd_place(t) for t in tensors] for tensors in (predictions, targets, [dout])]
    got = run(moved[0], moved[1], moved[2][0], "triton")
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_zero_vectors_give_what_torch_gives() -> None:
    predictions, targets, dout = case(8, (64, 5000))
    for p, t in zip(predictions, targets, strict=True):
        p[0], t[1] = 0, 0
        p[2] = t[2] = 0
    for mine, theirs in zip(
        run(predictions, targets, dout, "triton"),
        run(predictions, targets, dout, "reference"),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_same_bits_every_time() -> None:
    arguments = case(512, WRN34, torch.bfloat16)
    first = run(*arguments, "triton")
    for _ in range(20):
        for mine, again in zip(first, run(*arguments, "triton"), strict=True):
            assert torch.equal(mine, again)


def forward_and_backward(arguments: tuple[list[Tensor], list[Tensor], Tensor]) -> list[Tensor]:
    return run(*arguments, "triton")


def test_graph_replay_with_changed_inputs() -> None:
    static = case(128, RESNET18, torch.bfloat16)
    graph, outputs = capture(lambda: forward_and_backward(static))
    for seed in (200, 400):
        fresh = case(128, RESNET18, torch.bfloat16, seed=seed)
        for target, source in zip(
            [*static[0], *static[1], static[2]], [*fresh[0], *fresh[1], fresh[2]], strict=True
        ):
            target.copy_(source)
        for _ in range(3):
            graph.replay()
        for got, expected in zip(outputs, forward_and_backward(fresh), strict=True):
            assert torch.equal(got, expected)


def test_graphs_and_eager_calls_at_once_do_not_disturb_each_other() -> None:
    problems = [case(512, RESNET18, torch.bfloat16, seed=100 * i) for i in range(3)]
    expected = [forward_and_backward(p)[0] for p in problems]
    captured = [capture(lambda p=p: forward_and_backward(p)[0]) for p in problems[:2]]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    eager = []
    for _ in range(30):
        for (graph, _), stream in zip(captured, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager.append(cosine_invariance(*problems[2][:2], impl="triton"))
    torch.cuda.synchronize()
    for (_, result), value in zip(captured, expected, strict=False):
        assert torch.equal(result, value)
    for result in eager:
        assert torch.equal(result, expected[2])


def test_side_stream() -> None:
    predictions, targets, _ = case(512, RESNET18)
    expected = cosine_invariance(predictions, targets, impl="triton")
    got = on_side_stream(
        lambda late: cosine_invariance([late, *predictions[1:]], targets, impl="triton"),
        predictions[0],
    )
    assert torch.equal(got, expected)


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


def test_compiled_with_inductor_is_bit_identical() -> None:
    predictions, targets, _ = case(64, RESNET18, torch.bfloat16)
    torch._dynamo.reset()

    def loss(predictions: list[Tensor], targets: list[Tensor]) -> Tensor:
        return cosine_invariance(predictions, targets, impl="triton")

    compiled = torch.compile(loss, fullgraph=True)
    assert torch.equal(compiled(predictions, targets), loss(predictions, targets))


def test_reduce_overhead_between_eager_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of the process is the warm-up of the compiled function, whose allocations go
    to the pool of its graphs; then it is recorded, then replayed, with eager calls in between."""
    monkeypatch.setattr(kernels, "_counters", kernels._Counters())
    torch._dynamo.reset()

    def loss(predictions: list[Tensor], targets: list[Tensor]) -> Tensor:
        return cosine_invariance(predictions, targets, impl="triton")

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for seed in range(6):
        predictions, targets, dout = case(512, RESNET18, torch.bfloat16, seed=200 * seed)
        results = []
        for function in (compiled, loss, compiled, loss):
            torch.compiler.cudagraph_mark_step_begin()
            leaves = [p.detach().requires_grad_() for p in predictions]
            out = function(leaves, targets)
            gradients = torch.autograd.grad(out, leaves, dout)
            results.append([t.detach().clone() for t in (out, *gradients)])
        for other in results[1:]:
            for got, expected in zip(other, results[0], strict=True):
                assert torch.equal(got, expected)
    for counters in (
        *kernels._counters._of_stream.values(),
        *kernels._counters._for_graphs.values(),
    ):
        assert not counters.any()


def test_mixed_devices_are_refused() -> None:
    predictions, targets, _ = case(4, (8,))
    with pytest.raises(ValueError, match="one device, got cuda:0 and cpu"):
        cosine_invariance(predictions, [targets[0].cpu()])
