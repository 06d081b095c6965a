"""Every kernel in every configuration, compiled for GPUs that are not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from arat_kernels.implementation import interpreting

if interpreting():
    pytest.skip("the interpreter replaces the kernels", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from arat_kernels.aot import TARGETS, AotCase, Target, all_cases, compile_case  # noqa: E402

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
            widths = [width for _, width in report.accesses[name]]
            assert widths and set(widths) == {16}, f"{name}: {report.accesses[name]}"
    elif case.bulk:
        assert 16 in [width for _, width in report.accesses[""]]


def test_narrow_accesses_are_seen() -> None:
    """60 channels are no multiple of 16: what the check above looks for is not there."""
    name = "split_batch_norm_statistics_kernel[bf16, C 60]"
    case = next(case for case in CASES if case.name == name)
    report = compile_case(case, TARGETS["sm_90"])
    assert max(width for _, width in report.accesses["x_ptr"]) < 16
    assert {direction for direction, _ in report.accesses["partial_ptr"]} == {"store"}


def test_incomplete_case_is_refused() -> None:
    case = CASES[0]
    broken = replace(case, signature={**case.signature, "nonsense": "i32"})
    with pytest.raises(ValueError, match="not arguments of the kernel \\['nonsense'\\]"):
        compile_case(broken, TARGETS["sm_90"])


def test_committed_table_lists_the_kernels_there_are() -> None:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    listed = [row.split("`")[1] for row in rows]
    assert listed == [case.name for case in CASES], (
        "write it anew: python -m arat_kernels.aot docs/kernels.md"
    )
