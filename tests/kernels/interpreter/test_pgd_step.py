"""The PGD kernels in Triton's interpreter, beside what all operations promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.operations import ALPHA, EPS, assert_equal, image_tensors, start, step
from kernels.support import few
from torch import Tensor

NORMS = ["Linf", "L2"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Rounding of x ± eps in float32, for values up to 1.
SLACK = 2.0**-23


def lengths(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t.double().flatten(1), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_linf_equals_the_reference_bit_for_bit(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    operation = step(shape=(5, 3, 9, 11), layout=layout)
    tensors = operation.make(0, dtype)
    tensors["grad"][0, 0, 0, :3] = 0
    got = operation.results(tensors, "triton")
    assert_equal(got, operation.results(tensors, "reference"))
    assert torch.equal(got["0"], got["x_adv"]) and not torch.equal(got["0"], tensors["x"])


@pytest.mark.parametrize("size", [(3, 7, 5), (3, 16, 32), (1, 4097, 1), (1, 65, 64), (1, 16385, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_l2_follows_the_reference(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    eps = 0.5
    operation = step("L2", eps, 0.2)
    tensors = image_tensors(1, dtype, (3, *size), eps=eps / math.sqrt(math.prod(size)))
    wide = {name: t.double() if name != "grad" else t for name, t in tensors.items()}
    truth = operation.results(wide, "reference")["0"]
    got = operation.results(tensors, "triton")["0"]
    # Three sums, a division and a product, each relative to a perturbation below 1.
    assert (got.double() - truth).abs().max() <= 8 * SLACK
    assert (lengths(got - tensors["x"]) > 0.1).all()


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
    operation = step(norm, eps, alpha, shape=(num, size))
    tensors = operation.make(seed, torch.float32)
    got = operation.results(tensors, "triton")["0"]
    delta = got - tensors["x"]
    assert ((got >= 0) & (got <= 1)).all()
    if norm == "Linf":
        assert (delta.abs() <= eps + SLACK).all()
    else:
        assert (lengths(delta) <= eps * (1 + 1e-6) + SLACK * math.sqrt(size)).all()


def test_float64_is_exact_in_the_interpreter() -> None:
    operation = step("L2", 0.1, 0.3)
    tensors = {n: t.double() for n, t in operation.make(5, torch.float32).items() if n != "rng"}
    got, expected = (operation.results(tensors, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("offset", [0, 7, 2**32 + 1])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_linf_start_equals_the_reference_bit_for_bit(
    offset: int, layout: torch.memory_format
) -> None:
    operation = start(shape=(5, 3, 9, 11), layout=layout)
    tensors = operation.make(6, torch.float32)
    tensors["rng"][1] = offset
    got, key = operation.results(tensors, "triton"), tensors["rng"].tolist()
    assert_equal(got, operation.results(tensors, "reference"))
    assert got["0"].stride() == tensors["x"].stride() and tensors["rng"].tolist() == key


@pytest.mark.parametrize("size", [1, 6, 1024, 4097, 16389])
def test_l2_start_follows_the_reference(size: int) -> None:
    operation = start("L2", 0.5, shape=(3, size))
    tensors = operation.make(7, torch.float32)
    got, expected = (operation.results(tensors, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, expected, rtol=0, atol=4 * SLACK)


@pytest.mark.parametrize("norm", NORMS)
def test_an_attack_compiles_to_one_graph(norm: str) -> None:
    first, then = start(norm), step(norm, EPS, ALPHA)
    tensors = first.make(10, torch.float32)

    def attack(tensors: dict[str, Tensor]) -> Tensor:
        x_adv = first.call(tensors, "triton")
        moved = then.call({**tensors, "x_adv": x_adv}, "triton")  # type: ignore[dict-item]
        assert isinstance(moved, Tensor)
        return moved * 2

    compiled = torch.compile(attack, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors), attack(tensors))
