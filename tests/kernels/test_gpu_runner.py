"""benchmarks/gpu.py where there is no GPU, and how it reads and writes results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu as runner


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_exits_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=runner.ROOT,
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr and not done.stdout


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
    tests, speeds = tmp_path / "tests" / "kernels" / "gpu", tmp_path / "benchmarks" / "kernels"
    for folder in (tests, speeds):
        folder.mkdir(parents=True)
        for name in ("test_broken", "test_good", "test_hangs", "test_slow"):
            (folder / f"{name}.py").touch()
    (tests / "test_only.py").touch()
    given: list[float] = []

    def pytest_run(arguments: list[str], seconds: float) -> int | None:
        given.append(seconds)
        path, target = Path(arguments[0]), Path(arguments[-1].partition("=")[2])
        if path.parent == speeds:
            slow = path.stem == "test_slow"
            found = json.dumps({"benchmarks": [{"name": path.stem}]})
            Path(arguments[1].partition("=")[2]).write_text("" if slow else found)
            return None if slow else 0
        if path.stem == "test_hangs":
            return None
        outcome = "<failure/>" if path.stem == "test_broken" else ""
        target.write_text(
            f'<testsuites><testcase classname="gpu.{path.stem}">{outcome}</testcase></testsuites>'
        )
        return int(bool(outcome))

    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "pytest_run", pytest_run)
    outcomes, benchmarks, left_out, failed = runner.run_all(time.monotonic() + 90)
    assert sorted(outcomes) == ["test_broken", "test_good", "test_only", "test_slow"]
    assert [entry["name"] for entry in benchmarks] == ["test_good"]
    assert failed
    assert [text.split(" stopped")[0] for text in left_out] == [
        "benchmarks of test_broken: its GPU tests did not all pass",
        "tests of test_hangs",
        "benchmarks of test_hangs: its GPU tests did not all pass",
        "benchmarks of test_slow",
    ]
    assert given[0] == pytest.approx(20, abs=1) and max(given) <= 91


def test_table_holds_rates_and_what_was_left_out() -> None:
    info = {
        "copy_bytes_per_second": 4e12,
        "driver": "580.1",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "commit": "0123456789abcdef",
        "dirty": True,
        "sm_clock": "1980 MHz",
        "memory_clock": "3201 MHz",
        "seconds_per_call": 1e-4,
        "bytes_per_second": 3.6e12,
        "share_of_copy_bandwidth": 0.9,
        "speed_up": {"PyTorch eager": 2.0},
    }
    cached = {"share_of_copy_bandwidth": None, "cuDNN fused": "not run: forward only"}
    text = runner.table(
        {
            "gpu": "Card",
            "date": "2026-01-01",
            "tests": {"test_a": {"passed": 3, "failed": 1, "skipped": 0}},
            "benchmarks": [
                {"name": "test_b[shape]", "extra_info": info},
                {"name": "test_c", "extra_info": {**info, **cached}},
            ],
            "step": "step_card_20260101-000000.md",
            "left_out": ["benchmarks of test_a: its GPU tests did not all pass"],
        }
    )
    assert "| test_a | 3 | 1 | 0 |" in text
    assert "| test_b[shape] | 100.0 | 3.60 | 90% | PyTorch eager 2.00× |" in text
    assert "| test_c | 100.0 | 3.60 | in the L2 | PyTorch eager 2.00× |" in text
    assert "where it has no time: not run: forward only." in text
    assert "commit 0123456789ab with local changes" in text
    assert "The training step: step_card_20260101-000000.md." in text
    assert "Left out: benchmarks of test_a" in text


def test_a_training_step_that_fails_or_hangs_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    out = tmp_path / "step.json"
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "step.py").write_text(
        "import pathlib, sys, time\n"
        "assert sys.argv[1:3] == ['--quick', '--out']\n"
        "path = pathlib.Path(sys.argv[3])\n"
        "path.write_text('{}') if not path.exists() else time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert runner.bench_step(out, 60) is None and out.exists()
    assert runner.bench_step(out, 0.5) == "benchmarks.step stopped after 0 s"
    (package / "step.py").write_text("raise SystemExit(3)")
    assert runner.bench_step(out, 60) == "benchmarks.step ended with status 3"
