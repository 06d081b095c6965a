"""What split BatchNorm launches, compiled instead of run, is what its AOT cases promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.split_batch_norm_cases import Case, call, make

from arat_kernels.implementation import interpreting

if interpreting():
    pytest.skip("the interpreter replaces the kernels", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a card is there, and its tests launch the kernels", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from arat_kernels.split_batch_norm import api  # noqa: E402
from arat_kernels.split_batch_norm.triton import aot_cases  # noqa: E402

Launch = tuple[str, tuple[tuple[str, str], ...], tuple[tuple[str, Any], ...], int]


class Hopper:
    """A driver without a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def described(
    name: str, signature: dict[str, str], constexprs: dict[str, Any], num_warps: int
) -> Launch:
    typed = tuple(sorted((k, v) for k, v in signature.items() if v != "constexpr"))
    return name, typed, tuple(sorted(constexprs.items())), num_warps


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch since the start of the test."""
    found: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert len(grid) <= 3 and all(0 < size < 2**31 for size in grid)
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        source = compiled.src
        constants = {self.arg_names[path[0]]: value for path, value in source.constants.items()}
        found.append(
            described(self.fn.__name__, source.signature, constants, compiled.metadata.num_warps)
        )
        return compiled

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(api, "choose", lambda impl, *tensors: impl)
    return found


@pytest.fixture(scope="module")
def promised() -> set[Launch]:
    return {
        described(case.kernel.fn.__name__, case.signature, case.constexprs, case.num_warps)
        for case in aot_cases()
    }


STATISTICS = ["split_batch_norm_statistics_kernel", "split_batch_norm_combine_kernel"]
SUMS = ["split_batch_norm_bwd_sums_kernel", "split_batch_norm_bwd_combine_kernel"]
FORWARD, INPUT = "split_batch_norm_fwd_kernel", "split_batch_norm_bwd_input_kernel"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(channels=64, dtype=torch.bfloat16), [*STATISTICS, FORWARD, *SUMS, INPUT]),
        (Case(channels=512, dtype=torch.float16), [*STATISTICS, FORWARD, *SUMS, INPUT]),
        (Case(channels=16, dtype=torch.float32), [*STATISTICS, FORWARD, *SUMS, INPUT]),
        (
            Case(sizes=(2, 0), channels=64, dtype=torch.bfloat16, pooled=False, update=False),
            [*STATISTICS, FORWARD, *SUMS, INPUT],
        ),
        (
            Case(channels=128, dtype=torch.bfloat16, pooled=False, residual=False),
            [*STATISTICS, FORWARD, *SUMS, INPUT],
        ),
        (
            Case(channels=64, dtype=torch.bfloat16, pooled=False, training=False),
            [FORWARD, INPUT],
        ),
        (
            Case(channels=64, dtype=torch.bfloat16, pooled=False, training=False, residual=False),
            [FORWARD, INPUT],
        ),
    ],
    ids=str,
)
def test_attack_launches_what_was_compiled_ahead_of_time(
    launches: list[Launch], promised: set[Launch], case: Case, expected: list[str]
) -> None:
    inputs = make(case)
    leaves = [leaf for leaf in (inputs.x, inputs.residual) if leaf is not None]
    for leaf in (*leaves, inputs.weight, inputs.bias):
        leaf.requires_grad_()
    y, pooled = call(case, inputs, "triton")
    outputs = [y] if pooled is None else [y, pooled]
    torch.autograd.grad(outputs, leaves, inputs.upstream[: len(outputs)])
    assert [launch[0] for launch in launches] == expected
    assert set(launches) <= promised


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 1, 1, 2), (3, 70, 2, 2)], ids=str)
def test_sizes_of_one_compile(launches: list[Launch], shape: tuple[int, int, int, int]) -> None:
    n, channels, height, width = shape
    case = Case(sizes=(0, n), channels=channels, height=height, width=width)
    inputs = make(case)
    inputs.x.requires_grad_()
    y, pooled = call(case, inputs, "triton")
    torch.autograd.grad([y, pooled], inputs.x, inputs.upstream)
    assert len(launches) == 6
