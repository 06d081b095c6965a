"""Every operation as a function of named tensors, held to an error budget that is derived from
PyTorch's own run and a truth in float64: for the tests, and for the self-check on a user's card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arat_kernels.cosine_invariance import cosine_invariance
from arat_kernels.crop_flip import crop_flip
from arat_kernels.cross_entropy_grad import cross_entropy_grad
from arat_kernels.frozen_affine import add_frozen_affine, frozen_affine, relu_backward
from arat_kernels.image_parts import image_parts
from arat_kernels.image_parts.reference import image_parts_reference
from arat_kernels.implementation import Impl
from arat_kernels.pgd_step import pgd_step, random_start
from arat_kernels.split_batch_norm import (
    SplitBatchNorm2d,
    add_for,
    mean_of_relu,
    normalize_sum,
    split_batch_norm,
)

Tensors = dict[str, Tensor]


def hold(right: bool, says: str) -> None:
    """``assert``, also where Python leaves those out (``-O``)."""
    if not right:
        raise AssertionError(says)


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that no check depends on another; on torch's default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers on torch's default device, of any dtype."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def at_an_odd_place(t: Tensor) -> Tensor:
    """The same numbers, laid out the same, not at a multiple of 16 bytes."""
    store = t.new_empty(t.numel() + 1)
    moved = store.as_strided(t.shape, t.stride(), 1).copy_(t.detach())
    hold(bool(moved.data_ptr() % 16), "memory begins at a multiple of 16 bytes")
    return moved


def to_float64(value: Any) -> Any:
    """Every floating-point tensor in a nest of tuples, lists and dicts, widened; others as is."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(to_float64(item) for item in value)
    if isinstance(value, dict):
        return {key: to_float64(item) for key, item in value.items()}
    return value


def upstream(like: Tensor, seed: int) -> Tensor:
    """A random gradient of ``like``, of so few binary digits that it is the same in every dtype.

    Made once and kept in :data:`UPSTREAM`: a CUDA graph cannot capture a generator of its own.
    """
    key = (like.shape, like.stride(), like.dtype, like.device, seed)
    if key not in UPSTREAM:
        with like.device:
            numbers = (32 * randn(tuple(like.shape), seed, torch.float64)).round() / 32
        UPSTREAM[key] = torch.empty_like(like.detach()).copy_(numbers)
    return UPSTREAM[key]


UPSTREAM: dict[Any, Tensor] = {}

EDGE = 1e-5
"""A hundred times what float32 rounds of what ReLU sees, and far less than most of it."""


def assert_within_budget(
    got: Tensor, truth: Tensor, baseline: Tensor, name: str = "result", factor: float = 2.0
) -> float:
    """``got`` may be at most ``factor`` times as wrong as ``baseline``, PyTorch's own run.

    Both the root mean square and the largest error are held to
    ``factor * (error(baseline) + eps / 2 * size(truth))``; the last term is what a correctly
    rounded result of ``got``'s dtype may be off by, and keeps a baseline that accumulates in
    float64, as PyTorch's on the CPU does, from forbidding float32.

    Args:
        got: the kernel's result, any floating dtype.
        truth: the same in float64.
        baseline: PyTorch's result from the same low-precision inputs.

    Returns:
        The larger share of its budget that one of the two took.
    """
    hold(got.shape == truth.shape, f"{name}: shape {tuple(got.shape)} != {tuple(truth.shape)}")
    hold(truth.dtype == torch.float64, f"{name}: the truth must be float64, got {truth.dtype}")
    if truth.numel() == 0:
        return 0.0
    hold(bool(torch.isfinite(truth).all()), f"{name}: the truth itself is not finite")
    hold(bool(torch.isfinite(got).all()), f"{name}: holds NaN or infinity")
    rounding, share = torch.finfo(got.dtype).eps / 2, 0.0
    sizes: dict[str, Callable[[Tensor], float]] = {
        "rms": lambda t: t.square().mean().sqrt().item(),
        "max": lambda t: t.abs().max().item(),
    }
    for measure, size in sizes.items():
        error = size(got.detach().double() - truth)
        own = size(baseline.detach().double() - truth)
        allowed = factor * (own + rounding * size(truth))
        hold(error <= allowed, f"{name}: {measure} error {error:.3e}, allowed {allowed:.3e}")
        share = max(share, error / allowed if allowed else 0.0)
    return share


