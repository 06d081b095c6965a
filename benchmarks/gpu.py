"""What a card is and does, in less than nine minutes: self-check, speeds, then every GPU test.

Kernels are compiled first, by as many processes as there are cores. Then every part is a process of
its own with a limit, the most valuable first: the self-check; the step's speed at batch 128, at
512, and beside torch.compile; the kernels' bandwidths; the tests, a module at a time. Writes
``benchmarks/results/gpu_<card>_<date>.json`` and the same as a Markdown table as soon as there is
anything; the kernels and the training step have records of their own, ``kernels_…`` and
``step-…``. The benchmarks of an operation that the self-check finds wrong are left out: a speed
counts only beside its correctness. ``--official FOLDER`` sets the official code's step beside ours;
``--part first`` ends before the kernels' bandwidths, and ``second`` leaves the step out.

Exit status: 0, 1 where something failed, 2 without a GPU, 3 where nothing failed but time ran out.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from arat_fast import doctor
from arat_fast.build import build_network
from arat_fast.device import count_gpus, resolve_precision
from arat_fast.recipes import recipe
from arat_fast.settings import Count
from arat_fast.stop import end_on_signals
from benchmarks import harness
from benchmarks.harness import ROOT, Bench, Record, command
from benchmarks.kernels import OPERATIONS
from benchmarks.table import grid, page

SECONDS = {"both": 525, "first": 360, "second": 300}
COMPILE_SECONDS, CHECK_SECONDS, KERNELS_SECONDS = 60, 45, 60
"""The most that each of these takes; the tests have the rest."""
BASELINES, FAST = ("naive", "tuned"), ("fast", "fast-folded")
STEPS: dict[str, tuple[float, tuple[str, ...], str]] = {
    "step-128": (75, BASELINES + FAST, "--batch-sizes 128 --steps 10"),
    "step-512": (60, BASELINES + FAST, "--batch-sizes 512 --steps 5 --no-correctness"),
    "step-compiled": (
        90,
        ("compiled", *FAST),
        "--batch-sizes 512 128 --steps 5 --no-correctness --profile",
    ),
}
"""Records of the training step: the most that each takes, who takes part, and options."""
WEIGHTS = {"test_split_batch_norm": 4, "test_nccl": 4, "test_step": 4, "test_large": 2}
"""Of test modules, in sharing out the time; 1 else."""
SOFT = 0.8
"""Share of a module's time after which no further test of it is begun."""
KINDS = ("passed", "failed", "skipped")
PART_OF = {"random_start": "pgd_step", "relu_backward": "frozen_affine"}
"""Functions that another operation's benchmarks measure."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    """Check and measure this machine's GPU."""

    device: str = "cuda"
    """cuda; CUDA_VISIBLE_DEVICES chooses another than the first."""
    official: Path | None = None
    """Checkout of the official AR-AT code, for its training step."""
    part: Literal["both", "first", "second"] = "both"
    """first: self-check and the step's speed; second: self-check, kernels and tests."""
    seconds: Count | None = None
    """For everything; default 525 for both, 360 for the first and 300 for the second."""
    compile: tuple[int, int] | None = None
    """Compile one part of the kernels, of so many, and nothing else."""


class TimeRanOut(RuntimeError):
    """A part was stopped."""


@contextmanager
def process(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m`` with these arguments; at the end it and all that it started are ended."""
    child = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, start_new_session=True)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run_module(arguments: list[str], seconds: float) -> None:
    """Run ``python -m`` with these arguments.

    Raises:
        TimeRanOut: it was stopped.
        RuntimeError: it ended with another status than 0.
    """
    with process(arguments) as child:
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeRanOut(f"stopped after {seconds:.0f} s") from error
    if status:
        raise RuntimeError(f"ended with status {status}")


def compile_part(number: int, of: int, device: torch.device) -> None:
    """Leave every ``of``-th kernel of the largest recipe that is measured in Triton's cache."""
    config = recipe("cifar10-resnet18")
    model = build_network(config, 10, config.image_shape)
    precision = resolve_precision("auto", device)
    operations = doctor.operations_of(model, config.image_shape, 10, 128, config.attack, precision)
    own = dict(list(operations.items())[number::of])
    doctor.check(own, precision, device, seconds=COMPILE_SECONDS)


def compile_ahead(workers: int) -> None:
    """Compile with as many processes, which are ended when time is up."""
    deadline = time.monotonic() + COMPILE_SECONDS
    arguments = ["benchmarks.gpu", "--compile"]
    with ExitStack() as stack:
        children = [
            stack.enter_context(process([*arguments, str(number), str(workers)]))
            for number in range(workers)
        ]
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))


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
        # Before it is stopped from outside: what has passed by then is kept.
        options += [f"--session-timeout={SOFT * seconds:.0f}"]
        # Kernels compile side by side; what fills the memory is alone.
        if "kernels" in path.parts and path.stem != "test_large":
            options += ["-n", str(workers)]
        begun = time.monotonic()
        try:
            run_module(["pytest", *options, str(path)], seconds)
        except RuntimeError as error:
            problem = error
        counts = outcomes(junit) if junit.exists() else {}
        passed = counts and not any(numbers["failed"] for numbers in counts.values())
        if problem and passed and time.monotonic() - begun >= SOFT * seconds:
            problem = TimeRanOut(f"ended after {SOFT * seconds:.0f} s, not all were run")
        return counts, problem


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
    if torch.device(options.device).index:
        raise ValueError(
            f"every part measures the first GPU, got {options.device}: CUDA_VISIBLE_DEVICES chooses"
        )
    with end_on_signals():
        return measure(options)


