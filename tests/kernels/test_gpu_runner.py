"""benchmarks/gpu.py where there is no GPU, and how it reads results."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from arat_fast import doctor
from benchmarks import gpu as runner


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_exits_2() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=runner.ROOT)
    assert done.returncode == 2
    assert "CUDA" in done.stderr and not done.stdout


def test_another_gpu_than_the_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts, processes of their own, would measure the first one under its name."""
    monkeypatch.setattr(runner, "count_gpus", lambda: 2)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        runner.run(runner.Options(device="cuda:1"))


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


def junit_of(arguments: list[str]) -> Path:
    (option,) = (a for a in arguments if a.startswith("--junit-xml="))
    return Path(option.partition("=")[2])


def test_tests_that_passed_before_time_ran_out_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_module(arguments: list[str], seconds: float) -> None:
        case = '<testcase classname="gpu.test_a">'
        failure = "<failure/>" if seconds > 1 else ""
        junit_of(arguments).write_text(f"<t>{case}</testcase>{case}{failure}</testcase></t>")
        raise RuntimeError("ended with status 1")

    monkeypatch.setattr(runner, "run_module", run_module)
    for seconds, counts, kind in ((0.0, (2, 0), runner.TimeRanOut), (60.0, (1, 1), RuntimeError)):
        found, problem = runner.run_tests(tmp_path / "test_a.py", seconds, 1)
        assert (found["test_a"]["passed"], found["test_a"]["failed"]) == counts
        assert type(problem) is kind


@pytest.mark.parametrize(("part", "failing"), [("both", True), ("both", False), ("first", False)])
def test_a_module_without_a_result_is_left_out_and_what_is_there_is_written(
    part: Any, failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tests = tmp_path / "tests" / "kernels" / "gpu"
    tests.mkdir(parents=True)
    for name in ("broken", "good", "nccl"):
        (tests / f"test_{name}.py").touch()
    given: dict[str, float] = {}

    def run_module(arguments: list[str], seconds: float) -> None:
        given[Path(arguments[-1]).stem] = seconds
        if arguments[0] != "pytest":
            return
        if arguments[-1].endswith("nccl.py"):
            # What was measured before is on the disk already.
            assert "test_good" in out.read_text()
            raise runner.TimeRanOut("stopped")
        fails = failing and arguments[-1].endswith("broken.py")
        case = f'<testcase classname="gpu.{Path(arguments[-1]).stem}">'
        case += f"{'<failure/>' if fails else ''}</testcase>"
        junit_of(arguments).write_text(f"<testsuites>{case}</testsuites>")
        if fails:
            raise RuntimeError("ended")

    out = tmp_path / "gpu_card.json"
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "run_module", run_module)
    monkeypatch.setattr(runner, "compile_ahead", lambda workers: None)
    monkeypatch.setattr(runner, "count_gpus", lambda: 1)
    wrong = {"error": "rms", "share": None}
    records = {"pgd_step-a": {"error": "", "share": 0.5}, "relu_backward-a": wrong}
    monkeypatch.setattr(doctor, "last_result", lambda: ({"operations": records}, out))
    status = runner.run(runner.Options(device="cpu", out=out, part=part))
    steps = {"doctor", "step-128_card", "step-512_card", "step-compiled_card"}
    if part == "first":
        assert status == 0 and given.keys() == steps
        return
    assert status == (1 if failing else 3)
    assert given.keys() > {*steps, "kernels_card"}
    # As the heaviest it has what is left, the others twice their share.
    assert given["test_nccl"] > 2 * given["test_broken"] > 0
    table = out.with_suffix(".md").read_text()
    assert re.search(r"test_nccl *\| *left out", table) and "wrong: relu_backward-a: rms" in table


def test_a_module_that_fails_or_hangs_is_told_apart_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "some.py").write_text(
        "import subprocess, sys, time\n"
        "if sys.argv[1] == '0': sys.exit(3)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "open('pid', 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    with pytest.raises(RuntimeError, match="status 3"):
        runner.run_module(["some", "0"], 60)
    with pytest.raises(runner.TimeRanOut):
        runner.run_module(["some", "60"], 3.0)
    state, deadline = Path("/proc", (tmp_path / "pid").read_text(), "stat"), time.monotonic() + 20
    # Nobody may have collected it yet.
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
