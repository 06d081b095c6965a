"""benchmarks/gpu.py where there is no GPU, and how it reads and writes results."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_exits_2() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr and not done.stdout


def test_outcomes_are_counted_by_module(runner: ModuleType, tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="tests.kernels.gpu.test_a" name="x"/>'
        '<testcase classname="tests.kernels.gpu.test_a" name="y"><failure/></testcase>'
        '<testcase classname="tests.kernels.gpu.test_b" name="z"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert runner.outcomes(junit) == {
        "test_a": {"passed": 1, "failed": 1, "skipped": 0},
        "test_b": {"passed": 0, "failed": 0, "skipped": 1},
    }


def test_table_holds_rates_and_what_was_left_out(runner: ModuleType) -> None:
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
    text = runner.table(
        {
            "gpu": "Card",
            "date": "2026-01-01",
            "tests": {"test_a": {"passed": 3, "failed": 1, "skipped": 0}},
            "benchmarks": [{"name": "test_b[shape]", "extra_info": info}],
            "left_out": ["benchmarks of test_a: its GPU tests did not all pass"],
        }
    )
    assert "| test_a | 3 | 1 | 0 |" in text
    assert "| test_b[shape] | 100.0 | 3.60 | 90% | PyTorch eager 2.00× |" in text
    assert "commit 0123456789ab with local changes" in text
    assert "Left out: benchmarks of test_a" in text
