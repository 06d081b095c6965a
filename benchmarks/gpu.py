"""Every GPU test, every kernel benchmark and the training step on this machine's card, cut off
before nine minutes.

Writes ``benchmarks/results/gpu_<card>_<date>.json`` and the same as a Markdown table; the kernels
and the training step have records of their own, ``kernels_…`` and ``step_…``. The benchmarks of an
operation whose tests fail are left out: a speed counts only beside its correctness. Without a GPU
it says so and exits with status 2.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from benchmarks.harness import ROOT, Bench, Options, Record
from benchmarks.kernels import OPERATIONS
from benchmarks.table import grid, page

TOTAL_SECONDS = 525
KERNELS_SECONDS, STEP_SECONDS = 150, 165
"""Of these, what the kernels and the training step have at least."""
KINDS = ("passed", "failed", "skipped")


def run_module(arguments: list[str], seconds: float) -> str | None:
    """Run ``python -m`` with these arguments; what went wrong, or None."""
    command = [sys.executable, "-m", *arguments]
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return f"ended with status {status}" if status else None


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
        counts.setdefault(module, dict.fromkeys(KINDS, 0))[outcome] += 1
    return counts


def run_tests(deadline: float) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Outcomes by test module, and what went wrong.

    Every module is a run of its own, which may take twice its even share of the time left, so that
    one that hangs costs the others little.
    """
    modules = sorted((ROOT / "tests").glob("*/gpu/test_*.py"))
    tests: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    for index, path in enumerate(modules):
        left = max(1.0, deadline - time.monotonic())
        with tempfile.TemporaryDirectory() as folder:
            junit = Path(folder, "tests.xml")
            options = ["-p", "no:cacheprovider", "--timeout=0", "-m", "gpu", f"--junit-xml={junit}"]
            seconds = min(left, 2 * left / (len(modules) - index))
            problem = run_module(["pytest", *options, str(path)], seconds)
            if problem:
                problems.append(f"tests of {path.stem} {problem}")
            if junit.exists():
                tests |= outcomes(junit)
    return tests, problems


def table(record: Record) -> str:
    """The record for people to read."""
    tests = sorted(record["results"], key=lambda entry: str(entry["module"]))
    rows = [[entry["module"], *(str(entry[kind]) for kind in KINDS)] for entry in tests]
    records = [f"- [{name}]({name})" for name in record["settings"].get("records", [])]
    return page("Tests", record, grid(["tests", *KINDS], rows), records)


def main() -> int:
    """Run it all: 0 if every test passed and every benchmark ran, 1 if not, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("no CUDA device is visible to PyTorch: nothing was run", file=sys.stderr)
        return 2
    deadline = time.monotonic() + TOTAL_SECONDS
    bench = Bench("gpu", Options(device="cuda"), table)
    tests, problems = run_tests(deadline - STEP_SECONDS - KERNELS_SECONDS)
    bench.record["results"] = [{"module": module, **counts} for module, counts in tests.items()]
    right = []
    for name in OPERATIONS:
        counts = tests.get(f"test_{name}", dict.fromkeys(KINDS, 0))
        if counts["passed"] and not counts["failed"]:
            right.append(name)
        else:
            problems.append(f"benchmarks of {name}: its GPU tests did not all pass")
    written = bench.record["settings"]["records"] = []
    for kind, arguments, reserved in (
        ("kernels", ["--operations", *right], STEP_SECONDS),
        ("step", ["--quick"], 0),
    ):
        if kind == "kernels" and not right:
            continue
        out = bench.path.with_name(bench.path.name.replace("gpu", kind, 1))
        left = max(1.0, deadline - reserved - time.monotonic())
        problem = run_module([f"benchmarks.{kind}", *arguments, "--out", str(out)], left)
        if problem:
            problems.append(f"benchmarks.{kind} {problem}")
        if out.exists():
            written.append(out.with_suffix(".md").name)
    for problem in problems:
        bench.problem(problem)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
