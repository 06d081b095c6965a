"""``arat-fast bench step``: the contestants side by side, in one process, taking turns."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from arat_fast.bench.contestants import (
    NAMES,
    Batch,
    Contestant,
    Run,
    best_baselines,
    choose,
    fast_precision,
    our_step,
)
from arat_fast.bench.correctness import Reference, compare_losses, reference_losses
from arat_fast.bench.machine import describe_machine, new_record, rates, synchronize
from arat_fast.bench.measure import (
    PeakMemory,
    alternate,
    cudnn_settings,
    device_seconds,
    failure,
    free_memory,
    is_out_of_memory,
    load_libraries,
    spread,
)
from arat_fast.bench.official import check_official
from arat_fast.bench.plot import plot_step
from arat_fast.bench.profile import profile_run
from arat_fast.bench.roofline import roofline
from arat_fast.bench.table import step_tables
from arat_fast.bench.workload import Workload, forward_flops
from arat_fast.device import resolve_device
from arat_fast.display import Display
from arat_fast.files import write_atomic, write_json, write_text

WARM_UP = {"cuda": 3, "cpu": 1}
"""Steps before anything is timed: cuDNN's choice, compilation."""
WARM_UP_GRAPH = 5
"""The same with a CUDA graph of ours, which is captured in the fourth step."""
NUM_BATCHES = 4
"""Different batches, which take turns."""


@dataclass(frozen=True)
class StepOptions:
    """Time one training step of ARAT against what a user would otherwise run."""

    model: str = "resnet18"
    """resnet18, wrn34-10, or resnet8."""
    batch_sizes: tuple[int, ...] = ()
    """Default 128 256 512 1024 on a GPU, 64 on the CPU."""
    contestants: tuple[str, ...] = ()
    """naive, tuned, compiled, official, fast, fast-folded; on a GPU also compiled-graphs,
    compiled-autotune and fast-eager. Default all but compiled-autotune, on the CPU also without
    compiled."""
    rounds: int = 3
    """Turns of each contestant; >= 1."""
    steps: int | None = None
    """Training steps in a turn, >= 1; default 20 on a GPU, 1 on the CPU."""
    num_steps: int = 10
    """Steps of the attack; >= 0."""
    image_size: int = 32
    """Height and width in pixels; >= 8."""
    official: Path | None = None
    """Checkout of the official AR-AT code, which then takes part, unmodified. Its code runs."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay our steps as one CUDA graph: auto on a GPU."""
    profile: tuple[str, ...] = ("fast", "fast-folded")
    """Contestants whose launches and time by class are counted, if they take part; at the largest
    batch size."""
    roofline: bool = True
    """Measure layer by layer beside the predicted time."""
    correctness: bool = True
    """Compare our first losses with those of the float32 eager step."""
    out: Path | None = None
    """File for the record; default benchmarks/results/ in a checkout, else the current folder,
    named by device and date. The table and the plot lie beside it."""
    quick: bool = False
    """Fewer sizes, steps and contestants: about two minutes on a GPU."""


@dataclass(frozen=True)
class Plan:
    """What the options mean on a device."""

    device: torch.device
    workloads: tuple[Workload, ...]
    contestants: dict[str, Contestant]
    rounds: int
    steps: int
    graph: Literal["on", "off"]
    compile_last_only: bool
    """torch.compile takes part at the last size only, after everything else."""
    check_batch: int
    check_steps: int