@dataclass(frozen=True)
class Operation:
    """One way to call a public function.

    Args:
        call: tensors and implementation to outputs.
        make: seed and dtype to tensors on the CPU.
        leaves: names of the tensors that get a gradient.
        moved: names of those that are changed in place.
        summed: names of those whose gradient sums over the batch: PyTorch on the CPU accumulates
            in float64 what the kernels do in float32.
        atol: what the kernel may be off the reference by, 0 for the same bits; None: the budget.
        on_card: on a GPU, ``atol`` or the budget's factor, where Triton's exponentials, logarithms,
            roots and divisions are approximations and PyTorch's are not; None: as elsewhere.
        edges: names of tensors, each with what ReLU sees of them. :meth:`check` moves numbers that
            are so near zero there that rounding decides what ReLU does, and with it whole numbers
            of the gradient.
    """

    call: Callable[[Tensors, Impl | None], Tensor | Sequence[Tensor]]
    make: Callable[[int, torch.dtype], Tensors]
    leaves: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    atol: float | None = None
    on_card: float | None = None
    edges: tuple[tuple[str, Callable[[Tensors], Tensor]], ...] = ()

    def results(self, tensors: Tensors, impl: Impl | None) -> Tensors:
        """Outputs, gradients for random upstream ones, and what was changed in place."""
        given = {name: t.detach() for name, t in tensors.items()}
        for name in self.moved:
            odd = given[name].data_ptr() % 16
            given[name] = at_an_odd_place(given[name]) if odd else given[name].clone()
        leaves = {name: given[name].requires_grad_() for name in self.leaves if name in given}
        out = self.call(given, impl)
        outputs = {str(i): t for i, t in enumerate([out] if isinstance(out, Tensor) else out)}
        differentiable = [t for t in outputs.values() if t.requires_grad]
        results = {name: t.detach() for name, t in outputs.items()}
        if differentiable and leaves:
            dout = [upstream(t, 1000 + i) for i, t in enumerate(differentiable)]
            gradients = torch.autograd.grad(differentiable, list(leaves.values()), dout)
            results |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
        return results | {name: given[name].detach() for name in self.moved}

    def off_the_edges(self, tensors: Tensors) -> Tensors:
        """The tensors themselves where nothing is near an edge."""
        for name, before in self.edges:
            if name in tensors:
                near = before(to_float64(tensors)).abs() < EDGE
                if near.any():
                    tensors = {**tensors, name: tensors[name] + near.to(tensors[name].dtype) / 16}
        return tensors

    def check(self, tensors: Tensors, factor: float | None = None) -> float:
        """Hold Triton's results to the error of PyTorch's own, measured against float64, or where
        there is no such error, to PyTorch's own results.

        Args:
            tensors: of :attr:`make`, on any device.
            factor: of the budget; None: 2, or what :attr:`on_card` says.

        Returns:
            The largest share of its budget that a result took.

        Raises:
            AssertionError: says which result is how far off.
        """
        tensors = self.off_the_edges(tensors)
        on_card = self.on_card if any(t.is_cuda for t in tensors.values()) else None
        got, baseline = self.results(tensors, "triton"), self.results(tensors, "reference")
        if self.atol is not None:
            assert_equal(got, baseline, self.atol if on_card is None else on_card)
            return 0.0
        if factor is None:
            factor = 2.0 if on_card is None else on_card
        hold(got.keys() == baseline.keys(), f"results {[*got]} != {[*baseline]}")
        truth = self.results(to_float64(tensors), "reference")
        summed, share = {f"d{leaf}" for leaf in self.summed}, 0.0
        for name, expected in truth.items():
            hold(got[name].dtype == baseline[name].dtype, f"{name}: {got[name].dtype}")
            times = 4.0 if name in summed and not expected.is_cuda else factor
            own = assert_within_budget(got[name], expected, baseline[name], name, times)
            share = max(share, own)
        return share


