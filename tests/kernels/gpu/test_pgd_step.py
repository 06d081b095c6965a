"""The PGD kernels on real hardware."""

from __future__ import annotations

import pytest
import torch
from kernels.graphs import capture, need_gib, on_side_stream
from kernels.support import at_an_odd_place, randn
from torch import Tensor

from arat_kernels.pgd_step import pgd_step, random_start
from arat_kernels.philox.reference import random_words
from arat_kernels.philox.streams import RANDOM_START

pytestmark = pytest.mark.gpu

NORMS = ["Linf", "L2"]
EPS, ALPHA = 8 / 255, 2 / 255
ROUNDING = 2.0**-23


def case(
    shape: tuple[int, ...], seed: int = 0, grad_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    x = randn(shape, seed).mul(0.5).sigmoid()
    x_adv = (x + EPS * randn(shape, seed + 1)).clamp(0, 1)
    return x_adv.to("cuda"), randn(shape, seed + 2, grad_dtype).to("cuda"), x.to("cuda")


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(128, 3, 32, 32), (5, 3, 17, 9), (2, 3, 224, 224)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_linf_equals_the_reference_bit_for_bit(
    grad_dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    x_adv, grad, x = (t.to(memory_format=layout) for t in case(shape, 0, grad_dtype))
    expected = pgd_step(x_adv.clone(), grad, x, eps=EPS, alpha=ALPHA, impl="reference")
    assert torch.equal(pgd_step(x_adv, grad, x, eps=EPS, alpha=ALPHA, impl="triton"), expected)


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (7, 3, 64, 64), (2, 3, 224, 224)], ids=str)
def test_l2_follows_the_float64_reference(shape: tuple[int, ...]) -> None:
    x_adv, grad, x = case(shape)
    truth = pgd_step(
        x_adv.double(), grad, x.double(), eps=0.5, alpha=0.2, norm="L2", impl="reference"
    )
    got = pgd_step(x_adv, grad, x, eps=0.5, alpha=0.2, norm="L2", impl="triton")
    assert (got.double() - truth).abs().max() <= 8 * ROUNDING
    lengths = torch.linalg.vector_norm((got - x).double().flatten(1), dim=1)
    assert (lengths <= 0.5 + 1e-5).all() and (lengths > 0.1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_tensors_at_odd_places(norm: str) -> None:
    """x_adv is stepped in a copy, whose numbers must come back to where x_adv lies."""
    x_adv, grad, x = case((5, 3, 32, 32), 0, torch.bfloat16)
    moved = at_an_odd_place(x_adv)
    arguments = {"eps": EPS, "alpha": ALPHA, "norm": norm, "impl": "triton"}
    expected = pgd_step(x_adv, grad, x, **arguments)
    got = pgd_step(moved, at_an_odd_place(grad), at_an_odd_place(x), **arguments)
    assert got is moved and moved.data_ptr() % 16
    assert torch.equal(moved, expected)
    rng = torch.tensor([5, 6], device="cuda")
    start = random_start(x, rng, eps=EPS, norm=norm, impl="triton")
    again = random_start(at_an_odd_place(x), rng, eps=EPS, norm=norm, impl="triton")
    assert torch.equal(again, start)


@pytest.mark.parametrize("norm", NORMS)
def test_nan_gradient_is_not_hidden(norm: str) -> None:
    x_adv, grad, x = case((3, 3, 32, 32))
    grad[1, 0, 2, 1] = torch.nan
    got = pgd_step(x_adv, grad, x, eps=EPS, alpha=ALPHA, norm=norm, impl="triton")
    expected = grad.isnan()
    expected[1] |= norm == "L2"
    assert torch.equal(got.isnan(), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (3, 3, 64, 65), (2, 3, 224, 224)], ids=str)
