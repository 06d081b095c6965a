"""The cross-entropy kernel on real hardware."""

from __future__ import annotations

import pytest
import torch
from kernels.graphs import capture, need_gib, on_side_stream
from kernels.support import (
    EPS_OF,
    assert_within_budget,
    at_an_odd_place,
    generator,
    randn,
)
from torch import Tensor

from arat_kernels.cross_entropy_grad import cross_entropy_grad

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    num: int, num_classes: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    target = torch.randint(num_classes, (num,), generator=generator(seed))
    return (4 * randn((num, num_classes), seed + 1)).to("cuda", dtype), target.to("cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 10, 100, 200, 1000, 4096, 4097, 21_841])
def test_matches_the_float64_reference(dtype: torch.dtype, num_classes: int) -> None:
    logits, target = case(67, num_classes, dtype)
    got = cross_entropy_grad(logits, target, impl="triton")
    baseline = cross_entropy_grad(logits, target, impl="reference")
    truth = cross_entropy_grad(logits.double(), target, impl="reference")
    for name, mine, exact, theirs in zip(("dlogits", "loss"), got, truth, baseline, strict=True):
        # Triton's exp and log are approximations of 2 ulp, PyTorch's of 1.
        assert_within_budget(mine, exact, theirs, name, factor=5.0)


@pytest.mark.parametrize("num_classes", [10, 128, 4097])
def test_tensors_at_odd_places(num_classes: int) -> None:
    logits, target = case(67, num_classes)
    # The slice is copied to memory of its own, whose rows lie closer than the slice's.
    wider = torch.full((67, num_classes + 17), torch.nan, device="cuda")
    sliced = wider[:, 1 : num_classes + 1].copy_(logits)
    assert sliced.data_ptr() % 16
    expected = cross_entropy_grad(logits, target, impl="triton")
    for moved in (at_an_odd_place(logits), sliced):
        got = cross_entropy_grad(moved, at_an_odd_place(target), impl="triton")
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_classes", [10, 5000])
def test_unknown_targets_and_nan_logits_give_nan(num_classes: int) -> None:
    logits, target = case(5, num_classes)
    target[1], target[2] = -1, num_classes
    logits[3, 7] = torch.nan
    dlogits, loss = cross_entropy_grad(logits, target, impl="triton")
    expected = [False, True, True, True, False]
    assert loss.isnan().tolist() == expected
    assert dlogits.isnan().all(1).tolist() == expected
    assert dlogits.isnan().any(1).tolist() == expected


def test_graph_replay_with_changed_inputs() -> None:
    logits, target = case(128, 10, torch.bfloat16)
    graph, outputs = capture(lambda: cross_entropy_grad(logits, target, impl="triton"))
    for seed in (10, 20):
        fresh = case(128, 10, torch.bfloat16, seed)
        logits.copy_(fresh[0])
        target.copy_(fresh[1])
        graph.replay()
        expected = cross_entropy_grad(*fresh, impl="triton")
        for got, value in zip(outputs, expected, strict=True):
            assert torch.equal(got, value)


def test_side_stream() -> None:
    logits, target = case(512, 100)
    expected = cross_entropy_grad(logits, target, impl="triton")
    got = on_side_stream(lambda late: cross_entropy_grad(late, target, impl="triton"), logits)
    for mine, value in zip(got, expected, strict=True):
        assert torch.equal(mine, value)


def test_more_than_two_to_the_31_elements() -> None:
    need_gib(20)
    num, num_classes = 2**21 + 7, 1024
    logits = torch.empty(num, num_classes, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    for part in logits.split(2**17):
        part.normal_()
    target = torch.arange(num, device="cuda") % num_classes
    dlogits, loss = cross_entropy_grad(logits, target, impl="triton")
    last = slice(num - 4, num)
    expected = cross_entropy_grad(logits[last].float(), target[last], impl="reference")
    # Rounded once to bfloat16, after float32 arithmetic on probabilities.
    rounding = EPS_OF[torch.bfloat16] / 2
    torch.testing.assert_close(dlogits[last].float(), expected[0], rtol=rounding, atol=1e-6)
    torch.testing.assert_close(loss[last], expected[1], rtol=1e-5, atol=1e-5)


def test_compiled_with_inductor_is_bit_identical() -> None:
    logits, target = case(64, 10)
    dloss = randn((64,), 5).to("cuda")

    def losses(logits: Tensor) -> Tensor:
        return cross_entropy_grad(logits, target, impl="triton")[1]

    torch._dynamo.reset()
    results = []
    for function in (losses, torch.compile(losses, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaf, dloss)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=0, atol=0)