def assert_equal(got: Tensors, expected: Tensors, atol: float = 0) -> None:
    """The same bits, NaN included."""
    hold(got.keys() == expected.keys(), f"results {[*got]} != {[*expected]}")
    for name, value in expected.items():
        says = partial("{}: {}".format, name)
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol, equal_nan=True, msg=says)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Norm:
    """A call of split BatchNorm: shapes and options."""

    sizes: tuple[int, int] = (3, 2)
    channels: int = 5
    height: int = 4
    width: int = 3
    training: bool = True
    update: bool = True
    residual: bool = True
    relu: bool = True
    pooled: bool = True
    affine: bool = True
    channels_last: bool = True
    momentum: float = 0.25
    eps: float = 1e-3

    def make(self, seed: int, dtype: torch.dtype) -> Tensors:
        """Random tensors; the branches differ in mean and spread."""
        c = self.channels
        shape = (sum(self.sizes), c, self.height, self.width)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        draw = partial(randn, dtype=torch.float64)
        x = draw(shape, seed) * 1.5 + draw((1, c, 1, 1), seed + 1)
        x[self.sizes[0] :] = x[self.sizes[0] :] * 0.5 - 1.0
        rows = {
            "weight": draw((2, c), seed + 2),
            "bias": draw((2, c), seed + 3),
            "running_mean": draw((2, c), seed + 4),
            "running_var": draw((2, c), seed + 5).abs() + 0.5,
        }
        images = {"x": x, "residual": draw(shape, seed + 6)}
        unused = [] if self.residual else ["residual"]
        unused += [] if self.affine else ["weight", "bias"]
        made = {name: t.to(dtype).contiguous(memory_format=layout) for name, t in images.items()}
        made |= {name: t.to(wide_of(dtype)) for name, t in rows.items()}
        return {name: t for name, t in made.items() if name not in unused}

    def call(self, t: Tensors, impl: Impl | None) -> Sequence[Tensor]:
        result = split_batch_norm(  # type: ignore[call-overload,misc]  # whether it pools is a setting
            t["x"],
            t.get("weight"),
            t.get("bias"),
            t["running_mean"],
            t["running_var"],
            self.sizes,
            training=self.training,
            update_running_stats=self.update,
            momentum=self.momentum,
            eps=self.eps,
            residual=t.get("residual"),
            relu=self.relu,
            return_pooled=self.pooled,
            impl=impl,
        )
        return result if isinstance(result, tuple) else (result,)

    @property
    def operation(self) -> Operation:
        leaves = ("x", "residual", "weight", "bias")
        moved = ("running_mean", "running_var")
        # Triton's root and division may be 3 ulp off.
        return Operation(
            self.call,
            self.make,
            leaves,
            moved,
            summed=("weight", "bias"),
            on_card=3.0,
            edges=self._edges,
        )

    @property
    def _edges(self) -> tuple[tuple[str, Callable[[Tensors], Tensor]], ...]:
        def plain(t: Tensors) -> Tensor:
            norm = self.changed(relu=False, pooled=False, update=False)
            return norm.call(t, "reference")[0]

        def without(t: Tensors) -> Tensor:
            return plain({name: tensor for name, tensor in t.items() if name != "residual"})

        # The pooled feature is of what the residual is added to.
        of_x = (("x", without),) if self.pooled or (self.relu and not self.residual) else ()
        return of_x + ((("residual", plain),) if self.relu else ())

    def changed(self, **options: Any) -> Norm:
        return replace(self, **options)


_ROWS = ("weight", "bias", "running_mean", "running_var")


def _layer(norm: Norm) -> SplitBatchNorm2d:
    """A layer that normalises as ``norm`` does."""
    layer = SplitBatchNorm2d(norm.channels, norm.eps, norm.momentum)
    layer.branch, layer.num_clean = "both", norm.sizes[0]
    layer.statistics = "batch_update" if norm.training else "running"
    return layer


def _given(layer: SplitBatchNorm2d, t: Tensors, impl: Impl | None, prefix: str = "") -> None:
    """Put tensors of :data:`_ROWS` and an implementation into a layer."""
    layer.impl = impl
    for name in _ROWS:
        kept = layer._parameters if name in _ROWS[:2] else layer._buffers
        kept[name] = t[prefix + name]  # type: ignore[assignment]  # a leaf in its place