def test_start_follows_the_reference(norm: str, shape: tuple[int, ...]) -> None:
    x = case(shape)[2]
    rng = torch.tensor([2**40 + 5, 2**33 + 1], device="cuda")
    got = random_start(x, rng, eps=0.5, norm=norm, impl="triton")
    expected = random_start(x, rng, eps=0.5, norm=norm, impl="reference")
    on_cpu = random_start(x.cpu(), rng.cpu(), eps=0.5, norm=norm, impl="reference").to("cuda")
    for other in (expected, on_cpu):
        # A fused multiply-add rounds once where the reference rounds twice. The device's logarithm
        # is coarse near 1, which the shortest of the normal numbers show.
        off = (got - other).abs()
        assert (off > 4 * ROUNDING).float().mean() <= (0 if norm == "Linf" else 1e-3)
        assert off.max() <= 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_graph_replay_draws_new_numbers_and_sees_new_inputs(norm: str) -> None:
    _, grad, x = case((16, 3, 32, 32))
    rng = torch.tensor([7, 0], device="cuda")

    def attack() -> Tensor:
        start = random_start(x, rng, eps=EPS, norm=norm, impl="triton")
        rng[1].add_(1)
        return pgd_step(start, grad, x, eps=EPS, alpha=ALPHA, norm=norm, impl="triton")

    graph, static = capture(attack)
    seen = []
    for seed, offset in ((7, 0), (7, 1), (8, 0)):
        _, new_grad, new_x = case((16, 3, 32, 32), seed=10 * offset + seed)
        grad.copy_(new_grad)
        x.copy_(new_x)
        rng.copy_(torch.tensor([seed, offset]))
        graph.replay()
        assert rng.tolist() == [seed, offset + 1]
        seen.append(static - x)
        rng.copy_(torch.tensor([seed, offset]))
        assert torch.equal(static, attack())
    before = rng.tolist()
    graph.replay()
    first = static.clone()
    graph.replay()
    assert rng[1] == before[1] + 2
    assert (first != static).float().mean() > 0.3
    assert (seen[0] != seen[1]).float().mean() > 0.3


@pytest.mark.parametrize("norm", NORMS)
def test_side_stream(norm: str) -> None:
    x_adv, grad, x = case((64, 3, 32, 32))
    expected = pgd_step(x_adv.clone(), grad, x, eps=EPS, alpha=ALPHA, norm=norm, impl="triton")
    got = on_side_stream(
        lambda late: pgd_step(
            x_adv.clone(), late, x, eps=EPS, alpha=ALPHA, norm=norm, impl="triton"
        ),
        grad,
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_more_than_two_to_the_31_elements(norm: str) -> None:
    need_gib(40)
    num, size = 2**19 + 3, 4096
    x = torch.full((num, size), 0.5, device="cuda")
    assert x.numel() > 2**31
    rng = torch.tensor([1, 2], device="cuda")
    x_adv = random_start(x, rng, eps=EPS, norm=norm, impl="triton")
    last = slice(num - 2, num)
    if norm == "Linf":
        groups = torch.arange((num - 2) * size // 4, num * size // 4, device="cuda")
        words = torch.stack(random_words(rng, groups, RANDOM_START), -1).view(2, size)
        expected = 0.5 + (2 * ((words >> 8).float() * 2.0**-24) - 1) * EPS
        torch.testing.assert_close(x_adv[last], expected, rtol=0, atol=2 * ROUNDING)
    assert (x_adv[last] != 0.5).float().mean() > 0.99
    grad = torch.empty(num, size, dtype=torch.bfloat16, device="cuda")
    for part in grad.split(2**16):
        part.normal_()
    expected = pgd_step(
        x_adv[last].clone(), grad[last], x[last], eps=EPS, alpha=ALPHA, norm=norm, impl="reference"
    )
    pgd_step(x_adv, grad, x, eps=EPS, alpha=ALPHA, norm=norm, impl="triton")
    torch.testing.assert_close(x_adv[last], expected, rtol=0, atol=4 * ROUNDING)


@pytest.mark.parametrize("norm", NORMS)
def test_compiled_with_inductor_is_bit_identical(norm: str) -> None:
    _, grad, x = case((8, 3, 32, 32))
    rng = torch.tensor([3, 4], device="cuda")

    def attack(x: Tensor, grad: Tensor) -> Tensor:
        start = random_start(x, rng, eps=EPS, norm=norm, impl="triton")
        return pgd_step(start, grad, x, eps=EPS, alpha=ALPHA, norm=norm, impl="triton")

    torch._dynamo.reset()
    assert torch.equal(torch.compile(attack, fullgraph=True)(x, grad), attack(x, grad))
