"""What every operation promises, by the real kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels.edges import EDGES, Run
from torch import Tensor

from arat_kernels.checks import DIFFERENTIABLE, OPERATIONS, Tensors, assert_equal, at_an_odd_place
from arat_kernels.cosine_invariance import triton as cosine_invariance
from arat_kernels.crop_flip import triton as crop_flip
from arat_kernels.cross_entropy_grad import triton as cross_entropy_grad
from arat_kernels.frozen_affine import triton as frozen_affine
from arat_kernels.image_parts import triton as image_parts
from arat_kernels.image_parts.reference import image_parts_reference
from arat_kernels.pgd_step import pgd_step as move
from arat_kernels.pgd_step import triton as pgd_step
from arat_kernels.split_batch_norm import triton as split_batch_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_float64_reference(name: str, dtype: torch.dtype) -> None:
    operation = OPERATIONS[name]
    operation.check(operation.make(0, dtype))


def test_the_nan_that_a_gpu_computes_is_seen() -> None:
    x = torch.rand(2, 3, 4, 4)
    x.view(torch.int32)[1, 2, 3, 0] = 0x7FFFFFFF
    parts = image_parts.forward(x)
    assert parts.isnan().nonzero().tolist() == [[1, 2, 3, 0], [1, 5, 3, 0]]


@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_at_odd_places(name: str) -> None:
    operation = OPERATIONS[name]
    tensors = operation.make(1, torch.bfloat16)
    moved = {key: at_an_odd_place(t) for key, t in tensors.items()}
    assert_equal(operation.results(moved, "triton"), operation.results(tensors, "triton"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_strides(name: str) -> None:
    """Every second element of a larger memory, the dimensions in another order."""
    operation = OPERATIONS[name]
    tensors = operation.make(2, torch.float32)

    def spread(t: Tensor) -> Tensor:
        memory = t.new_zeros([2 * size for size in reversed(t.shape)])
        view = memory.permute(*reversed(range(t.ndim)))[(slice(None, None, 2),) * t.ndim]
        return view.copy_(t)

    # Buffers and keys are contiguous, or refused.
    kept = {"rng", "running_mean", "running_var"}
    if "parts" in tensors:
        kept |= {"parts", "x_adv"}
    strided = {key: t if key in kept else spread(t) for key, t in tensors.items()}
    operation = replace(operation, moved=())
    expected = operation.results({key: t.clone() for key, t in strided.items()}, "reference")
    got = operation.results(strided, "triton")
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n,
            marks=pytest.mark.slow
            if n.startswith(("split_batch_norm-", "cross_entropy_grad-"))
            else (),
        )
        for n in DIFFERENTIABLE
    ],
)
def test_gradcheck(name: str) -> None:
    operation = OPERATIONS[name]
    tensors = operation.make(3, torch.float64)
    leaves = {key: tensors[key] for key in operation.leaves if key in tensors}

    def function(*free: Tensor) -> Any:
        # Buffers that move would be others at every call.
        given = {key: t.clone() for key, t in tensors.items()}
        out = operation.call({**given, **dict(zip(leaves, free, strict=True))}, "triton")
        return out if isinstance(out, Tensor) else tuple(t for t in out if t.requires_grad)

    free = [leaf.requires_grad_() for leaf in leaves.values()]
    # The fast mode checks a random projection of the Jacobian.
    fast = sum(leaf.numel() for leaf in free) > 60
    assert torch.autograd.gradcheck(function, free, fast_mode=fast)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused(name: str) -> None:
    """It would give tangents of zero."""
    operation = OPERATIONS[name]
    tensors = operation.make(4, torch.float32)
    leaf = operation.leaves[0]

    def function(free: Tensor) -> Any:
        out = operation.call({**tensors, leaf: free}, "triton")
        return out if isinstance(out, Tensor) else out[-1]

    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(function, (tensors[leaf],), (torch.ones_like(tensors[leaf]),))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused(name: str) -> None:
    """They would lose what depends on the input through the gradient."""
    operation = OPERATIONS[name]
    tensors = operation.make(5, torch.float32)
    leaf = tensors[operation.leaves[0]].requires_grad_()
    out = operation.call(tensors, "triton")
    value = out if isinstance(out, Tensor) else next(t for t in out if t.requires_grad)
    (gradient,) = torch.autograd.grad(value.square().sum(), leaf, create_graph=True)
    assert gradient.requires_grad
    # Another term, so that something would be found if the gradient were a constant.
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(gradient.square().sum() + leaf.square().sum(), leaf)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if "-" in n else ()) for n in OPERATIONS],
)
def test_compiles_to_one_graph(name: str) -> None:
    operation = OPERATIONS[name]

    def function(tensors: Tensors) -> Any:
        return operation.call(tensors, "triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    for seed in (6, 60):
        tensors = operation.make(seed, torch.bfloat16)
        expected = operation.results(tensors, "triton")
        one = replace(operation, call=lambda tensors, impl: compiled(tensors))
        assert_equal(one.results(tensors, None), expected)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 1, 4, 4), (1, 3, 37, 39)], ids=str)
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_a_step_moves_the_parts_too(norm: Any, shape: tuple[int, ...]) -> None:
    """By the gradient of the high part, to the parts of where the image is then."""
    draw = torch.Generator().manual_seed(1)
    layout = torch.channels_last
    x, noise = (torch.rand(shape, generator=draw).to(memory_format=layout) for _ in range(2))
    parts = image_parts_reference(x + 0.1 * noise)
    grad = torch.randn(parts.shape, generator=draw).bfloat16().to(memory_format=layout)
    found = []
    for impl in ("triton", "reference"):
        x_adv, moved = x + 0.1 * noise, parts.clone()
        move(x_adv, grad, x, eps=0.1, alpha=0.02, norm=norm, parts=moved, impl=impl)  # type: ignore[arg-type]  # either name
        assert torch.equal(moved, image_parts_reference(x_adv))
        found.append(x_adv)
    torch.testing.assert_close(*found, rtol=0, atol=0 if norm == "Linf" else 1e-6)


def bn_tensors() -> tuple[Tensors, tuple[Tensor | None, ...], Tensor]:
    tensors = OPERATIONS["split_batch_norm"].make(7, torch.float32)
    affine = tuple(tensors[name] for name in ("running_mean", "running_var", "weight", "bias"))
    mask = torch.zeros(tensors["x"][:, 0].numel(), 1, dtype=torch.uint8)
    return tensors, affine, mask


def bn_arguments(which: str) -> tuple[Any, ...]:
    tensors, affine, mask = bn_tensors()
    x, residual = tensors["x"], tensors["residual"]
    if which.endswith("statistics"):
        moved = tensors["running_mean"], tensors["running_var"], torch.tensor([4, 7])
        return x, *((residual,) if which.startswith("sum") else ()), *moved, 3, 0.1
    if which == "normalize":
        leaves = [t.clone().requires_grad_() for t in (x, residual, *affine[2:])]  # type: ignore[union-attr]
        given = (*leaves[:2], *affine[:2], *leaves[2:], None, 3, 1e-3, True, True, True, False)
        return (*given, None, *[None] * 4, False)
    if which == "normalize mean":
        leaves = [t.clone().requires_grad_() for t in (x, *affine[2:])]  # type: ignore[union-attr]
        given = (leaves[0], None, *affine[:2], *leaves[1:], None, 3, 1e-3, True, True, False, True)
        return (*given, None, *[None] * 4, True)
    if which == "normalize both":
        leaves = [t.clone().requires_grad_() for t in (x, residual, *affine[2:], *affine[2:])]  # type: ignore[union-attr]
        given = (*leaves[:2], *affine[:2], *leaves[2:4], None, 3, 1e-3, True, False, True, True)
        return (*given, None, *affine[:2], *leaves[4:], False)
    shared = (x[:, :, 0, 0].contiguous(), x, *affine, mask)
    if which == "sums":
        return (residual, x, *shared, residual, *affine[:2], 3, 1e-3, True, True)
    sums, counts = torch.randn(4, 2, 5), torch.tensor([4.0, 8.0])
    second = (residual, *affine[:3])
    return (residual, x, x, *shared, *second, sums, counts, 3, 1e-3, True, True)


X = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
ROW, RNG = torch.randn(3), torch.tensor([1, 2])
LEAF = X.clone().requires_grad_()
BITS = torch.zeros(1, 512, dtype=torch.uint8)
PARTS = image_parts_reference(X)
ROWS = [torch.randn(3, 8), torch.randn(3, 5)]
IMAGES, INDEX = torch.zeros(4, 3, 5, 5, dtype=torch.uint8), torch.tensor([3, 0])
OFFSETS = torch.tensor([[0, 2, 1], [1, 1, 0]], dtype=torch.int32)

OPERATORS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "statistics": (split_batch_norm.statistics, lambda: bn_arguments("statistics")),
    "sum statistics": (split_batch_norm.sum_statistics, lambda: bn_arguments("sum statistics")),
    "normalize": (split_batch_norm.normalize, lambda: bn_arguments("normalize")),
    "normalize mean": (split_batch_norm.normalize, lambda: bn_arguments("normalize mean")),
    "normalize both": (split_batch_norm.normalize, lambda: bn_arguments("normalize both")),
    "sums": (split_batch_norm.backward_sums, lambda: bn_arguments("sums")),
    "input": (split_batch_norm.backward_input, lambda: bn_arguments("input")),
    "affine": (frozen_affine.forward, lambda: (LEAF, ROW, ROW, X, True, None, True)),
    "affine of a sum": (frozen_affine.forward, lambda: (LEAF, ROW, ROW, None, True, X, True)),
    "affine bias": (frozen_affine.forward, lambda: (LEAF, None, ROW, None, False, None, False)),
    "affine backward": (frozen_affine.backward, lambda: (X, X, X, BITS, ROW, True, True)),
    "affine backward of few": (
        frozen_affine.backward,
        lambda: (X, X[:, :, ::2, ::2], X, X, ROW, True, True),
    ),
    "relu backward": (frozen_affine.backward, lambda: (X, X, None, X, None, True, False)),
    "cosine": (
        cosine_invariance.forward,
        lambda: ([t.clone().requires_grad_() for t in ROWS], ROWS, 1e-8),
    ),
    "cosine backward": (cosine_invariance.backward, lambda: (ROW[:2], ROWS, ROWS, 1e-8)),
    "entropy": (
        cross_entropy_grad.forward,
        lambda: (ROWS[0].clone().requires_grad_(), torch.tensor([1, 7, 0])),
    ),
    "weighted entropy": (
        cross_entropy_grad.forward_weighted,
        lambda: (ROWS[0].clone().requires_grad_(), ROWS[0].abs()),
    ),
    "entropy backward": (cross_entropy_grad.backward, lambda: (ROWS[0], ROWS[0], ROW)),
    "step": (pgd_step.step, lambda: (X.clone(), X, X, None, 0.1, 0.1, "Linf")),
    "step of parts": (pgd_step.step, lambda: (X.clone(), PARTS, X, PARTS.clone(), 0.1, 0.1, "L2")),
    "start": (pgd_step.start, lambda: (X[:, :, ::2], RNG, 0.1, "L2", 7)),
    "parts": (image_parts.forward, lambda: (LEAF,)),
    "crops": (
        crop_flip.forward,
        lambda: (IMAGES, INDEX, RNG, None, 1, True, 255.0, torch.float32, False),
    ),
    "given crops": (
        crop_flip.forward,
        lambda: (IMAGES, INDEX, None, OFFSETS, 1, False, 16.0, torch.bfloat16, True),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    operator, arguments = OPERATORS[name]
    torch.library.opcheck(operator, arguments())


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edges(edge: Callable[[Run], None]) -> None:
    edge(lambda operation, tensors: operation.results(tensors, "triton"))