def added(
    sizes: tuple[int, int] = (3, 2), channels: int = 5, height: int = 4, width: int = 3
) -> Operation:
    """Split BatchNorm of a sum that is formed in the pass that takes its statistics, and the sum.

    The summands have so few binary digits that every dtype holds the sum, which Triton's
    interpreter would truncate and PyTorch round.
    """
    norm = Norm(sizes, channels, height, width, residual=False, relu=False, pooled=False)
    layer = _layer(norm)

    def make(seed: int, dtype: torch.dtype) -> Tensors:
        made = norm.make(seed, dtype)
        x = made["x"]
        addend = torch.empty_like(x).copy_(randn(tuple(x.shape), seed + 7))
        return made | {"x": (16 * x).round() / 16, "addend": (16 * addend).round() / 16}

    def call(t: Tensors, impl: Impl | None) -> Sequence[Tensor]:
        _given(layer, t, impl)
        x = add_for(layer, t["x"], t["addend"])
        return layer(x), x

    own = norm.operation
    return replace(own, call=call, make=make, leaves=(*own.leaves, "addend"))


def averaged(**options: Any) -> Operation:
    """Split BatchNorm with ReLU whose mean over positions is all that is wanted."""
    norm = Norm(**options).changed(residual=False, relu=True, pooled=False)
    layer = _layer(norm)

    def call(t: Tensors, impl: Impl | None) -> Sequence[Tensor]:
        _given(layer, t, impl)
        return (mean_of_relu(layer, t["x"]),)

    return replace(norm.operation, call=call)


def both(**options: Any) -> Operation:
    """Split BatchNorm of a block's own path and of its shortcut, which are added."""
    norm = Norm(**options).changed(pooled=False, residual=True)
    layers = {"": _layer(norm), "residual_": _layer(norm)}

    def make(seed: int, dtype: torch.dtype) -> Tensors:
        second = norm.make(seed + 20, dtype)
        return norm.make(seed, dtype) | {f"residual_{name}": second[name] for name in _ROWS}

    def call(t: Tensors, impl: Impl | None) -> Sequence[Tensor]:
        for prefix, layer in layers.items():
            _given(layer, t, impl, prefix)
        one, other = layers.values()
        return (normalize_sum(one, t["x"], other, t["residual"], norm.relu),)

    def before(t: Tensors) -> Tensor:
        return both(**{**options, "relu": False}).call(t, "reference")[0]

    affine = tuple(prefix + name for prefix in layers for name in _ROWS[:2])
    moved = tuple(prefix + name for prefix in layers for name in _ROWS[2:])
    return Operation(
        call,
        make,
        ("x", "residual", *affine),
        moved if norm.training else (),
        summed=affine,
        on_card=3.0,
        edges=(("residual", before),) if norm.relu else (),
    )


def affine_tensors(
    seed: int,
    dtype: torch.dtype,
    shape: tuple[int, ...] = (3, 32, 5, 6),
    layout: torch.memory_format = torch.channels_last,
    scaled: bool = True,
    residual: bool = True,
) -> Tensors:
    made = {
        "x": randn(shape, seed, dtype),
        "residual": randn(shape, seed + 1, dtype),
        "scale": randn(shape[1:2], seed + 2, wide_of(dtype)),
        "shift": randn(shape[1:2], seed + 3, wide_of(dtype)),
    }
    unused = ([] if scaled else ["scale"]) + ([] if residual else ["residual"])
    return {
        name: t.to(memory_format=layout) if t.ndim == 4 else t
        for name, t in made.items()
        if name not in unused
    }


def affine(relu: bool = True, **options: Any) -> Operation:
    def call(t: Tensors, impl: Impl | None) -> Tensor:
        residual = t.get("residual")
        return frozen_affine(
            t["x"], t.get("scale"), t["shift"], residual=residual, relu=relu, impl=impl
        )

    def before(t: Tensors) -> Tensor:
        return affine(False).call(t, "reference")  # type: ignore[return-value]  # one tensor

    make, edges = partial(affine_tensors, **options), (("x", before),) if relu else ()
    return Operation(call, make, ("x", "residual"), edges=edges)


def added_affine(**options: Any) -> Operation:
    def call(t: Tensors, impl: Impl | None) -> tuple[Tensor, Tensor]:
        return add_frozen_affine(t["x"], t["residual"], t["scale"], t["shift"], impl=impl)

    return Operation(call, partial(affine_tensors, **options), ("x", "residual"))


def relu_tensors(
    seed: int,
    dtype: torch.dtype,
    shape: tuple[int, ...] = (3, 32, 4, 4),
    skip: bool = True,
    few: bool = False,
) -> Tensors:
    made = {"dy": randn(shape, seed, dtype), "y": randn(shape, seed + 1, dtype).relu()}
    dy_skip = randn(shape, seed + 2, dtype)
    made |= {"dy_skip": dy_skip[:, :, ::2, ::2] if few else dy_skip} if skip else {}
    layout = torch.channels_last
    return {name: t.contiguous(memory_format=layout) if few else t for name, t in made.items()}


