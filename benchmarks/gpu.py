"""What a card is and does, in less than nine minutes: self-check, speeds, then every GPU test.

Kernels are compiled first, by as many processes as there are cores. Writes
``benchmarks/results/gpu_<card>_<date>.json`` and the same as a Markdown table as soon as there is
anything; the kernels and the training step have records of their own, ``kernels_…`` and
``step_…``. The benchmarks of an operation that the self-check finds wrong are left out: a speed
counts only beside its correctness. ``--official FOLDER`` sets the official code's step beside ours.

Exit status: 0, 1 where something failed, 2 without a GPU, 3 where nothing failed but time ran out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import torch

from arat_fast import doctor
from arat_fast.build import build_network
from arat_fast.device import count_gpus, resolve_precision
from arat_fast.recipes import recipe
from benchmarks import harness
from benchmarks.harness import ROOT, Bench, Record, command
from benchmarks.kernels import OPERATIONS
from benchmarks.table import grid, page

TOTAL_SECONDS = 525
COMPILE_SECONDS, CHECK_SECONDS, STEP_SECONDS, KERNELS_SECONDS = 75, 60, 150, 90
"""The most that each of these takes; the tests have the rest."""
WEIGHTS = {"test_split_batch_norm": 4, "test_nccl": 4, "test_step": 4, "test_large": 2}
"""Of test modules, in sharing out the time; 1 else."""
KINDS = ("passed", "failed", "skipped")
PART_OF = {"random_start": "pgd_step", "relu_backward": "frozen_affine"}
"""Functions that another operation's benchmarks measure."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    """Check and measure this machine's GPU."""

    device: str = "cuda"
    """cuda or cuda:N."""
    official: Path | None = None
    """Checkout of the official AR-AT code, for its training step."""
    compile: tuple[int, int] | None = None
    """Compile one part of the kernels, of so many, and nothing else."""


class TimeRanOut(RuntimeError):
    """A part was stopped."""


def run_module(arguments: list[str], seconds: float) -> None:
    """Run ``python -m`` with these arguments.

    Raises:
        TimeRanOut: it was stopped.
        RuntimeError: it ended with another status than 0.
    """
    line = [sys.executable, "-m", *arguments]
    try:
        status = subprocess.run(line, cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired as error:
        raise TimeRanOut(f"stopped after {seconds:.0f} s") from error
    if status:
        raise RuntimeError(f"ended with status {status}")


def compile_part(number: int, of: int, device: torch.device) -> None:
    """Leave every ``of``-th kernel of the largest recipe that is measured in Triton's cache."""
    config = recipe("cifar10-resnet18")
    model = build_network(config, 10, config.image_shape)
    operations = doctor.operations_of(model, config.image_shape, 10, 128, config.attack)
    own = dict(list(operations.items())[number::of])
    doctor.check(own, resolve_precision("auto", device), device, seconds=COMPILE_SECONDS)


def compile_ahead(workers: int) -> None:
    """Compile with as many processes, which are ended when time is up."""
    deadline = time.monotonic() + COMPILE_SECONDS
    arguments = [sys.executable, "-m", "benchmarks.gpu", "--compile"]
    processes = [
        subprocess.Popen([*arguments, str(number), str(workers)], cwd=ROOT)
        for number in range(workers)
    ]
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


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


def run_tests(
    path: Path, seconds: float, workers: int
) -> tuple[dict[str, dict[str, int]], RuntimeError | None]:
    """Outcomes of a test module, none where it left no result, and what went wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        junit, problem = Path(folder, "tests.xml"), None
        options = ["-p", "no:cacheprovider", "--timeout=0", "-m", "gpu", f"--junit-xml={junit}"]
        # Kernels compile side by side; what fills the memory is alone.
        if "kernels" in path.parts and path.stem != "test_large":
            options += ["-n", str(workers)]
        try:
            run_module(["pytest", *options, str(path)], seconds)
        except RuntimeError as error:
            problem = error
        return outcomes(junit) if junit.exists() else {}, problem


def table(record: Record) -> str:
    """The record for people to read."""
    tests = sorted(record["results"], key=lambda entry: str(entry["module"]))
    rows = [
        [entry["module"], *(str(entry.get(kind, "left out")) for kind in KINDS)] for entry in tests
    ]
    records = [f"- [{name}]({name})" for name in record["settings"].get("records", [])]
    wrong = [f"- wrong: {reason}" for reason in record["settings"].get("wrong", [])]
    return page("Tests", record, grid(["tests", *KINDS], rows), [*records, *wrong])


def run(options: Options) -> int:
    """Run it all; the exit status."""
    if options.compile is not None:
        compile_part(*options.compile, torch.device(options.device))
        return 0
    if not count_gpus():
        raise ValueError("no CUDA device is visible to PyTorch: nothing was run")
    begun = time.monotonic()
    workers = min(16, os.cpu_count() or 1)
    bench = Bench("gpu", options, table)
    settings, failed = bench.record["settings"], False
    settings["records"] = []

    def attempt(what: str, arguments: list[str], seconds: float) -> None:
        nonlocal failed
        seconds = max(1.0, min(seconds, begun + TOTAL_SECONDS - time.monotonic()))
        try:
            run_module(arguments, seconds)
        except RuntimeError as error:
            failed |= not isinstance(error, TimeRanOut)
            bench.problem(f"{what} {error}")
        bench.save()

    compile_ahead(workers)
    attempt("self-check", ["arat_fast", "doctor"], CHECK_SECONDS)
    found = doctor.last_result()
    records = {} if found is None else found[0]["operations"]
    settings["self-check"] = records
    wrong = doctor.wrong_functions(records)
    settings["wrong"] = list(wrong.values())
    suspect = {PART_OF.get(name, name) for name in wrong}
    checked = {PART_OF.get(name.partition("-")[0], name.partition("-")[0]) for name in records}
    right = [name for name in OPERATIONS if name in checked - suspect]
    official = ["--official", str(options.official)] if options.official else []
    for kind, arguments, seconds in (
        ("step", ["--quick", *official], STEP_SECONDS),
        ("kernels", ["--operations", *right], KERNELS_SECONDS),
    ):
        if kind == "kernels" and not right:
            continue
        out = bench.path.with_name(bench.path.name.replace("gpu", kind, 1))
        attempt(
            f"benchmarks.{kind}", [f"benchmarks.{kind}", *arguments, "--out", str(out)], seconds
        )
        if out.exists():
            settings["records"].append(out.with_suffix(".md").name)
    modules = sorted(
        (ROOT / "tests").glob("*/gpu/test_*.py"),
        key=lambda path: (WEIGHTS.get(path.stem, 1), path.stem),
    )
    for number, path in enumerate(modules):
        weights = [WEIGHTS.get(other.stem, 1) for other in modules[number:]]
        left = begun + TOTAL_SECONDS - time.monotonic()
        # Twice its share: one that hangs costs the others little.
        share = max(1.0, min(left, 2 * left * weights[0] / sum(weights)))
        counts, problem = run_tests(path, share, workers)
        if problem is not None:
            failed |= not isinstance(problem, TimeRanOut)
            bench.problem(f"tests of {path.stem} {problem}")
        entries = [{"module": module, **numbers} for module, numbers in counts.items()]
        bench.record["results"] += entries or [{"module": path.stem}]
        bench.save()
    status = bench.finish()
    return 1 if failed else 3 if status else 0


if __name__ == "__main__":
    sys.exit(command(Options, run, "gpu"))
