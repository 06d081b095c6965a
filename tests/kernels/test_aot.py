"""Every kernel in every configuration, compiled for GPUs that are not here."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from arat_kernels.implementation import interpreting

if interpreting():
    pytest.skip("the interpreter replaces the kernels", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from kernels.addresses import wide_addresses  # noqa: E402

from arat_kernels.aot import (  # noqa: E402
    TARGETS,
    AotCase,
    Target,
    all_cases,
    compile_case,
    kernels_table,
)
from arat_kernels.offsets import start_of  # noqa: E402

CASES = [case for cases in all_cases().values() for case in cases]
TABLE = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_case_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_well(case: AotCase, target: Target) -> None:
    report = compile_case(case, target)
    assert report.spills == 0
    assert report.shared <= target.shared_per_block
    assert report.occupancy > 0
    if target.gpu.backend == "cuda":
        for name in case.bulk:
            widths = [width for _, width in report.accesses.get(name, [])]
            assert widths and set(widths) == {16}, f"{name}: {report.accesses[name]}"
    else:
        # AMDGCN does not tell the pointers apart. The same tile on as many threads as sm_90's takes
        # as many accesses of 16 bytes, and fewer are seen where one is narrower, unless tensors
        # that are not bulk have as many more than on sm_90.
        hopper = compile_case(case, TARGETS["sm_90"])
        bulk = Counter(access for name in case.bulk for access in hopper.accesses[name])
        for access, number in bulk.items():
            assert report.accesses[""].count(access) >= number, f"{access}, as on sm_90: {number}"


def test_narrow_accesses_are_seen() -> None:
    """60 channels are no multiple of 16: what the check above looks for is not there."""
    name = "split_batch_norm_statistics_kernel[bf16, C 60]"
    case = next(case for case in CASES if case.name == name)
    report = compile_case(case, TARGETS["sm_90"])
    assert max(width for _, width in report.accesses["x_ptr"]) < 16
    assert {direction for direction, _ in report.accesses["partial_ptr"]} == {"store"}


def test_every_tensor_of_a_tuple_is_followed() -> None:
    for case in CASES:
        if case.kernel.fn.__name__ == "cosine_invariance_bwd_kernel" and "11 layers" in case.name:
            accesses = compile_case(case, TARGETS["sm_90"]).accesses
            assert {d for d, _ in accesses["predictions"]} == {"load"}
            assert {d for d, _ in accesses["targets"]} == {"load"}
            assert {d for d, _ in accesses["dpredictions"]} == {"store"}
            break
    else:
        pytest.fail("no case of 11 layers")


@pytest.mark.parametrize("case", [case for case in CASES if case.bulk], ids=lambda case: case.name)
def test_large_tensors_are_addressed_by_64_bit_products(case: AotCase) -> None:
    report = compile_case(case, TARGETS["sm_90"])
    for name, wide in wide_addresses(report.ttir).items():
        assert name not in case.bulk or wide, f"{name} is accessed by a 32-bit offset"
    one_layer = case.constexprs.get("LAYERS", 1) == 1
    assert not one_layer or set(case.bulk) <= wide_addresses(report.ttir).keys()


@triton.jit
def _narrow_kernel(x_ptr, y_ptr, z_ptr, size: tl.int32):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 16)
    x = tl.load(x_ptr + tl.program_id(0) * size + at)
    y = tl.load(y_ptr + (tl.program_id(0) * size).to(tl.int64) + at)
    tl.store(z_ptr + start_of(tl.program_id(0), size) + at, x + y)


def test_narrow_offsets_are_seen() -> None:
    signature = {**dict.fromkeys(("x_ptr", "y_ptr", "z_ptr"), "*fp32"), "size": "i32"}
    case = AotCase("narrow", _narrow_kernel, signature, {}, 4, 3, "", "")
    ttir = compile_case(case, TARGETS["sm_90"]).ttir
    assert wide_addresses(ttir) == {"x_ptr": False, "y_ptr": False, "z_ptr": True}


def test_incomplete_case_is_refused() -> None:
    case = CASES[0]
    broken = replace(case, signature={**case.signature, "nonsense": "i32"})
    with pytest.raises(ValueError, match="not arguments of the kernel \\['nonsense'\\]"):
        compile_case(broken, TARGETS["sm_90"])


def test_committed_table_is_that_of_the_kernels() -> None:
    """All of it but what the compiler measures and the version of Triton."""
    blank = kernels_table(lambda case: [""] * len(TARGETS))
    assert without_measurements(TABLE.read_text()) == without_measurements(blank), (
        "write it anew: python -m arat_kernels.aot docs/kernels.md"
    )


def without_measurements(table: str) -> list[str]:
    lines = re.sub(r"with Triton \S+;", "with Triton;", table).splitlines()
    cells = len(TARGETS) + 1
    return [
        " |".join(line.split(" |")[:-cells]) if line.startswith("| `") else line for line in lines
    ]