def relu(**options: Any) -> Operation:
    def call(t: Tensors, impl: Impl | None) -> Tensor:
        return relu_backward(t["dy"], t["y"], dy_skip=t.get("dy_skip"), impl=impl)

    return Operation(call, partial(relu_tensors, **options))


def distance(
    num: int = 5,
    widths: tuple[int, ...] = (32, 16, 7),
    targets: torch.dtype | None = None,
    eps: float = 1e-8,
) -> Operation:
    names = [f"p{i}" for i in range(len(widths))]

    def make(seed: int, dtype: torch.dtype) -> Tensors:
        """Predictions, and targets that correlate with them."""
        made = {}
        for i, width in enumerate(widths):
            p = randn((num, width), seed + i, torch.float64)
            t = (p + randn((num, width), seed + 50 + i, torch.float64)).relu()
            made[f"p{i}"], made[f"t{i}"] = p.to(dtype), t.to(targets or dtype)
        return made

    def call(t: Tensors, impl: Impl | None) -> Tensor:
        stopped = [t["t" + name[1:]] for name in names]
        return cosine_invariance([t[name] for name in names], stopped, eps=eps, impl=impl)

    return Operation(call, make, tuple(names), on_card=5.0)


def classes(num: int = 6, num_classes: int = 10) -> Operation:
    def make(seed: int, dtype: torch.dtype) -> Tensors:
        target = torch.randint(num_classes, (num,), generator=generator(seed))
        return {"logits": (4 * randn((num, num_classes), seed + 1)).to(dtype), "target": target}

    def call(t: Tensors, impl: Impl | None) -> Sequence[Tensor]:
        return cross_entropy_grad(t["logits"], t["target"], impl=impl)

    return Operation(call, make, ("logits",), on_card=5.0)


def weighted(num: int = 6, num_classes: int = 10) -> Operation:
    """:func:`classes` with weights of the classes, which need not sum to 1."""
    operation = classes(num, num_classes)

    def make(seed: int, dtype: torch.dtype) -> Tensors:
        weights = torch.rand((num, num_classes), generator=generator(seed + 2))
        return operation.make(seed, dtype) | {"target": weights}

    return replace(operation, make=make)


EPS, ALPHA = 8 / 255, 2 / 255
# Rounding of x ± eps in float32, for values up to 1.
SLACK = 2.0**-23


def image_tensors(
    seed: int,
    dtype: torch.dtype,
    shape: tuple[int, ...] = (4, 3, 6, 10),
    layout: torch.memory_format = torch.contiguous_format,
    eps: float = EPS,
) -> Tensors:
    """x in [0, 1], x_adv around the ball's surface, a gradient of ``dtype``, a key."""
    x = randn(shape, seed).mul(0.5).sigmoid()
    x_adv = (x + eps * randn(shape, seed + 1)).clamp(0, 1)
    made = {"x_adv": x_adv, "grad": randn(shape, seed + 2, dtype), "x": x}
    made = {name: t.to(memory_format=layout) if t.ndim == 4 else t for name, t in made.items()}
    return made | {"rng": torch.tensor([2**40 + 12345 + seed, 2**32 + 1])}


def step(norm: str = "Linf", eps: float = EPS, alpha: float = ALPHA, **options: Any) -> Operation:
    def call(t: Tensors, impl: Impl | None) -> Tensor:
        return pgd_step(t["x_adv"], t["grad"], t["x"], eps=eps, alpha=alpha, norm=norm, impl=impl)  # type: ignore[arg-type]  # a name that tests choose

    make = partial(image_tensors, eps=eps, **options)
    # In L2 three sums, a division and a product, each relative to a perturbation below 1.
    atol = {"Linf": 0, "L2": 8 * SLACK}.get(norm)
    return Operation(call, make, moved=("x_adv",), atol=atol)