def measure(options: Options) -> int:
    """All parts; the exit status."""
    end = time.monotonic() + (options.seconds or SECONDS[options.part])
    # File systems date by a coarser clock.
    started = time.time() - 1
    workers = min(16, os.cpu_count() or 1)
    bench = Bench("gpu", options, table)
    settings, failed = bench.record["settings"], False
    settings |= {"part": options.part, "records": []}

    def attempt(what: str, arguments: list[str], seconds: float) -> None:
        nonlocal failed
        begun = time.monotonic()
        try:
            run_module(arguments, max(1.0, min(seconds, end - begun)))
        except RuntimeError as error:
            failed |= not isinstance(error, TimeRanOut)
            bench.problem(f"{what} {error}")
        took[what] = round(time.monotonic() - begun, 1)
        bench.save()

    def recorded(kind: str, arguments: list[str], seconds: float) -> None:
        out = bench.path.with_name(f"{kind}_{bench.path.name.removeprefix('gpu_')}")
        attempt(kind, [*arguments, "--out", str(out)], seconds)
        if out.exists():
            settings["records"].append(out.with_suffix(".md").name)

    took = settings["seconds"] = {}
    begun = time.monotonic()
    compile_ahead(workers)
    took["compile"] = round(time.monotonic() - begun, 1)
    attempt("self-check", ["arat_fast", "doctor"], CHECK_SECONDS)
    found = doctor.last_result()
    # Not one of another day.
    records = found[0]["operations"] if found and found[1].stat().st_mtime >= started else {}
    settings["self-check"] = records
    wrong = doctor.wrong_functions(records)
    settings["wrong"] = list(wrong.values())
    bench.save()
    if options.part != "second":
        for kind, (seconds, contestants, rest) in STEPS.items():
            given = ["benchmarks.step", *rest.split(), "--contestants", *contestants]
            if options.official and "naive" in contestants:
                given += ["official", "--official", str(options.official)]
            recorded(kind, given, seconds)
    if options.part == "first":
        return _status(bench, failed)
    suspect = {PART_OF.get(name, name) for name in wrong}
    checked = {PART_OF.get(name.partition("-")[0], name.partition("-")[0]) for name in records}
    right = [name for name in OPERATIONS if name in checked - suspect]
    if right:
        recorded("kernels", ["benchmarks.kernels", "--operations", *right], KERNELS_SECONDS)
    modules = sorted(
        (ROOT / "tests").glob("*/gpu/test_*.py"),
        key=lambda path: (WEIGHTS.get(path.stem, 1), path.stem),
    )
    for number, path in enumerate(modules):
        weights = [WEIGHTS.get(other.stem, 1) for other in modules[number:]]
        left = end - time.monotonic()
        # Twice its share: one that hangs costs the others little.
        share = max(1.0, min(left, 2 * left * weights[0] / sum(weights)))
        counts, problem = run_tests(path, share, workers)
        if problem is not None:
            failed |= not isinstance(problem, TimeRanOut)
            bench.problem(f"tests of {path.stem} {problem}")
        entries = [{"module": module, **numbers} for module, numbers in counts.items()]
        bench.record["results"] += entries or [{"module": path.stem}]
        bench.save()
    return _status(bench, failed)


def _status(bench: Bench[Options], failed: bool) -> int:
    """The exit status, once the table is printed."""
    problems = bench.finish()
    return 1 if failed else 3 if problems else 0


if __name__ == "__main__":
    sys.exit(command(Options, run, "gpu"))
