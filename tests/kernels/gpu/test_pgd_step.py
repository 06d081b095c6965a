"""The PGD kernels on real hardware, beside what all operations promise."""

from __future__ import annotations

import pytest
import torch
from kernels.graphs import capture, need_gib
from kernels.operations import ALPHA, EPS, assert_equal, image_tensors, step
from torch import Tensor

from arat_kernels.pgd_step import pgd_step, random_start
from arat_kernels.philox.reference import random_words
from arat_kernels.philox.streams import RANDOM_START

pytestmark = pytest.mark.gpu

NORMS = ["Linf", "L2"]
ROUNDING = 2.0**-23


def case(
    shape: tuple[int, ...],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> dict[str, Tensor]:
    return {n: t.to("cuda") for n, t in image_tensors(seed, dtype, shape, layout).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(128, 3, 32, 32), (5, 3, 17, 9), (2, 3, 224, 224)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_linf_equals_the_reference_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    tensors = case(shape, 0, dtype, layout)
    assert_equal(step().results(tensors, "triton"), step().results(tensors, "reference"))


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (7, 3, 64, 64), (2, 3, 224, 224)], ids=str)
def test_l2_follows_the_float64_reference(shape: tuple[int, ...]) -> None:
    operation, tensors = step("L2", 0.5, 0.2), case(shape)
    wide = {name: t.double() if name[0] == "x" else t for name, t in tensors.items()}
    truth = operation.results(wide, "reference")["0"]
    got = operation.results(tensors, "triton")["0"]
    assert (got.double() - truth).abs().max() <= 8 * ROUNDING
    lengths = torch.linalg.vector_norm((got - tensors["x"]).double().flatten(1), dim=1)
    assert (lengths <= 0.5 + 1e-5).all() and (lengths > 0.1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_nan_gradient_is_not_hidden(norm: str) -> None:
    tensors = case((3, 3, 32, 32))
    tensors["grad"][1, 0, 2, 1] = torch.nan
    expected = tensors["grad"].isnan()
    expected[1] |= norm == "L2"
    assert torch.equal(step(norm).results(tensors, "triton")["0"].isnan(), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (3, 3, 64, 65), (2, 3, 224, 224)], ids=str)
def test_start_follows_the_reference(norm: str, shape: tuple[int, ...]) -> None:
    x = case(shape)["x"]
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
    _, grad, x, _ = case((16, 3, 32, 32)).values()
    rng = torch.tensor([7, 0], device="cuda")

    def attack() -> Tensor:
        start = random_start(x, rng, eps=EPS, norm=norm, impl="triton")
        rng[1].add_(1)
        return pgd_step(start, grad, x, eps=EPS, alpha=ALPHA, norm=norm, impl="triton")

    graph, static = capture(attack)
    seen = []
    for seed, offset in ((7, 0), (7, 1), (8, 0)):
        _, new_grad, new_x, _ = case((16, 3, 32, 32), seed=10 * offset + seed).values()
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