def step_of_parts(
    norm: str = "Linf", eps: float = EPS, alpha: float = ALPHA, **options: Any
) -> Operation:
    """:func:`step` that moves the parts of the images along, as under bfloat16."""

    def make(seed: int, dtype: torch.dtype) -> Tensors:
        made = image_tensors(seed, dtype, layout=torch.channels_last, eps=eps, **options)
        parts = image_parts_reference(made["x_adv"])
        grad = torch.empty_like(parts, dtype=dtype).copy_(randn(tuple(parts.shape), seed + 2))
        return made | {"grad": grad, "parts": parts}

    def call(t: Tensors, impl: Impl | None) -> Sequence[Tensor]:
        x_adv, parts = t["x_adv"], t["parts"]
        pgd_step(x_adv, t["grad"], t["x"], eps=eps, alpha=alpha, norm=norm, parts=parts, impl=impl)  # type: ignore[arg-type]  # a name that tests choose
        # The same bits only of the same image, which two roundings of a norm do not give.
        return x_adv, parts if norm == "Linf" else parts - image_parts_reference(x_adv)

    moved = ("x_adv", "parts") if norm == "Linf" else ("x_adv",)
    return replace(step(norm, eps, alpha), call=call, make=make, moved=moved)


def start(norm: str = "Linf", eps: float = EPS, first: int = 0, **options: Any) -> Operation:
    def call(t: Tensors, impl: Impl | None) -> Tensor:
        return random_start(t["x"], t["rng"], eps=eps, norm=norm, first=first, impl=impl)  # type: ignore[arg-type]  # a name that tests choose

    make = partial(image_tensors, **options)
    if norm == "Linf":
        return Operation(call, make, atol=0)
    # A GPU's logarithm is coarse near 1, which the shortest of the normal numbers show.
    return Operation(call, make, atol=4 * SLACK, on_card=2e-4 * eps)


def crops(shape: tuple[int, ...] = (7, 3, 10, 12), num: int = 5, **options: Any) -> Operation:
    def make(seed: int, dtype: torch.dtype) -> Tensors:
        numbers = generator(seed)
        return {
            "images": torch.randint(256, shape, generator=numbers, dtype=torch.uint8),
            "index": torch.randint(shape[0], (num,), generator=numbers),
            "rng": torch.tensor([2**40 + 1 + seed, 2**33 + 7]),
        }

    def call(t: Tensors, impl: Impl | None) -> Tensor:
        given = {"padding": 3, "flip": True, "rng": t["rng"], **options}
        return crop_flip(t["images"], t["index"], offsets=t.get("offsets"), impl=impl, **given)

    return Operation(call, make, atol=0)


def parts(shape: tuple[int, ...] = (3, 3, 5, 7)) -> Operation:
    def make(seed: int, dtype: torch.dtype) -> Tensors:
        return {"x": randn(shape, seed).mul(0.5).sigmoid()}

    return Operation(lambda t, impl: image_parts(t["x"], impl=impl), make, atol=0)


OPERATIONS: dict[str, Operation] = {
    "split_batch_norm": Norm().operation,
    "split_batch_norm-plain": Norm(residual=False, pooled=False).operation,
    "split_batch_norm-running": Norm(training=False).operation,
    "split_batch_norm-sum": added(),
    "split_batch_norm-mean": averaged(),
    "split_batch_norm-both": both(),
    "frozen_affine": affine(),
    "add_frozen_affine": added_affine(),
    "frozen_affine-bias": affine(scaled=False),
    "relu_backward": relu(),
    "relu_backward-few": relu(shape=(2, 48, 5, 7), few=True),
    "cosine_invariance": distance(),
    "cross_entropy_grad": classes(),
    "cross_entropy_grad-weighted": weighted(),
    "pgd_step": step(),
    "pgd_step-L2": step("L2"),
    "pgd_step-L1": step("L1", 1.0, 0.5, shape=(2, 3, 6, 10)),
    "pgd_step-parts": step_of_parts(),
    "pgd_step-L2-parts": step_of_parts("L2"),
    "pgd_step-L1-parts": step_of_parts("L1", 1.0, 0.5, shape=(2, 3, 6, 10)),
    "random_start": start(first=1),
    "random_start-L2": start("L2", first=1),
    "random_start-L1": start("L1", first=1),
    "image_parts": parts(),
    "crop_flip": crops(),
    "crop_flip-bf16": crops(dtype=torch.bfloat16),
}
DIFFERENTIABLE = [name for name, operation in OPERATIONS.items() if operation.leaves]


def on_gpu(operation: Operation, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    return {name: t.to("cuda") for name, t in operation.make(seed, dtype).items()}
