"""The cosine kernels in Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.support import assert_within_budget, few, randn, to_float64
from torch import Tensor

from arat_kernels.cosine_invariance import CosineInvariance, cosine_invariance
from arat_kernels.cosine_invariance.triton import _backward_op, _forward_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    num: int,
    widths: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Predictions, targets that correlate with them, and the gradient of the result."""
    predictions = [randn((num, w), seed + i, torch.float64) for i, w in enumerate(widths)]
    targets = [
        (p + randn((num, w), seed + 50 + i, torch.float64)).relu()
        for i, (p, w) in enumerate(zip(predictions, widths, strict=True))
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        [p.to(dtype) for p in predictions],
        [t.to(target_dtype or dtype) for t in targets],
        randn((len(widths),), seed + 99, wide),
    )


def run(
    predictions: list[Tensor],
    targets: list[Tensor],
    dout: Tensor,
    impl: str,
    eps: float = 1e-8,
) -> tuple[Tensor, list[Tensor]]:
    leaves = [p.detach().requires_grad_() for p in predictions]
    out = cosine_invariance(leaves, targets, eps=eps, impl=impl)
    return out.detach(), list(torch.autograd.grad(out, leaves, dout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", [None, torch.float32])
@pytest.mark.parametrize(
    ("num", "widths"),
    [(5, (32, 16, 48)), (33, (100, 7)), (3, (600,)), (2, (2100, 30)), (2, tuple(range(8, 21)))],
)
def test_against_the_float64_reference(
    dtype: torch.dtype,
    target_dtype: torch.dtype | None,
    num: int,
    widths: tuple[int, ...],
) -> None:
    arguments = case(num, widths, dtype, target_dtype)
    out, grads = run(*arguments, impl="triton")
    baseline_out, baseline_grads = run(*arguments, impl="reference")
    truth_out, truth_grads = run(*to_float64(arguments), impl="reference")
    assert out.dtype == torch.float32
    assert_within_budget(out, truth_out, baseline_out, "out")
    for i, grad in enumerate(grads):
        assert grad.dtype == dtype
        assert_within_budget(grad, truth_grads[i], baseline_grads[i], f"gradient of layer {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_targets_of_another_narrow_dtype(dtype: torch.dtype) -> None:
    predictions, targets, dout = case(5, (32, 7), dtype, torch.bfloat16)
    out, grads = run(predictions, targets, dout, "triton")
    wide_out, wide_grads = run(predictions, [t.float() for t in targets], dout, "triton")
    assert torch.equal(out, wide_out)
    for grad, expected in zip(grads, wide_grads, strict=True):
        assert grad.dtype == dtype and torch.equal(grad, expected)


@few(10)
@given(
    num=st.integers(1, 9),
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_shape(num: int, widths: list[int], seed: int) -> None:
    arguments = case(num, tuple(widths), seed=seed)
    out, grads = run(*arguments, impl="triton")
    expected_out, expected_grads = run(*arguments, impl="reference")
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-6)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    assert (out > -1e-6).all() and (out < 2 + 1e-6).all()


@pytest.mark.parametrize("width", [20, 2100])
def test_norms_below_eps_and_zero_vectors_as_torch(width: int) -> None:
    (p,), (t,), dout = case(6, (width,))
    p[0] = 0
    t[1] = 0
    p[2] = t[2] = 0
    p[3] *= 1e-3
    t[4] *= 1e-3
    eps = 0.1 * width**0.5
    out, (grad,) = run([p], [t], dout, "triton", eps)
    expected_out, (expected,) = run([p], [t], dout, "reference", eps)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
    assert grad[0].abs().max() > 0 and grad[1].abs().max() == 0


def test_huge_and_tiny_vectors_as_torch() -> None:
    (p,), (t,), dout = case(4, (24,))
    for scale in (1e18, 1e-12):
        out, (grad,) = run([p * scale], [t * scale], dout, "triton")
        expected_out, (expected,) = run([p * scale], [t * scale], dout, "reference")
        torch.testing.assert_close(out, expected_out)
        torch.testing.assert_close(grad * scale, expected * scale, rtol=1e-4, atol=1e-7)


def test_nan_reaches_the_layer_it_is_in() -> None:
    predictions, targets, _ = case(5, (8, 9, 10))
    predictions[1][2, 3] = torch.nan
    out = cosine_invariance(predictions, targets, impl="triton")
    assert out.isnan().tolist() == [False, True, False]


def test_empty_batch_is_the_mean_over_nothing() -> None:
    predictions, targets, dout = case(0, (8, 9))
    for impl in ("triton", "reference"):
        out, grads = run(predictions, targets, dout, impl)
        assert out.isnan().all()
        assert [g.shape for g in grads] == [(0, 8), (0, 9)]


def test_strided_inputs() -> None:
    (p, q), (t, u), dout = case(8, (32, 18))
    arguments = ([p[::2], q.T.contiguous().T[:4]], [t[4:], u[::2]], dout)
    out, grads = run(*arguments, impl="triton")
    expected_out, expected_grads = run(*arguments, impl="reference")
    torch.testing.assert_close(out, expected_out)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_unaligned_storage() -> None:
    (p,), (t,), dout = case(5, (16,))
    shifted = torch.cat([torch.zeros(1), p.flatten()])[1:].view(5, 16)
    torch.testing.assert_close(
        run([shifted], [t], dout, "triton"), run([p], [t], dout, "triton"), rtol=0, atol=0
    )


def test_no_gradient_reaches_the_targets() -> None:
    (p,), (t,), dout = case(5, (12,))
    p.requires_grad_()
    t.requires_grad_()
    for impl in ("triton", "reference"):
        out = cosine_invariance([p], [t], impl=impl)
        grads = torch.autograd.grad(out, [p, t], dout, allow_unused=True)
        assert grads[0] is not None and grads[1] is None


@pytest.mark.parametrize("widths", [(3, 5), (2049,)])
def test_gradcheck(widths: tuple[int, ...]) -> None:
    predictions, targets, _ = case(2, widths, torch.float64)
    if max(widths) > 100:
        # The loop over a long row, with all but a few features constant.
        constant = predictions[0][:, 3:]

        def function(*free: Tensor) -> Tensor:
            return cosine_invariance([torch.cat([free[0], constant], 1)], targets, impl="triton")

        leaves = [predictions[0][:, :3].clone()]
    else:

        def function(*free: Tensor) -> Tensor:
            return cosine_invariance(list(free), targets, impl="triton")

        leaves = predictions
    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


def test_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    from arat_kernels.cosine_invariance import triton as kernels

    counters = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(kernels._counters, "take", lambda device: counters)
    predictions, targets, _ = case(70, (8, 9))
    first = cosine_invariance(predictions, targets, impl="triton")
    assert counters.tolist() == [0, 0]
    assert torch.equal(first, cosine_invariance(predictions, targets, impl="triton"))


def test_operators_pass_opcheck() -> None:
    predictions, targets, dout = case(3, (8, 5))
    leaves = [p.clone().requires_grad_() for p in predictions]
    torch.library.opcheck(_forward_op, (leaves, targets, 1e-8))
    torch.library.opcheck(_backward_op, (dout, predictions, targets, 1e-8))


def test_compiles_to_one_graph() -> None:
    predictions, targets, dout = case(3, (8, 5))
    module = CosineInvariance(impl="triton")

    def loss(*predictions: Tensor) -> Tensor:
        return module([p * 2 for p in predictions], targets) * 3

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [p.clone().requires_grad_() for p in predictions]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
