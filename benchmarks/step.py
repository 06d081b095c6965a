"""``python -m benchmarks.step``: one training step of each contestant, in turns, in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.contestants import NAMES, fast_precision
from benchmarks.correctness import Reference, compare_losses, reference_losses
from benchmarks.harness import Bench, Record, command
from benchmarks.launches import profile_run
from benchmarks.measure import cudnn_settings, free_memory
from benchmarks.plot import plot_step
from benchmarks.roofline import roofline
from benchmarks.table import step_tables
from benchmarks.turns import NUM_BATCHES, StepOptions, Turns, best_baselines, warm
from benchmarks.workload import Workload, forward_flops


@dataclass(frozen=True, kw_only=True)
class Options(StepOptions):
    """Time one training step of ARAT against what a user would otherwise run.

    All contestants take part but for compiled-autotune, and on the CPU compiled.
    """

    batch_sizes: tuple[int, ...] = ()
    """Default 128 256 512 1024 on a GPU, 64 on the CPU."""
    num_steps: int = 10
    """Steps of the attack; >= 0."""
    image_size: int = 32
    """Height and width in pixels; >= 8."""
    profile: tuple[str, ...] = ("fast", "fast-folded")
    """Contestants whose launches and time by class are counted, if they take part; at the largest
    batch size."""
    roofline: bool = True
    """Measure layer by layer beside the predicted time."""
    correctness: bool = True
    """Compare our first losses with those of the float32 eager step."""
    quick: bool = False
    """Fewer sizes, steps and contestants: about two minutes on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.profile:
            if name not in NAMES:
                raise ValueError(f"unknown --profile {name!r}, expected some of {', '.join(NAMES)}")


def run(options: Options) -> int:
    """Measure, print the table, and write JSON, Markdown and a plot.

    Returns:
        0, or 1 if a contestant failed (out of memory is no failure) or left the budget of its
        losses.

    Raises:
        ValueError: a contestant, size or device is unknown or cannot take part.
        FileNotFoundError: the official code is not where it is said to be.
    """
    bench = Bench("step", options, step_tables)
    on_gpu = bench.device.type == "cuda"
    sizes: tuple[int, ...] = (128, 256, 512, 1024) if on_gpu else (64,)
    names: tuple[str, ...] = ()
    if options.quick:
        sizes = (128, 512) if on_gpu else (16,)
        names = ("naive", "tuned", "compiled") if on_gpu else ("naive",)
        names += ("fast", "fast-folded", *(["official"] if options.official else []))
    workloads = [
        Workload(options.model, size, options.image_size, options.num_steps)
        for size in options.batch_sizes or sizes
    ]
    first, last = workloads[0], workloads[-1]
    steps = options.steps or ((10 if options.quick else 20) if on_gpu else 1)
    turns = Turns.chosen(bench, options.contestants or names, steps, first)
    flops = forward_flops(first)
    bench.record["settings"] |= {
        "model": first.model,
        "image_size": first.image_size,
        "num_steps": first.num_steps,
        "batch_sizes": [workload.batch_size for workload in workloads],
    }
    bench.record["flops"] = {
        "forward_per_image": flops,
        "forward_equivalents": first.forward_equivalents,
        "step_per_image": flops * first.forward_equivalents,
    }
    bench.record |= {"correctness": [], "profile": [], "roofline": None}
    bench.measure_rates()
    largest = max(workloads, key=lambda workload: workload.batch_size)
    # torch.compile takes longest: in a quick run it is the last that is lost if time runs out.
    stages: list[Callable[[], None]] = [
        partial(_speeds, turns, workload, not options.quick) for workload in workloads[:-1]
    ]
    if options.correctness:
        stages.append(partial(_check_losses, turns, min(w.batch_size for w in workloads), first))
    stages += [
        partial(_profile, turns, name, largest)
        for name in options.profile
        if name in turns.contestants
    ]
    if options.roofline:
        stages.append(partial(_roofline, bench, largest))
    stages.insert(
        len(stages) if options.quick else len(workloads) - 1, partial(_speeds, turns, last)
    )
    for stage in stages:
        stage()
        free_memory(bench.device)
        bench.save()
    return bench.finish(plot_step)


def _speeds(turns: Turns, workload: Workload, compiles: bool = True) -> None:
    found = turns.measure(workload, compiles)
    for entry in found:
        relate(entry, found, turns.bench.record)
    turns.bench.record["results"] += found


def relate(entry: dict[str, Any], found: list[dict[str, Any]], record: Record) -> None:
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


def _check_losses(turns: Turns, smallest: int, workload: Workload) -> None:
    bench, on_gpu = turns.bench, turns.bench.device.type == "cuda"
    workload = replace(workload, batch_size=min(128 if on_gpu else 16, smallest))
    references: dict[str, Reference] = {}
    for contestant in turns.contestants.values():
        if not contestant.ours:
            continue
        bench.say(f"losses of {contestant.name} beside the float32 step's")
        with bench.guarded(f"losses of {contestant.name}"):
            if contestant.bn not in references:
                references[contestant.bn] = reference_losses(
                    contestant.bn, workload, bench.device, 20 if on_gpu else 3
                )
            entry = compare_losses(contestant, workload, bench.device, references[contestant.bn])
            bench.record["correctness"].append(entry)
            judge(entry, bench)
        free_memory(bench.device)


def judge(entry: dict[str, Any], bench: Bench[Any]) -> None:
    """Losses outside of their budget are a problem: a speed counts only beside its correctness."""
    difference, budget = entry["mean_relative_difference"], entry["budget"]
    if difference is None or budget is None:
        bench.problem(f"the losses of {entry['contestant']} or its float32 step are not finite")
    elif not entry["within"]:
        bench.problem(
            f"the losses of {entry['contestant']} differ by {difference:.1%} from the float32 "
            f"step's, budget {budget:.1%}"
        )


def _profile(turns: Turns, name: str, workload: Workload) -> None:
    bench, contestant = turns.bench, turns.contestants[name]
    bench.say(f"profile of {name}")
    with bench.guarded(f"profile of {name}"), contestant.settings():
        batches = workload.batches(NUM_BATCHES, bench.device, seed=0)
        step = warm(contestant, workload, bench.device, batches)
        num_steps = 3 if bench.device.type == "cuda" else 1
        found = profile_run(partial(step, batches[:num_steps]), bench.device, num_steps)
        bench.record["profile"].append(
            {"contestant": name, "batch_size": workload.batch_size, **found}
        )


def _roofline(bench: Bench[Any], workload: Workload) -> None:
    bench.say(f"layer by layer at batch {workload.batch_size}")
    with (
        bench.guarded("layer by layer"),
        cudnn_settings(benchmark=True, deterministic=False),
    ):
        bench.record["roofline"] = roofline(
            workload, bench.device, bench.record["rates"], fast_precision(bench.device)
        )


if __name__ == "__main__":
    sys.exit(command(Options, run, "step"))
