"""The PGD kernels in Triton's interpreter, against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.support import few, randn
from torch import Tensor

from arat_kernels.pgd_step import pgd_step, random_start
from arat_kernels.pgd_step.triton import _pgd_step_op, _random_start_op

NORMS = ["Linf", "L2"]
EPS = 8 / 255
ALPHA = 2 / 255
# Rounding of x ± eps in float32, for values up to 1.
SLACK = 2.0**-23


def case(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """x_adv somewhere around the ball's surface, a random gradient, x in [0, 1]."""
    x = randn(shape, seed).mul(0.5).sigmoid()
    x_adv = (x + eps * randn(shape, seed + 1)).clamp(0, 1)
    return x_adv, randn(shape, seed + 2, dtype), x


def lengths(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t.double().flatten(1), dim=1)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_linf_equals_the_reference_bit_for_bit(
    grad_dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    x_adv, grad, x = (t.to(memory_format=memory_format) for t in case((5, 3, 9, 11), 0, grad_dtype))
    grad[0, 0, 0, :3] = 0
    expected = pgd_step(x_adv.clone(), grad, x, eps=EPS, alpha=ALPHA, impl="reference")
    got = pgd_step(x_adv, grad, x, eps=EPS, alpha=ALPHA, impl="triton")
    assert got is x_adv
    assert torch.equal(got, expected)
    assert not torch.equal(got, x)


@pytest.mark.parametrize("size", [(3, 7, 5), (3, 16, 32), (1, 4097, 1), (1, 65, 64), (1, 16385, 1)])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_l2_follows_the_reference(size: tuple[int, int, int], grad_dtype: torch.dtype) -> None:
    eps = 0.5
    x_adv, grad, x = case((3, *size), 1, grad_dtype, eps / math.sqrt(math.prod(size)))
    truth = pgd_step(
        x_adv.double(), grad, x.double(), eps=eps, alpha=0.2, norm="L2", impl="reference"
    )
    got = pgd_step(x_adv, grad, x, eps=eps, alpha=0.2, norm="L2", impl="triton")
    # Three sums, a division and a product, each relative to a perturbation below 1.
    assert (got.double() - truth).abs().max() <= 8 * SLACK
    assert (lengths(got - x) > 0.1).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["sliced", "odd place", "expanded x", "permuted grad"])
def test_any_strides(norm: str, layout: str) -> None:
    x_adv, grad, x = case((4, 3, 6, 10), 2)
    if layout == "sliced":
        x_adv = torch.stack([x_adv, x_adv], -1)[..., 1]
    elif layout == "odd place":
        x_adv = torch.cat([x_adv.new_zeros(1), x_adv.flatten()])[1:].view(x_adv.shape)
        assert x_adv.data_ptr() % 16
    elif layout == "expanded x":
        x = x[:, :1].expand(-1, 3, -1, -1)
    else:
        grad = grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    expected = pgd_step(x_adv.clone(), grad, x, eps=EPS, alpha=ALPHA, norm=norm, impl="reference")
    pgd_step(x_adv, grad, x, eps=EPS, alpha=ALPHA, norm=norm, impl="triton")
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=2 * SLACK)


@few(12)
@given(
    num=st.integers(0, 4),
    size=st.integers(1, 70),
    eps=st.floats(0, 0.5),
    alpha=st.floats(0, 1),
    norm=st.sampled_from(NORMS),
    seed=st.integers(0, 99),
)
def test_stays_in_the_ball_and_in_the_image_range(
    num: int, size: int, eps: float, alpha: float, norm: str, seed: int
) -> None:
    x_adv, grad, x = case((num, size), seed, eps=eps)
    got = pgd_step(x_adv, grad, x, eps=eps, alpha=alpha, norm=norm, impl="triton")
    assert ((got >= 0) & (got <= 1)).all()
    if norm == "Linf":
        assert ((got - x).abs() <= eps + SLACK).all()
    else:
        assert (lengths(got - x) <= eps * (1 + 1e-6) + SLACK * math.sqrt(size)).all()


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("norm", NORMS)
def test_nan_gradient_is_not_hidden(norm: str, impl: str) -> None:
    x_adv, grad, x = case((3, 2, 4, 4), 3)
    grad[1, 0, 2, 1] = math.nan
    got = pgd_step(x_adv, grad, x, eps=EPS, alpha=ALPHA, norm=norm, impl=impl)
    expected = torch.zeros_like(grad, dtype=torch.bool)
    expected[1] = True if norm == "L2" else grad[1].isnan()
    assert torch.equal(got.isnan(), expected)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_moves_nothing_inside_the_ball(norm: str, impl: str) -> None:
    _, grad, x = case((3, 2, 4, 4), 4)
    x_adv = (x + 1e-3).clamp(0, 1)
    before = x_adv.clone()
    pgd_step(x_adv, torch.zeros_like(grad), x, eps=EPS, alpha=ALPHA, norm=norm, impl=impl)
    torch.testing.assert_close(x_adv, before, rtol=0, atol=SLACK)