def make_plan(options: StepOptions) -> Plan:
    """Fill in what depends on the device.

    Raises:
        ValueError: a contestant, size or device is unknown or cannot take part.
        FileNotFoundError: the official code is not where it is said to be.
    """
    for name, value in (("--rounds", options.rounds), ("--steps", options.steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    device = resolve_device(options.device)
    on_gpu = device.type == "cuda"
    for name in options.profile:
        if name not in NAMES:
            raise ValueError(f"unknown --profile {name!r}, expected some of {', '.join(NAMES)}")
    if options.graph == "on" and not on_gpu:
        raise ValueError(
            f"a CUDA graph needs a GPU, got --graph on with device {device}: use --graph auto"
        )
    sizes: tuple[int, ...] = (128, 256, 512, 1024) if on_gpu else (64,)
    names: tuple[str, ...] = ()
    steps = 20 if on_gpu else 1
    if options.quick and on_gpu:
        sizes, steps = (128, 512), 10
        names = ("naive", "tuned", "compiled", "fast", "fast-folded")
    elif options.quick:
        sizes, names = (16,), ("naive", "fast", "fast-folded")
    if names and options.official is not None:
        names = (*names, "official")
    workloads = tuple(
        Workload(options.model, size, options.image_size, options.num_steps)
        for size in options.batch_sizes or sizes
    )
    if options.official is not None:
        check_official(options.official, workloads[0])
    contestants = choose(options.contestants or names, device, options.official)
    if options.graph == "off":
        if "fast" in contestants:
            # The same step then.
            contestants.pop("fast-eager", None)
        contestants = {name: _eager(contestant) for name, contestant in contestants.items()}
    return Plan(
        device,
        workloads,
        contestants,
        options.rounds,
        options.steps or steps,
        "on" if on_gpu and options.graph != "off" else "off",
        compile_last_only=options.quick,
        check_batch=128 if on_gpu else 16,
        check_steps=20 if on_gpu else 3,
    )


def _eager(contestant: Contestant) -> Contestant:
    if not contestant.ours:
        return contestant
    return replace(contestant, build=our_step(contestant.bn, "off"))


def bench_step(options: StepOptions) -> int:
    """Measure, print the table, and write JSON, Markdown and a plot.

    Returns:
        0, or 1 if a contestant failed (out of memory is no failure) or left the budget of its
        losses.

    Raises:
        ValueError, FileNotFoundError: as :func:`make_plan`.
    """
    plan = make_plan(options)
    display = Display()
    now = datetime.datetime.now(datetime.timezone.utc)
    path = new_record("step", options.out, plan.device, now)
    record = start_record("step", plan.device, now, display)
    first = plan.workloads[0]
    flops = forward_flops(first)
    record["settings"] = {
        "model": first.model,
        "image_size": first.image_size,
        "num_steps": first.num_steps,
        "batch_sizes": [workload.batch_size for workload in plan.workloads],
        "contestants": {name: c.what for name, c in plan.contestants.items()},
        "rounds": plan.rounds,
        "steps": plan.steps,
        "graph": plan.graph,
    }
    record["flops"] = {
        "forward_per_image": flops,
        "forward_equivalents": first.forward_equivalents,
        "step_per_image": flops * first.forward_equivalents,
    }
    record |= {"results": [], "correctness": [], "profile": [], "roofline": None, "problems": []}

    def save() -> None:
        record["seconds"] = round(time.monotonic() - started, 1)
        write_json(path, record)
        write_text(path.with_suffix(".md"), step_tables(record))

    started = time.monotonic()
    *smaller, last = plan.workloads
    stages: list[Callable[[], None]] = [
        partial(measure_workload, plan, workload, record, display, not plan.compile_last_only)
        for workload in smaller
    ]
    everyone = partial(measure_workload, plan, last, record, display)
    if not plan.compile_last_only:
        stages.append(everyone)
    if options.correctness:
        stages.append(partial(_check_losses, plan, record, display))
    stages.append(partial(_profile, plan, options.profile, record, display))
    if options.roofline:
        stages.append(partial(_roofline, plan, record, display))
    if plan.compile_last_only:
        stages.append(everyone)
    for stage in stages:
        stage()
        save()
    return finish(record, path, step_tables(record), plot_step)


def start_record(
    kind: str, device: torch.device, now: datetime.datetime, display: Display
) -> dict[str, Any]:
    """The machine and the rates of this run."""
    display.say(f"{kind}: copy bandwidth and matrix product of this run")
    load_libraries(device)
    return {
        "kind": kind,
        "date": now.isoformat(timespec="seconds"),
        "seconds": 0.0,
        "machine": describe_machine(device),
        "rates": rates(device),
    }


def finish(
    record: dict[str, Any],
    path: Path,
    tables: str,
    plot: Callable[[dict[str, Any], BinaryIO], None],
) -> int:
    """Print the tables, write them and the plot beside the record, and give the exit status."""
    write_text(path.with_suffix(".md"), tables)
    print(tables)
    print(f"record: {path}")
    if any(entry["status"] == "measured" for entry in record["results"]):
        picture = path.with_suffix(".png")
        write_atomic(picture, lambda file: plot(record, file))
        print(f"plot:   {picture}")
    return int(bool(record["problems"]))


def measure_workload(
    plan: Plan,
    workload: Workload,
    record: dict[str, Any],
    display: Display,
    compiles: bool = True,
) -> None:
    """Time all contestants at one size and append to ``record["results"]``; those that
    torch.compile makes only where ``compiles``.

    Those that do not fit into memory beside the others run afterwards, in a group of their own.
    """
    batches = workload.batches(NUM_BATCHES, plan.device, seed=0)
    entries: dict[str, dict[str, Any]] = {}
    pending = dict(plan.contestants)
    if not compiles:
        pending = {name: c for name, c in pending.items() if not c.compiles}
    if any(contestant.compiles for contestant in pending.values()):
        torch.compiler.reset()
    group = 0
    while pending:
        runs, deferred = _prepare(plan, workload, pending, batches, entries, display)
        processor: dict[str, list[float]] = {name: [] for name in runs}
        times, failures = alternate(
            {
                name: _turn(plan, pending[name], run, batches, processor[name])
                for name, run in runs.items()
            },
            plan.rounds,
            lambda name, done, value: display.say(
                f"  batch {workload.batch_size}  {name:18} turn {done}/{plan.rounds}  "
                f"{workload.batch_size / value:,.1f} images/s"
            ),
        )
        for name, failed in failures.items():
            if failed["status"] == "out of memory" and len(runs) > 1:
                deferred.append(name)
            else:
                entries[name] |= failed
        for name, values in times.items():
            entries[name] |= {"status": "measured", "group": group, **_rates(values, workload)}
            if plan.device.type == "cpu":
                entries[name]["processor_seconds_per_step"] = statistics.median(processor[name])
        runs.clear()
        free_memory(plan.device)
        pending = {name: pending[name] for name in pending if name in deferred}
        group += 1
    found = [entries[name] for name in plan.contestants if name in entries]
    for entry in found:
        _relate(entry, found, record)
        if entry["status"] == "failed":
            record["problems"].append(
                f"{entry['contestant']} at batch {workload.batch_size}: {entry['reason']}"
            )
    record["results"] += found


def _prepare(
    plan: Plan,
    workload: Workload,
    pending: dict[str, Contestant],
    batches: list[Batch],
    entries: dict[str, dict[str, Any]],
    display: Display,
) -> tuple[dict[str, Run], list[str]]:
    """Those that are built and warm, and the names of those that must wait for memory."""
    runs: dict[str, Run] = {}
    deferred: list[str] = []
    for name, contestant in pending.items():
        display.say(f"  batch {workload.batch_size}  {name:18} warming up")
        entry: dict[str, Any] = {
            "contestant": name,
            "ours": contestant.ours,
            "attack_bn": contestant.bn,
            "batch_size": workload.batch_size,
        }
        entries[name] = entry
        memory = PeakMemory(plan.device)
        try:
            began = time.perf_counter()
            run = warm(contestant, workload, plan.device, batches)
            entry["warm_up_seconds"] = time.perf_counter() - began
            entry["peak_memory_bytes"] = memory.read()
        except Exception as error:
            if is_out_of_memory(error) and runs:
                deferred.append(name)
            else:
                entry |= failure(error)
                display.say(f"  batch {workload.batch_size}  {name:18} {entry['status']}")
        else:
            runs[name] = run
    return runs, deferred


def warm(
    contestant: Contestant, workload: Workload, device: torch.device, batches: list[Batch]
) -> Run:
    """A contestant that is built and ready to be timed."""
    with contestant.settings():
        run = contestant.build(workload, device)
        captures = contestant.ours and device.type == "cuda"
        number = WARM_UP_GRAPH if captures else WARM_UP[device.type]
        run([batches[i % len(batches)] for i in range(number)])
        synchronize(device)
    return run


def _turn(
    plan: Plan,
    contestant: Contestant,
    run: Run,
    batches: list[Batch],
    processor: list[float],
) -> Callable[[], float]:
    """One turn: seconds per step; those of processor time, of all threads, go to ``processor``."""
    chosen = [batches[i % len(batches)] for i in range(plan.steps)]

    def turn() -> float:
        with contestant.settings():
            if plan.device.type == "cuda":
                # Another contestant has just used the memory and the caches.
                free_memory(plan.device)
                run(batches[:1])
            began = time.process_time()
            seconds = device_seconds(partial(run, chosen), plan.device)
            processor.append((time.process_time() - began) / plan.steps)
            return seconds / plan.steps

    return turn


def _rates(values: list[float], workload: Workload) -> dict[str, Any]:
    median = statistics.median(values)
    return {
        "round_seconds_per_step": values,
        "seconds_per_step": median,
        "spread": spread(values),
        "images_per_second": workload.batch_size / median,
    }


def _relate(entry: dict[str, Any], found: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Add what the speed is a share or a multiple of, among all ``found`` at its size."""
    if entry["status"] != "measured":
        return
    flops_per_second = entry["images_per_second"] * record["flops"]["step_per_image"]
    peak = record["rates"]["peak_flops_per_second"]
    entry["mfu"] = None if peak is None else flops_per_second / peak
    entry["share_of_matmul"] = flops_per_second / record["rates"]["matmul_flops_per_second"]
    for result, field in (
        ("speed_up", "seconds_per_step"),
        ("speed_up_in_processor_time", "processor_seconds_per_step"),
    ):
        if field in entry:
            baselines = best_baselines(found, field)
            entry[result] = {name: value / entry[field] for name, value in baselines.items()}


@contextmanager
def guarded(record: dict[str, Any], what: str, display: Display) -> Iterator[None]:
    """Note an error inside the context as a problem: one measurement must not cost the others."""
    try:
        yield
    except Exception as error:
        problem = f"{what}: {failure(error)['reason']}"
        record["problems"].append(problem)
        display.say(f"  {problem}")


def _check_losses(plan: Plan, record: dict[str, Any], display: Display) -> None:
    smallest = min(workload.batch_size for workload in plan.workloads)
    workload = replace(plan.workloads[0], batch_size=min(plan.check_batch, smallest))
    references: dict[str, Reference] = {}
    for contestant in plan.contestants.values():
        if not contestant.ours:
            continue
        display.say(f"  losses of {contestant.name} beside the float32 step's")
        graph = "off" if contestant.name == "fast-eager" else plan.graph
        with guarded(record, f"losses of {contestant.name}", display):
            if contestant.bn not in references:
                references[contestant.bn] = reference_losses(
                    contestant.bn, workload, plan.device, plan.check_steps
                )
            entry = compare_losses(
                contestant, workload, plan.device, graph, references[contestant.bn]
            )
            record["correctness"].append(entry)
            if not entry["within"]:
                record["problems"].append(_over_budget(entry))
        free_memory(plan.device)


def _over_budget(entry: dict[str, Any]) -> str:
    difference, budget = entry["mean_relative_difference"], entry["budget"]
    if difference is None or budget is None:
        return f"the losses of {entry['contestant']} or of the float32 step are not finite"
    return (
        f"the losses of {entry['contestant']} differ by {difference:.1%} from the float32 step's, "
        f"budget {budget:.1%}"
    )


def _profile(plan: Plan, names: Iterable[str], record: dict[str, Any], display: Display) -> None:
    workload = max(plan.workloads, key=lambda workload: workload.batch_size)
    for name in names:
        if name not in plan.contestants:
            continue
        display.say(f"  profile of {name}")
        contestant = plan.contestants[name]
        batches = workload.batches(NUM_BATCHES, plan.device, seed=0)
        with guarded(record, f"profile of {name}", display), contestant.settings():
            run = warm(contestant, workload, plan.device, batches)
            num_steps = 3 if plan.device.type == "cuda" else 1
            found = profile_run(partial(run, batches[:num_steps]), plan.device, num_steps)
            entry = {"contestant": name, "batch_size": workload.batch_size, **found}
            record["profile"].append(entry)
            del run
        free_memory(plan.device)


def _roofline(plan: Plan, record: dict[str, Any], display: Display) -> None:
    workload = max(plan.workloads, key=lambda workload: workload.batch_size)
    display.say(f"  layer by layer at batch {workload.batch_size}")
    with (
        guarded(record, "layer by layer", display),
        cudnn_settings(benchmark=True, deterministic=False),
    ):
        record["roofline"] = roofline(
            workload, plan.device, record["rates"], fast_precision(plan.device)
        )
    free_memory(plan.device)
