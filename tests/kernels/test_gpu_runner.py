"""benchmarks/gpu.py where there is no GPU, and how it reads results."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu as runner


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_exits_2() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=runner.ROOT)
    assert done.returncode == 2
    assert "CUDA" in done.stderr and not done.stdout


def test_outcomes_are_counted_by_module(tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="tests.kernels.gpu.test_a" name="x"/>'
        '<testcase classname="tests.kernels.gpu.test_a" name="y"><failure/></testcase>'
        '<testcase classname="tests.kernels.gpu.test_b" name="z"><skipped/></testcase>'
        '<testcase classname="" name="tests.kernels.gpu.test_c"><error/></testcase>'
        "</testsuite></testsuites>"
    )
    assert runner.outcomes(junit) == {
        "test_a": {"passed": 1, "failed": 1, "skipped": 0},
        "test_b": {"passed": 0, "failed": 0, "skipped": 1},
        "test_c": {"passed": 0, "failed": 1, "skipped": 0},
    }


def test_a_timeout_costs_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = tmp_path / "tests" / "kernels" / "gpu"
    tests.mkdir(parents=True)
    for name in ("broken", "good", "hangs"):
        (tests / f"test_{name}.py").touch()
    given: list[float] = []

    def run_module(arguments: list[str], seconds: float) -> str | None:
        given.append(seconds)
        name = Path(arguments[-1]).stem
        if name == "test_hangs":
            return "stopped"
        failure = "<failure/>" if name == "test_broken" else ""
        case = f'<testsuites><testcase classname="gpu.{name}">{failure}</testcase></testsuites>'
        Path(arguments[-2].partition("=")[2]).write_text(case)
        return "ended" if failure else None

    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "run_module", run_module)
    found, problems = runner.run_tests(time.monotonic() + 90)
    assert {name: counts["passed"] for name, counts in found.items()} == {
        "test_broken": 0,
        "test_good": 1,
    }
    assert problems == ["tests of test_broken ended", "tests of test_hangs stopped"]
    assert given[0] == pytest.approx(60, abs=1) and max(given) <= 91


def test_a_module_that_fails_or_hangs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "some.py").write_text(
        "import sys, time\ntime.sleep(float(sys.argv[1])) or sys.exit(3)"
    )
    assert "status 3" in str(runner.run_module(["some", "0"], 60))
    assert "stopped" in str(runner.run_module(["some", "60"], 0.5))
