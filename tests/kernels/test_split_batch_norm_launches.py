"""What split BatchNorm launches is what its AOT cases promise."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from kernels.split_batch_norm_cases import Case, Inputs, call, make
from kernels.support import at_an_odd_place

from arat_kernels.implementation import interpreting

if interpreting():
    pytest.skip("the interpreter replaces the kernels", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a card is there, and its tests launch the kernels", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from kernels.launches import Launch, assert_promised, recorded  # noqa: E402

from arat_kernels.split_batch_norm import api  # noqa: E402
from arat_kernels.split_batch_norm.triton import (  # noqa: E402
    aot_cases,
    backward_input,
    statistics,
)


@pytest.fixture
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch since the start of the test."""
    monkeypatch.setattr(api, "choose", lambda impl, *tensors: impl)
    return recorded(monkeypatch, compiled="sizes_of_one" in request.node.name)


def run(case: Case, inputs: Inputs, parameters: bool, constant_residual: bool = False) -> None:
    """Forward and backward, with or without the gradients of the parameters and the residual."""
    inputs_of = (inputs.x,) if constant_residual else (inputs.x, inputs.residual)
    leaves = [leaf for leaf in inputs_of if leaf is not None]
    affine = [leaf for leaf in (inputs.weight, inputs.bias) if leaf is not None]
    for leaf in (*leaves, *affine):
        leaf.requires_grad_()
    y, pooled = call(case, inputs, "triton")
    outputs = [y] if pooled is None else [y, pooled]
    wanted = leaves + affine * parameters
    torch.autograd.grad(outputs, wanted, inputs.upstream[: len(outputs)])


STATISTICS = ["split_batch_norm_statistics_kernel", "split_batch_norm_combine_kernel"]
SUMS = ["split_batch_norm_bwd_sums_kernel", "split_batch_norm_bwd_combine_kernel"]
FORWARD, INPUT = "split_batch_norm_fwd_kernel", "split_batch_norm_bwd_input_kernel"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(), [*STATISTICS, FORWARD, *SUMS, INPUT]),
        (Case(sizes=(2, 0), pooled=False, update=False), [*STATISTICS, FORWARD, *SUMS, INPUT]),
        (Case(pooled=False, residual=False), [*STATISTICS, FORWARD, *SUMS, INPUT]),
        (Case(pooled=False, training=False), [FORWARD, INPUT]),
        (Case(pooled=False, training=False, residual=False), [FORWARD, INPUT]),
    ],
    ids=str,
)
def test_kernels_of_the_attack(launches: list[Launch], case: Case, expected: list[str]) -> None:
    run(case, make(case), parameters=False)
    assert [launch.kernel for launch in launches] == expected


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 16, 24, 32, 50, 64, 65, 512])
def test_every_launch_is_compiled_ahead_of_time(
    launches: list[Launch], dtype: torch.dtype, channels: int
) -> None:
    options = list(product([True, False], repeat=6))
    for residual, relu, pooled, training, update, affine in options:
        case = Case(
            sizes=(2, 1),
            channels=channels,
            height=3,
            width=3,
            dtype=dtype,
            residual=residual,
            relu=relu,
            pooled=pooled,
            training=training,
            update=update,
            affine=affine,
        )
        inputs = make(case)
        if residual is not update:
            # As after model.to(dtype).
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(inputs, name)
                setattr(inputs, name, None if value is None else value.to(dtype))
        if relu is pooled:
            inputs.x = at_an_odd_place(inputs.x)
            inputs.running_mean = at_an_odd_place(inputs.running_mean)
        if residual and relu:
            run(case, replace(inputs), parameters=training is update, constant_residual=True)
        run(case, inputs, parameters=training is update)
        with torch.no_grad():
            call(case, inputs, "triton")
    x = torch.zeros(3, channels, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    row = torch.zeros(2, channels, dtype=inputs.upstream[1].dtype)
    counts, sums = row[:, 0].contiguous(), torch.stack([row, row])
    for pooled in (None, row.new_zeros(3, channels)):
        backward_input(x, pooled, x, row, row, None, None, None, sums, counts, 2, 1e-5, True, False)
    assert len({launch.kernel for launch in launches}) == 6
    assert_promised(launches, aot_cases())


def test_a_launch_that_no_case_covers_is_seen(launches: list[Launch]) -> None:
    """One case must have it all: two that have half of it each do not."""
    x = torch.zeros(2, 16, 3, 3).to(memory_format=torch.channels_last)
    statistics(x, torch.zeros(2, 16), torch.ones(2, 16), 1, 0.1)
    assert_promised(launches, aot_cases())
    launches.clear()
    # The API refuses this, so no case has it: there are float32 partial results and there are
    # float64 buffers.
    statistics(x, torch.zeros(2, 16).double(), torch.ones(2, 16).double(), 1, 0.1)
    with pytest.raises(AssertionError, match="no case has these types.*combine_kernel"):
        assert_promised(launches, aot_cases())
    launches.clear()
    run(Case(channels=16, residual=False), make(Case(channels=16, residual=False)), True)
    assert_promised(launches, aot_cases())
    computed_again = [case for case in aot_cases() if case.constexprs.get("mask_ptr", 0) is None]
    assert computed_again
    with pytest.raises(AssertionError, match="no case does all of this.*bwd_sums_kernel"):
        assert_promised(
            launches,
            [
                case
                for case in aot_cases()
                if case not in computed_again or "bwd_sums" not in case.name
            ],
        )


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 1, 1, 2), (3, 70, 2, 2)], ids=str)
def test_sizes_of_one_compile(launches: list[Launch], shape: tuple[int, int, int, int]) -> None:
    n, channels, height, width = shape
    case = Case(sizes=(0, n), channels=channels, height=height, width=width)
    run(case, make(case), parameters=False)
    assert len(launches) == 6
