"""Every GPU test, every kernel benchmark and the training step on this machine's card, cut off
before nine minutes.

Writes ``benchmarks/results/<card>_<date>.json`` and the same as a Markdown table; the training step
has a record of its own, ``step_<card>_<date>.json``. The benchmarks of an operation whose tests
fail are left out: a speed counts only beside its correctness. Without a GPU it says so and exits
with status 2.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, ROOT, unused
from benchmarks.table import grid

TOTAL_SECONDS = 525
STEP_SECONDS = 165
"""Of these, what the training step has at least."""


def pytest_run(arguments: list[str], seconds: float) -> int | None:
    """pytest's exit status, or None where it ran past ``seconds``."""
    options = ["-p", "no:cacheprovider", "--timeout=0", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return None


def bench_step(out: Path, seconds: float) -> str | None:
    """Run ``benchmarks.step --quick``; what went wrong, or None. A run that is cut off leaves
    the sizes that it has done in ``out``."""
    command = [sys.executable, "-m", "benchmarks.step", "--quick", "--out", str(out)]
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"benchmarks.step stopped after {seconds:.0f} s"
    return f"benchmarks.step ended with status {status}" if status else None


def outcomes(junit: Path) -> dict[str, dict[str, int]]:
    """Passed, failed and skipped tests by test module, as pytest's JUnit file has them."""
    counts: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        # A module that could not be imported is a case without a class name.
        module = (case.get("classname") or case.get("name") or "").split(".")[-1]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        if "skipped" in kinds:
            outcome = "skipped"
        entry = counts.setdefault(module, {"passed": 0, "failed": 0, "skipped": 0})
        entry[outcome] += 1
    return counts


def table(result: dict[str, Any]) -> str:
    """The result for people to read."""
    kinds = ("passed", "failed", "skipped")
    tests = [[module, *(str(n[k]) for k in kinds)] for module, n in sorted(result["tests"].items())]
    lines = [f"# {result['gpu']}, {result['date']}", "", *grid(["tests", *kinds], tests)]
    if result["benchmarks"]:
        info = result["benchmarks"][0]["extra_info"]
        copies = [e["extra_info"]["copy_bytes_per_second"] / 1e12 for e in result["benchmarks"]]
        lines += [
            "",
            f"Copy bandwidth of this run: {min(copies):.2f} to {max(copies):.2f} TB/s (read + "
            f"written, once per operation). Driver {info['driver']}, torch {info['torch']}, "
            f"triton {info['triton']}, "
            f"commit {info['commit'][:12]}{' with local changes' if info['dirty'] else ''}, "
            f"clocks as read {info['sm_clock']}, {info['memory_clock']}.",
            "",
        ]
    rows = []
    for entry in result["benchmarks"]:
        info = entry["extra_info"]
        over = ", ".join(f"{name} {value:.2f}×" for name, value in info["speed_up"].items())
        share = info["share_of_copy_bandwidth"]
        shown = "in the L2" if share is None else f"{share:.0%}"
        rows.append(
            [
                entry["name"],
                f"{info['seconds_per_call'] * 1e6:.1f}",
                f"{info['bytes_per_second'] / 1e12:.2f}",
                shown,
                over,
            ]
        )
    if rows:
        lines += grid(["benchmark", "µs per call", "TB/s", "share of copy", "speed-up over"], rows)
    notes = {e["extra_info"].get("cuDNN fused") for e in result["benchmarks"]} - {None}
    if notes:
        lines += ["", f"cuDNN's fused BatchNorm where it has no time: {'; '.join(sorted(notes))}."]
    if result["step"]:
        lines += ["", f"The training step: {result['step']}."]
    if result["left_out"]:
        lines += ["", "Left out: " + "; ".join(result["left_out"]) + "."]
    return "\n".join(lines) + "\n"


def run_all(
    deadline: float,
) -> tuple[dict[str, dict[str, int]], list[dict[str, Any]], list[str], bool]:
    """Test outcomes, benchmarks, what was left out, and whether a pytest run failed.

    Every test module and every benchmark module is a run of its own, which may take twice its even
    share of the time left, so that one that hangs costs the others little.
    """
    modules = sorted((ROOT / "tests").glob("*/gpu/test_*.py"))
    speeds = {path.stem: path for path in (ROOT / "benchmarks" / "kernels").glob("test_*.py")}
    runs_left = len(modules) + len(speeds)
    tests: dict[str, dict[str, int]] = {}
    benchmarks: list[dict[str, Any]] = []
    left_out: list[str] = []
    failed = False

    def run(what: str, arguments: list[str]) -> None:
        nonlocal runs_left, failed
        left = max(1.0, deadline - time.monotonic())
        seconds = min(left, 2 * left / max(1, runs_left))
        runs_left -= 1
        status = pytest_run(arguments, seconds)
        failed = failed or status != 0
        if status is None:
            left_out.append(f"{what} stopped after {seconds:.0f} s")

    for path in modules:
        with tempfile.TemporaryDirectory() as folder:
            junit, timings = Path(folder, "tests.xml"), Path(folder, "benchmarks.json")
            run(f"tests of {path.stem}", [str(path), "-m", "gpu", f"--junit-xml={junit}"])
            if junit.exists():
                tests.update(outcomes(junit))
            speed = speeds.pop(path.stem, None)
            if speed is None:
                continue
            if not tests.get(path.stem, {}).get("passed") or tests[path.stem]["failed"]:
                runs_left -= 1
                left_out.append(f"benchmarks of {path.stem}: its GPU tests did not all pass")
                continue
            arguments = [str(speed), f"--benchmark-json={timings}", "--benchmark-disable-gc"]
            run(f"benchmarks of {path.stem}", arguments)
            if timings.exists() and timings.stat().st_size:
                benchmarks += json.loads(timings.read_text())["benchmarks"]
    left_out += [f"benchmarks of {name}: it has no GPU tests" for name in sorted(speeds)]
    return tests, benchmarks, left_out, failed


def main() -> int:
    """Run it all: 0 if every test passed and every benchmark ran, 1 if not, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("no CUDA device is visible to PyTorch: nothing was run", file=sys.stderr)
        return 2
    started = time.monotonic()
    deadline = started + TOTAL_SECONDS
    tests, benchmarks, left_out, failed = run_all(deadline - STEP_SECONDS)
    # A benchmark that failed before its end has no rates.
    benchmarks = [entry for entry in benchmarks if "speed_up" in entry["extra_info"]]
    for entry in benchmarks:
        entry["stats"].pop("data", None)
    now = datetime.datetime.now(datetime.timezone.utc)
    gpu = torch.cuda.get_device_name()
    card = re.sub(r"\W+", "-", gpu).strip("-").lower()
    path = unused(RESULTS, f"{card}_{now:%Y%m%d-%H%M%S}")
    step = path.with_name(f"step_{path.name}")
    problem = bench_step(step, max(1.0, deadline - time.monotonic()))
    if problem:
        left_out.append(problem)
    result = {
        "gpu": gpu,
        "date": now.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started),
        "tests": tests,
        "benchmarks": benchmarks,
        "step": step.with_suffix(".md").name if step.exists() else None,
        "left_out": left_out,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(result))
    print(f"wrote {path} and {path.with_suffix('.md').name}")
    return int(bool(failed or left_out))


if __name__ == "__main__":
    sys.exit(main())
