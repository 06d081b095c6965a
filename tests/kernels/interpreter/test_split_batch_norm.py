"""The real kernels of split BatchNorm in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from kernels.split_batch_norm_cases import Case, Inputs, call, make, run, truth
from kernels.split_batch_norm_group import check_two_processes
from kernels.support import assert_within_budget, few, generator
from torch import Tensor

import arat_kernels.split_batch_norm.triton as implementation
from arat_kernels.offsets import start_of
from arat_kernels.split_batch_norm import split_batch_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPLITS = [(3, 2), (4, 0), (0, 3), (1, 5)]


def check(case: Case) -> None:
    inputs = make(case)
    got = run(case, inputs, "triton")
    baseline = run(case, inputs, "reference")
    for name, expected in truth(case, inputs).items():
        assert got[name].dtype == baseline[name].dtype, name
        # PyTorch on the CPU accumulates these sums in float64, the kernels in float32.
        summed = name in ("gradient of weight", "gradient of bias")
        assert_within_budget(got[name], expected, baseline[name], name, 4.0 if summed else 2.0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_float64_reference(
    dtype: torch.dtype, channels_last: bool, sizes: tuple[int, int], training: bool
) -> None:
    check(Case(dtype=dtype, channels_last=channels_last, sizes=sizes, training=training))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("residual", "relu", "pooled", "affine"), list(product([True, False], repeat=4))
)
def test_every_combination_of_options(
    residual: bool, relu: bool, pooled: bool, affine: bool, training: bool
) -> None:
    check(
        Case(
            residual=residual,
            relu=relu,
            pooled=pooled,
            affine=affine,
            training=training,
            channels=16,
            dtype=torch.bfloat16,
        )
    )


@given(
    sizes=st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda sizes: sum(sizes) > 0),
    channels=st.sampled_from([1, 2, 7, 16, 33, 64, 65, 130]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    pooled=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
@few(10)
def test_any_shape(
    sizes: tuple[int, int],
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    pooled: bool,
    channels_last: bool,
    seed: int,
) -> None:
    training = all(size * height * width != 1 for size in sizes)
    check(
        Case(
            sizes=sizes,
            channels=channels,
            height=height,
            width=width,
            dtype=dtype,
            pooled=pooled,
            channels_last=channels_last,
            training=training,
            seed=seed,
        )
    )


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("programs", [1, 7])
def test_many_tiles_and_segments(
    monkeypatch: pytest.MonkeyPatch, programs: int, pooled: bool
) -> None:
    monkeypatch.setattr(implementation, "_programs", lambda x: programs)
    check(Case(sizes=(1, 3), channels=70, height=9, width=11, pooled=pooled))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("residual", "relu"), list(product([True, False], repeat=2)))
def test_gradcheck(residual: bool, relu: bool, training: bool) -> None:
    case = Case(
        sizes=(2, 1),
        channels=2,
        height=2,
        width=1,
        dtype=torch.float64,
        training=training,
        update=False,
        residual=residual,
        relu=relu,
    )
    inputs = make(case)
    leaves = [inputs.x, inputs.weight, inputs.bias]
    if inputs.residual is not None:
        leaves.append(inputs.residual)

    def function(*arguments: Tensor) -> tuple[Tensor, Tensor | None]:
        return call(case, inputs, "triton")

    # The fast mode checks a random projection of the Jacobian; one case checks every entry.
    fast = not (residual and relu and training)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=fast)


def test_nhwc_view_with_odd_strides_and_expanded_gradient() -> None:
    case = Case(sizes=(2, 2), channels=6, relu=False, pooled=False)
    inputs = make(case)
    wide = torch.zeros(4, 12, 4, 6)
    wide[:, ::2, :, ::2] = inputs.x
    inputs.x = wide[:, ::2, :, ::2]
    inputs.weight = inputs.weight.t().contiguous().t()
    inputs.upstream = (torch.tensor(0.7).expand_as(inputs.x), inputs.upstream[1])
    assert not inputs.x.is_contiguous(memory_format=torch.channels_last)
    got, expected = run(case, inputs, "triton"), truth(case, inputs)
    baseline = run(case, inputs, "reference")
    for name in ("y", "gradient of weight", "gradient of bias", "gradient of residual"):
        assert_within_budget(got[name], expected[name], baseline[name], name)
    # A constant gradient has no component that reaches x: what is left is rounding.
    assert got["gradient of x"].abs().max() < 1e-5


@pytest.mark.parametrize("sizes", [(4, 4), (6, 0)])
def test_variance_of_values_far_from_zero(sizes: tuple[int, int]) -> None:
    shape = (sum(sizes), 17, 31, 29)
    x = (torch.randn(shape, generator=generator(3)) + 1e4).contiguous(
        memory_format=torch.channels_last
    )
    _, var = implementation.statistics(x, None, None, sizes[0], 0.1)
    for row, part in zip(var, x.double().split(list(sizes)), strict=True):
        if len(part):
            expected = part.var(dim=(0, 2, 3), unbiased=False)
            assert ((row - expected) / expected).abs().max() <= 1e-4


def test_outlier_in_the_first_row_does_not_spoil_the_variance() -> None:
    x = torch.randn((2, 3, 40, 40), generator=generator(4)).contiguous(
        memory_format=torch.channels_last
    )
    x[0, :, 0, 0] = 3e4
    _, var = implementation.statistics(x, None, None, 2, 0.1)
    expected = x.double().var(dim=(0, 2, 3), unbiased=False)
    assert ((var[0] - expected) / expected).abs().max() <= 1e-5


def test_running_statistics_stay_where_they_should() -> None:
    case = Case(sizes=(0, 4))
    inputs = make(case)
    moved = run(case, inputs, "triton")
    assert torch.equal(moved["running_mean"][0], inputs.running_mean[0])
    assert torch.equal(moved["running_var"][0], inputs.running_var[0])
    assert not torch.equal(moved["running_mean"][1], inputs.running_mean[1])
    for still in (replace(case, update=False), replace(case, training=False)):
        results = run(still, inputs, "triton")
        assert torch.equal(results["running_mean"], inputs.running_mean)
        assert torch.equal(results["running_var"], inputs.running_var)


def test_nan_is_not_hidden_by_relu() -> None:
    case = Case(training=False)
    inputs = make(case)
    inputs.x[1, 2, 0, 0] = float("nan")
    y, pooled = call(case, inputs, "triton")
    assert torch.isnan(y[1, 2, 0, 0]) and torch.isnan(pooled[1, 2])
    assert int(torch.isnan(y).sum()) == 1 and int(torch.isnan(pooled).sum()) == 1


class Calls:
    """Counts the calls of one operator of the module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.number = 0
        operator = getattr(implementation, name)

        def counted(*arguments: object) -> object:
            self.number += 1
            return operator(*arguments)

        monkeypatch.setattr(implementation, name, counted)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen weights", "weights not asked for"])