def test_float64_is_exact_in_the_interpreter() -> None:
    x_adv, grad, x = (t.double() for t in case((2, 3, 5, 5), 5))
    expected = pgd_step(x_adv.clone(), grad, x, eps=0.1, alpha=0.3, norm="L2", impl="reference")
    got = pgd_step(x_adv, grad, x, eps=0.1, alpha=0.3, norm="L2", impl="triton")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("offset", [0, 7, 2**32 + 1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_linf_start_equals_the_reference_bit_for_bit(
    offset: int, memory_format: torch.memory_format
) -> None:
    x = case((5, 3, 9, 11), 6)[2].to(memory_format=memory_format)
    rng = torch.tensor([2**40 + 12345, offset])
    expected = random_start(x, rng, eps=EPS, impl="reference")
    got = random_start(x, rng, eps=EPS, impl="triton")
    assert torch.equal(got, expected)
    assert got.stride() == x.stride()
    assert rng.tolist() == [2**40 + 12345, offset]


@pytest.mark.parametrize("size", [1, 6, 1024, 4097, 16389])
def test_l2_start_follows_the_reference(size: int) -> None:
    x = case((3, size), 7)[2]
    rng = torch.tensor([3, 4])
    expected = random_start(x, rng, eps=0.5, norm="L2", impl="reference")
    got = random_start(x, rng, eps=0.5, norm="L2", impl="triton")
    torch.testing.assert_close(got, expected, rtol=0, atol=4 * SLACK)


@pytest.mark.parametrize("norm", NORMS)
def test_start_follows_seed_and_offset(norm: str) -> None:
    x = case((4, 3, 8, 8), 8)[2]
    draws = [
        random_start(x, torch.tensor(rng), eps=EPS, norm=norm, impl="triton")
        for rng in ([1, 0], [1, 1], [2, 0], [1, 2**32], [1 + 2**32, 0], [1, 0])
    ]
    assert torch.equal(draws[0], draws[5])
    for i in range(5):
        for j in range(i):
            assert (draws[i] != draws[j]).float().mean() > 0.9, (i, j)


def test_start_of_a_sliced_image_is_that_of_its_copy() -> None:
    x = case((4, 3, 8, 8), 9)[2][:, :, ::2]
    rng = torch.tensor([1, 2])
    got = random_start(x, rng, eps=EPS, impl="triton")
    assert torch.equal(got, random_start(x.contiguous(), rng, eps=EPS, impl="triton"))
    assert torch.equal(got, random_start(x, rng, eps=EPS, impl="reference"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 1, 5, 5), (5, 1, 1, 1)], ids=str)
def test_parts_of_a_batch_start_as_the_whole(norm: str, shape: tuple[int, ...]) -> None:
    x = case(shape, 9)[2].contiguous(memory_format=torch.channels_last)
    rng = torch.tensor([1, 2**33])
    whole = random_start(x, rng, eps=EPS, norm=norm, impl="triton")
    for first, stop in ((0, 2), (2, 5), (3, 4)):
        part = random_start(x[first:stop], rng, eps=EPS, norm=norm, first=first, impl="triton")
        assert torch.equal(part, whole[first:stop])
    far = random_start(x, rng, eps=EPS, norm=norm, first=2**31 + 1, impl="triton")
    expected = random_start(x, rng, eps=EPS, norm=norm, first=2**31 + 1, impl="reference")
    torch.testing.assert_close(far, expected, rtol=0, atol=0 if norm == "Linf" else 4 * SLACK)


@pytest.mark.parametrize("norm", NORMS)
def test_operators_pass_opcheck(norm: str) -> None:
    x_adv, grad, x = case((2, 3, 4, 4), 10)
    torch.library.opcheck(_pgd_step_op, (x_adv, grad, x, EPS, ALPHA, norm))
    torch.library.opcheck(_random_start_op, (x, torch.tensor([1, 2]), EPS, norm))
    torch.library.opcheck(_random_start_op, (x[:, :, ::2], torch.tensor([1, 2]), EPS, norm, 7))


@pytest.mark.parametrize("norm", NORMS)
def test_compiles_to_one_graph(norm: str) -> None:
    x_adv, grad, x = case((2, 3, 4, 4), 11)
    rng = torch.tensor([5, 6])

    def attack(x: Tensor, grad: Tensor, rng: Tensor) -> Tensor:
        start = random_start(x, rng, eps=EPS, norm=norm, impl="triton")
        return pgd_step(start, grad, x, eps=EPS, alpha=ALPHA, norm=norm, impl="triton") * 2

    compiled = torch.compile(attack, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, grad, rng), attack(x, grad, rng))
