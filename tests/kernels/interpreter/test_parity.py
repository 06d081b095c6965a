"""Kernels in Triton's interpreter at many sizes and options, against the reference."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.support import few
from torch import Tensor

from arat_kernels.arrivals import counters
from arat_kernels.checks import (
    ALPHA,
    EPS,
    SLACK,
    Norm,
    Operation,
    Tensors,
    affine,
    assert_equal,
    classes,
    crops,
    distance,
    image_tensors,
    randn,
    relu,
    start,
    step,
)
from arat_kernels.cosine_invariance import cosine_invariance
from arat_kernels.crop_flip import crop_flip, draw_crop_flip
from arat_kernels.cross_entropy_grad import cross_entropy_grad
from arat_kernels.frozen_affine import relu_backward
from arat_kernels.image_parts import image_parts
from arat_kernels.layout import same_strides

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
NORMS = ["Linf", "L2", "L1"]
FLAGS = list(product([True, False], repeat=3))
OUTPUTS: list[dict[str, Any]] = [
    {"dtype": dtype, "memory_format": layout}
    for dtype, layout in zip(DTYPES, [*LAYOUTS, LAYOUTS[1]], strict=True)
]
WIDTHS = [(33, (100, 7)), (3, (600,)), (2, (2100, 30)), (2, tuple(range(8, 21)))]

OPTIONS = ("residual", "relu", "pooled", "affine", "training")

CASES: dict[str, list[Operation]] = {
    "split_batch_norm": [
        Norm(sizes, training=training, channels_last=channels_last).operation
        for sizes, channels_last in (((3, 2), False), ((4, 0), True), ((0, 3), False))
        for training in (True, False)
    ],
    "frozen_affine": [
        affine(last, layout=layout, scaled=scaled, residual=residual)
        for layout in LAYOUTS
        for scaled, residual, last in FLAGS
    ],
    "frozen_affine-ranks": [
        affine(shape=s) for s in ((5, 20), (4, 32, 9), (2, 16, 3, 3, 3), (0, 3, 4, 4))
    ],
    "relu_backward": [
        relu(shape=shape, skip=skip) for shape in ((3, 5, 3, 7), (7, 9)) for skip in (True, False)
    ],
    "cosine_invariance": [distance(*sizes) for sizes in WIDTHS],
    "cosine_invariance-targets": [distance(*sizes, torch.float32) for sizes in WIDTHS[::2]],
    "cross_entropy_grad": [classes(5, width) for width in (1, 100, 1000, 4096, 4100)],
    "pgd_step": [
        *(step(shape=(5, 3, 9, 11), layout=layout) for layout in LAYOUTS),
        *(
            step("L1", eps, 2.0, shape=(1, 3, 37, 39), layout=layout)
            for eps, layout in zip((0.5, 8.0), LAYOUTS, strict=True)
        ),
    ],
}
# No dtype plays a part here.
STARTS = [
    *(start(shape=(5, 3, 9, 11), layout=layout) for layout in LAYOUTS),
    *(start("L2", 0.5, shape=(3, size)) for size in (1, 6, 1024, 4097, 16389)),
    *(start("L1", 0.5, shape=(3, size)) for size in (1, 6, 16389)),
]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *product(CASES, DTYPES[:1]),
        ("random_start", torch.float32),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in product(CASES, DTYPES[1:])),
    ],
    ids=str,
)
def test_against_the_float64_reference(name: str, dtype: torch.dtype) -> None:
    for operation in CASES.get(name, STARTS):
        tensors = operation.make(0, dtype)
        operation.check(tensors)
        for result in operation.results(tensors, "triton").values():
            if name == "frozen_affine":
                assert result.stride() == tensors["x"].stride()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags, marks=() if sum(flags) % 2 else pytest.mark.slow)
        for flags in product([True, False], repeat=5)
    ],
    ids=str,
)
def test_every_combination_of_options(flags: tuple[bool, ...]) -> None:
    """Every one of four, the fifth following from them, is among the fast ones."""
    norm = Norm(channels=16).changed(**dict(zip(OPTIONS, flags, strict=True)))
    norm.operation.check(norm.make(0, torch.bfloat16))


@given(
    sizes=st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda sizes: sum(sizes) > 0),
    channels=st.sampled_from([1, 2, 7, 16, 33, 65]),
    height=st.integers(1, 5),
    width=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    pooled=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
@few(5)
@pytest.mark.slow
def test_any_batch_norm(dtype: torch.dtype, seed: int, **options: Any) -> None:
    norm = Norm(**options)
    counts = [size * norm.height * norm.width for size in norm.sizes if size]
    # Of few values the gradient is a difference of nearly equal numbers, whose rounding a budget
    # relative to the result does not know.
    norm = norm.changed(training=min(counts) >= 8)
    norm.operation.check(norm.make(seed, dtype))


@pytest.mark.parametrize("sizes", [(2, 3), (7, 2)], ids=str)
def test_batch_norm_of_few_values(sizes: tuple[int, int]) -> None:
    operation = Norm(sizes, height=1, width=1, relu=False, pooled=False).operation
    tensors = operation.make(0, torch.float32)
    got, expected = (operation.results(tensors, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


ANY: dict[str, tuple[st.SearchStrategy[Operation], float]] = {
    "frozen_affine": (
        st.builds(
            lambda flags, layout, shape: affine(
                flags[0], shape=shape, layout=layout, scaled=flags[1], residual=flags[2]
            ),
            st.sampled_from(FLAGS),
            st.sampled_from(LAYOUTS),
            st.tuples(
                st.integers(0, 3),
                st.sampled_from([1, 3, 16, 17, 48, 64, 100]),
                st.integers(1, 5),
                st.integers(1, 7),
            ),
        ),
        1e-6,
    ),
    "cosine_invariance": (
        st.builds(
            lambda num, widths: distance(num, tuple(widths)),
            st.integers(1, 9),
            st.lists(st.integers(1, 70), min_size=1, max_size=5),
        ),
        1e-4,
    ),
    "cross_entropy_grad": (st.builds(classes, st.integers(0, 70), st.integers(1, 140)), 1e-5),
    "crop_flip": (
        st.builds(
            lambda shape, num, output, **drawn: crops(shape, num, **output, **drawn),
            st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
            st.integers(0, 5),
            st.sampled_from(OUTPUTS),
            padding=st.integers(0, 10),
            flip=st.booleans(),
        ),
        0,
    ),
}


@pytest.mark.parametrize("name", ANY)
@few(12)
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_shape(name: str, data: st.DataObject, seed: int) -> None:
    strategy, rtol = ANY[name]
    operation = data.draw(strategy)
    tensors = operation.make(seed, torch.float32)
    got, expected = (operation.results(tensors, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, expected, rtol=rtol, atol=min(rtol, 1e-6), equal_nan=True)


def narrowed(operation: Operation, names: str, dtype: torch.dtype, seed: int) -> None:
    """Tensors of another dtype are widened first."""
    tensors = operation.make(seed, torch.float16)
    other = tensors | {n: t.to(dtype) for n, t in tensors.items() if n[0] in names}
    wide = tensors | {n: t.float() for n, t in other.items() if n[0] in names}
    assert_equal(operation.results(other, "triton"), operation.results(wide, "triton"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_constants_of_another_dtype(dtype: torch.dtype) -> None:
    narrowed(affine(residual=False), "s", dtype, 3)


def test_targets_of_another_narrow_dtype() -> None:
    narrowed(distance(), "t", torch.bfloat16, 1)


@pytest.mark.parametrize("name", ["x", "residual"])
def test_only_what_is_asked_for_is_differentiated(name: str) -> None:
    operation = Operation(affine().call, affine().make, (name,))
    operation.check(operation.make(4, torch.float32))


def test_relu_backward_is_what_autograd_computes_for_a_folded_convolution() -> None:
    """y feeds a further convolution and a skip connection; both of its inputs want a gradient."""
    a, residual = randn((2, 4, 6, 6), 0).requires_grad_(), randn((2, 8, 6, 6), 1).requires_grad_()
    weight, bias = randn((8, 4, 3, 3), 2), randn((8,), 3)
    next_weight = randn((8, 8, 3, 3), 4)
    dz, dy_skip = randn((2, 8, 6, 6), 5), randn((2, 8, 6, 6), 6)
    inner = torch.nn.functional.conv2d(a, weight, bias, padding=1)
    y = (inner + residual).relu()
    z = torch.nn.functional.conv2d(y, next_weight, padding=1)
    expected = torch.autograd.grad([z, y], [inner, residual], [dz, dy_skip])
    dy = torch.nn.grad.conv2d_input(y.shape, next_weight, dz, padding=1)
    got = relu_backward(dy, y.detach(), dy_skip=dy_skip, impl="triton")
    torch.testing.assert_close(got, expected[0])
    torch.testing.assert_close(got, expected[1])


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_parts_of_images_add_up(channels: int, impl: Any) -> None:
    """Within 2^-16, far below the 2^-12 of TF32; the gradient is that of the high part."""
    x = image_tensors(0, torch.float32, (2, channels, 5, 7))["x"].requires_grad_()
    got = image_parts(x, impl=impl)
    high, low, rest = got.double().split([channels, channels, got.shape[1] - 2 * channels], 1)
    assert got.shape[1] % 8 == 0 and not rest.any()
    assert ((high + low - x).abs() <= 2.0**-16 * x.abs()).all()
    upstream = randn(tuple(got.shape), 1, torch.bfloat16)
    (dx,) = torch.autograd.grad(got, x, upstream)
    assert torch.equal(dx, upstream[:, :channels].float())


@pytest.mark.slow
def test_gradcheck_of_the_loops_over_a_long_row() -> None:
    p, t = distance(2, (2049,)).make(6, torch.float64).values()
    logits, target = classes(2, 4097).make(4, torch.float64).values()

    def cosine(free: Tensor) -> Tensor:
        return cosine_invariance([torch.cat([free, p[:, 3:]], 1)], [t], impl="triton")

    def entropy(free: Tensor) -> Tensor:
        parts = torch.cat([free, logits[:, 3:]], 1)
        return cross_entropy_grad(parts, target % 3, impl="triton")[1]

    for function, whole in ((cosine, p), (entropy, logits)):
        assert torch.autograd.gradcheck(function, whole[:, :3].clone().requires_grad_())


def test_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, Tensor] = {}

    def take(device: torch.device, size: int) -> Tensor:
        return kept.setdefault(size, torch.zeros(size, dtype=torch.int32))

    monkeypatch.setattr(counters, "take", take)
    for operation in (distance(40, (8, 9, 7)), Norm((0, 4), 130, 3, 3).operation):
        tensors = operation.make(7, torch.float32)
        first = operation.results(tensors, "triton")
        assert_equal(operation.results(tensors, "triton"), first)
    # One for each layer; one for each branch and block of 64 channels.
    assert [counts.tolist() for counts in kept.values()] == [[0] * 3, [0] * 6]


@pytest.mark.parametrize("num_classes", [10, 32, 4100])
def test_slices_and_narrow_targets(num_classes: int) -> None:
    logits, target = classes(12, num_classes).make(1, torch.float32).values()
    expected = cross_entropy_grad(logits, target, impl="triton")
    # The slice is copied to memory of its own, whose rows lie closer than the slice's.
    sliced = torch.cat([randn((12, 1), 7), logits, randn((12, 16), 8)], 1)[:, 1 : num_classes + 1]
    assert sliced.data_ptr() % 16
    got = cross_entropy_grad(sliced, target.int(), impl="triton")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("stored", LAYOUTS, ids=str)
def test_crops(output: dict[str, Any], stored: torch.memory_format) -> None:
    """Drawn, given and none; of a strided part of the images, by narrow indices, too."""
    images, index, rng = crops((7, 4, 10, 12)).make(0, torch.float32).values()
    images = images.to(memory_format=stored)
    offsets = draw_crop_flip(rng, 5, padding=3, flip=True)

    def both(images: Tensor, index: Tensor, **options: Any) -> Tensor:
        got, expected = (
            crop_flip(images, index, impl=impl, **output, **options)
            for impl in ("triton", "reference")
        )
        assert got.dtype == expected.dtype and same_strides(got, expected)
        assert_equal({"": got}, {"": expected})
        return got

    for strided in (images, images[:, 1:, :, ::2]):
        drawn = both(strided, index, padding=3, flip=True, rng=rng)
        assert torch.equal(both(strided, index, padding=3, offsets=offsets), drawn)
        assert not torch.equal(both(strided, index.repeat_interleave(2).int()[::2]), drawn)


def lengths(t: Tensor, order: int = 2) -> Tensor:
    return torch.linalg.vector_norm(t.double().flatten(1), order, dim=1)


@pytest.mark.parametrize("size", [(3, 7, 5), (3, 16, 32), (1, 4097, 1), (1, 65, 64), (1, 16385, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_l2_follows_the_float64_reference(size: tuple[int, ...], dtype: torch.dtype) -> None:
    operation = step("L2", 0.5, 0.2)
    tensors = image_tensors(1, dtype, (3, *size), eps=0.5 / math.sqrt(math.prod(size)))
    wide = {name: t.double() if name != "grad" else t for name, t in tensors.items()}
    truth = operation.results(wide, "reference")["0"]
    got = operation.results(tensors, "triton")["0"]
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
    elif norm == "L2":
        assert (lengths(delta) <= eps * (1 + 1e-6) + SLACK * math.sqrt(size)).all()
    else:
        assert (lengths(delta, 1) <= eps * (1 + 1e-6) + SLACK * size).all()


@pytest.mark.parametrize("norm", NORMS[1:])
def test_in_float64_it_is_exact(norm: str) -> None:
    operation = step(norm, 0.1, 0.3)
    tensors = {n: t.double() for n, t in operation.make(5, torch.float32).items() if n != "rng"}
    got, expected = (operation.results(tensors, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_an_attack_compiles_to_one_graph(norm: str) -> None:
    first, then = start(norm), step(norm, EPS, ALPHA)
    tensors = first.make(10, torch.float32)

    def attack(tensors: Tensors) -> Tensor:
        x_adv = first.call(tensors, "triton")
        moved = then.call({**tensors, "x_adv": x_adv}, "triton")  # type: ignore[dict-item]
        assert isinstance(moved, Tensor)
        return moved * 2

    compiled = torch.compile(attack, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors), attack(tensors))