def test_attack_computes_no_weight_gradient(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    case = Case(training=False, pooled=False)
    inputs = make(case)
    for leaf in (inputs.weight, inputs.bias):
        leaf.requires_grad_(not frozen)
    inputs.x.requires_grad_()
    sums, dx = Calls(monkeypatch, "backward_sums"), Calls(monkeypatch, "backward_input")
    y, _ = call(case, inputs, "triton")
    torch.autograd.grad(y, inputs.x, inputs.upstream[0])
    assert (sums.number, dx.number) == (0, 1)


def test_weight_gradient_alone_computes_no_input_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(pooled=False)
    inputs = make(case)
    for leaf in (inputs.x, inputs.residual, inputs.weight):
        leaf.requires_grad_()
    sums, dx = Calls(monkeypatch, "backward_sums"), Calls(monkeypatch, "backward_input")
    y, _ = call(case, inputs, "triton")
    (got,) = torch.autograd.grad(y, inputs.weight, inputs.upstream[0])
    assert (sums.number, dx.number) == (1, 0)
    expected = truth(case, inputs)["gradient of weight"]
    baseline = run(case, inputs, "reference")["gradient of weight"]
    assert_within_budget(got, expected, baseline)


@pytest.mark.parametrize("unused", ["y", "pooled"])
def test_backward_call_with_one_output_unused(unused: str) -> None:
    case = Case(dtype=torch.float64)
    inputs = make(case)
    grads = []
    for impl in ("triton", "reference"):
        leaves = {
            name: getattr(inputs, name).clone().requires_grad_()
            for name in ("x", "residual", "weight", "bias")
        }
        fresh = make(case)
        y, pooled = call(case, Inputs(**{**vars(fresh), **leaves}), impl)
        used, upstream = (pooled, inputs.upstream[1])
        if unused == "pooled":
            used, upstream = (y, inputs.upstream[0])
        used.backward(upstream)
        grads.append([leaf.grad for leaf in leaves.values()])
    for got, expected in zip(*grads, strict=True):
        # The reference has no gradient, the operator a gradient of zeros, for what plays no part.
        expected = torch.zeros_like(got) if expected is None else expected
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_no_mask_is_stored_where_nothing_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = []
    operator = implementation.normalize

    def recorded(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
        results = operator(*arguments)
        stored.append(results[2].numel())
        return results

    monkeypatch.setattr(implementation, "normalize", recorded)
    case = Case()
    inputs = make(case)
    call(case, inputs, "triton")
    inputs.x.requires_grad_()
    call(case, inputs, "triton")
    with torch.no_grad():
        call(case, inputs, "triton")
    rows = sum(case.sizes) * case.height * case.width
    assert stored == [0, rows, 0]


def test_fullgraph_compile_is_bit_identical() -> None:
    case = Case(sizes=(2, 3), dtype=torch.bfloat16, channels=16)
    inputs = make(case)
    eager = run(case, inputs, "triton")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        return split_batch_norm(
            x,
            weight,
            bias,
            mean,
            var,
            case.sizes,
            training=True,
            momentum=case.momentum,
            eps=case.eps,
            residual=residual,
            relu=True,
            return_pooled=True,
            impl="triton",
        )

    leaves = [
        leaf.clone().requires_grad_()
        for leaf in (inputs.x, inputs.residual, inputs.weight, inputs.bias)
    ]
    y, pooled = function(*leaves, inputs.running_mean, inputs.running_var)
    assert torch.equal(y, eager["y"]) and torch.equal(pooled, eager["pooled"])
    assert torch.equal(inputs.running_mean, eager["running_mean"])
    assert torch.equal(inputs.running_var, eager["running_var"])
    gradients = torch.autograd.grad([y, pooled], leaves, inputs.upstream)
    for name, gradient in zip(("x", "residual", "weight", "bias"), gradients, strict=True):
        assert torch.equal(gradient, eager[f"gradient of {name}"]), name


def test_opcheck() -> None:
    case = Case(sizes=(1, 2), height=2, width=2)
    inputs = make(case)
    x, mean, var = inputs.x, inputs.running_mean, inputs.running_var
    leaves = [t.clone().requires_grad_() for t in (x, inputs.residual, inputs.weight, inputs.bias)]
    x_leaf, residual, weight, bias = leaves
    torch.library.opcheck(implementation.statistics, (x, mean.clone(), var.clone(), 1, 0.1))
    torch.library.opcheck(implementation.statistics, (x, None, None, 1, 0.1))
    flags = (1, 1e-3, True, True, True, False, None)
    torch.library.opcheck(
        implementation.normalize, (x_leaf, residual, mean, var, weight, bias, None, *flags)
    )
    mask = implementation.normalize(
        x, inputs.residual, mean, var, inputs.weight, inputs.bias, None, *flags
    )[2]
    dy, dpooled = inputs.upstream
    dy = dy.contiguous(memory_format=torch.channels_last)
    shared = (dy, dpooled, x, mean, var, inputs.weight, inputs.bias, mask)
    torch.library.opcheck(implementation.backward_sums, (*shared, 1, 1e-3, True, True))
    sums = torch.randn((2, 2, case.channels), generator=generator(1))
    counts = torch.tensor([4.0, 8.0])
    torch.library.opcheck(
        implementation.backward_input, (*shared, sums, counts, 1, 1e-3, True, True)
    )


@triton.jit
def _offsets_kernel(out_ptr, number, clean_rows, rows, clean_segments, segment_rows, channels):  # type: ignore[no-untyped-def]
    pid = tl.program_id(0)
    segment = number + pid
    branch, first, count = implementation._segment(
        segment, clean_rows, rows, clean_segments, segment_rows
    )
    tl.store(out_ptr + 4 * pid, branch.to(tl.int64))
    tl.store(out_ptr + 4 * pid + 1, first)
    tl.store(out_ptr + 4 * pid + 2, count.to(tl.int64))
    tl.store(out_ptr + 4 * pid + 3, start_of(first + 1, channels))


@pytest.mark.parametrize("clean", [2**25 + 3, 0, 2**26])
def test_offsets_beyond_two_to_the_31(clean: int) -> None:
    """2^33 elements: rows and element offsets are exact, and the segments tile the rows."""
    rows, channels, segment_rows = 2**26 + 11, 128, 1000
    clean_segments = -(-clean // segment_rows)
    segments = clean_segments + -(-(rows - clean) // segment_rows)
    starts = [0, max(clean_segments - 3, 0), segments - 6]
    for start in starts:
        out = torch.zeros(6, 4, dtype=torch.int64)
        _offsets_kernel[(6,)](out, start, clean, rows, clean_segments, segment_rows, channels)
        for segment, (branch, first, count, offset) in enumerate(out.tolist(), start):
            if segment < clean_segments:
                expected = segment * segment_rows
                end = clean
            else:
                expected = clean + (segment - clean_segments) * segment_rows
                end = rows
            assert branch == int(segment >= clean_segments)
            assert first == expected
            assert count == min(segment_rows, end - expected)
            assert offset == (expected + 1) * channels


@pytest.mark.parametrize("training", [True, False])
def test_parameters_of_16_bits(training: bool) -> None:
    """As after ``model.to(bfloat16)``: the same as with the same numbers in float32."""
    case = Case(dtype=torch.bfloat16, training=training)
    narrow, wide = make(case), make(case)
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(narrow, name, getattr(narrow, name).bfloat16())
        setattr(wide, name, getattr(narrow, name).float())
    expected = run(case, wide, "triton")
    for name, value in run(case, narrow, "triton").items():
        # The buffers that the kernel moves are truncated by the interpreter, not rounded.
        rtol = 2.0**-7 if name.startswith("running") else 0
        rounded = expected[name].to(value.dtype)
        torch.testing.assert_close(value, rounded, rtol=rtol, atol=0, msg=name)
        assert value.dtype == torch.bfloat16 or name == "pooled"


def test_statistics_over_two_processes(tmp_path: Path) -> None:
    check_two_processes(tmp_path, "triton")
