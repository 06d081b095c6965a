"""``python -m benchmarks.step``: one training step of each contestant, in turns, in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from arat_fast.settings import Count
from benchmarks import harness
from benchmarks.contestants import NAMES, Contestant, choose
from benchmarks.correctness import Reference, compare_losses, reference_losses
from benchmarks.harness import Bench, Record, command
from benchmarks.launches import profile_run
from benchmarks.measure import free_memory, load_libraries
from benchmarks.official import check_official
from benchmarks.table import step_tables
from benchmarks.turns import NUM_BATCHES, best_baselines, take_turns, warm
from benchmarks.workload import Workload, forward_flops


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    """Time one training step of ARAT against what a user would otherwise run.

    The first of each of the sizes is where they start; the others are taken one at a time.
    """

    model: str = "resnet18"
    """resnet18, wrn34-10, or resnet8."""
    contestants: tuple[str, ...] = ()
    """naive, tuned, compiled, official, fast, fast-folded; on a GPU also compiled-graphs,
    compiled-autotune and fast-eager. Default all but compiled-autotune, and on the CPU compiled."""
    batch_sizes: tuple[int, ...] = ()
    """Default 128 256 512 1024 on a GPU, 64 on the CPU."""
    image_sizes: tuple[int, ...] = (32,)
    """Height and width in pixels; >= 8."""
    num_steps: tuple[int, ...] = (10,)
    """Steps of the attack; >= 0."""
    steps: Count | None = None
    """Training steps in a turn."""
    official: Path | None = None
    """Checkout of the official AR-AT code, which then takes part, unmodified. Its code runs."""
    profile: tuple[str, ...] = ("fast", "fast-folded")
    """Contestants whose launches and time by class are counted, if they take part; at the largest
    batch size."""
    correctness: bool = True
    """Compare our first losses with those of the float32 eager step."""
    quick: bool = False
    """Fewer sizes, steps and contestants: about two minutes on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.profile:
            if name not in NAMES:
                raise ValueError(f"unknown --profile {name!r}, expected some of {', '.join(NAMES)}")


def workloads(options: Options, batch_sizes: tuple[int, ...]) -> list[Workload]:
    """The workload from which one size at a time departs, and those that do.

    Raises:
        ValueError: a size that no network has.
    """
    axes: dict[str, tuple[Any, ...]] = {
        "batch_size": batch_sizes,
        "image_size": options.image_sizes,
        "num_steps": options.num_steps,
    }
    base = Workload(options.model, **{axis: values[0] for axis, values in axes.items()})
    departing = [replace(base, **{a: value}) for a, values in axes.items() for value in values[1:]]
    return list(dict.fromkeys([base, *departing]))


def run(options: Options) -> int:
    """Measure, print the table, and write JSON and Markdown.

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
    todo = workloads(options, options.batch_sizes or sizes)
    if options.official is not None:
        for workload in todo:
            check_official(options.official, workload)
    contestants = choose(options.contestants or names, bench.device, options.official)
    load_libraries(bench.device)
    steps = options.steps or ((10 if options.quick else 20) if on_gpu else 1)
    bench.record["settings"] = {
        **asdict(todo[0]),
        "contestants": {name: c.what for name, c in contestants.items()},
        "rounds": options.rounds,
        "steps": steps,
    }
    bench.record |= {"correctness": [], "profile": []}
    bench.measure_rates()
    bench.save()
    largest = max(todo, key=lambda workload: workload.batch_size)

    stages: list[Callable[[], None]] = []
    for workload in todo[:-1]:
        # torch.compile takes longest: a quick run has it once.
        chosen = {n: c for n, c in contestants.items() if not (options.quick and c.compiles)}
        stages.append(partial(_speeds, bench, chosen, workload, steps))
    last = partial(_speeds, bench, contestants, todo[-1], steps)
    # It is the last that is lost if time runs out.
    last_of_all = any(contestant.compiles for contestant in contestants.values())
    if not last_of_all:
        stages.append(last)
    if options.correctness:
        smallest = min(workload.batch_size for workload in todo)
        small = replace(todo[0], batch_size=min(128 if on_gpu else 16, smallest))
        stages.append(partial(_check_losses, bench, contestants, small))
    stages += [
        partial(_profile, bench, contestants[name], largest)
        for name in options.profile
        if name in contestants
    ]
    if last_of_all:
        stages.append(last)
    for stage in stages:
        stage()
        free_memory(bench.device)
        bench.save()
    return bench.finish()


def _speeds(
    bench: Bench[Options], contestants: dict[str, Contestant], workload: Workload, steps: int
) -> None:
    found = take_turns(bench, contestants, workload, steps)
    flops = forward_flops(workload) * workload.forward_equivalents
    for entry in found:
        entry["flops_per_image"] = flops
        relate(entry, found, bench.record["rates"])
    bench.record["results"] += found


def relate(entry: Record, found: list[Record], rates: Record) -> None:
    """Add what the speed is a share or a multiple of, among all ``found`` at its size."""
    if entry["status"] != "measured":
        return
    flops_per_second = entry["images_per_second"] * entry["flops_per_image"]
    peak = rates["peak_flops_per_second"]
    entry["mfu"] = None if peak is None else flops_per_second / peak
    entry["share_of_matmul"] = flops_per_second / rates["matmul_flops_per_second"]
    for result, field in (
        ("speed_up", "seconds_per_step"),
        ("speed_up_in_processor_time", "processor_seconds_per_step"),
    ):
        if field in entry:
            baselines = best_baselines(found, field)
            entry[result] = {name: value / entry[field] for name, value in baselines.items()}


def _check_losses(
    bench: Bench[Options], contestants: dict[str, Contestant], workload: Workload
) -> None:
    """Losses outside of their budget are a problem: a speed counts only beside its correctness."""
    references: dict[str, Reference] = {}
    num_steps = 20 if bench.device.type == "cuda" else 3
    for name, contestant in contestants.items():
        if not contestant.ours:
            continue
        bench.say(f"losses of {name} beside the float32 step's")
        with bench.guarded(f"losses of {name}"):
            bn = contestant.bn
            if bn not in references:
                references[bn] = reference_losses(bn, workload, bench.device, num_steps)
            entry = compare_losses(contestant, workload, bench.device, references[bn])
            bench.record["correctness"].append(entry)
            if not entry["within"]:
                difference, budget = entry["mean_relative_difference"], entry["budget"]
                bench.problem(
                    f"the losses of {name} differ by {difference} from the float32 step's, budget "
                    f"{budget}; None is not finite"
                )
        free_memory(bench.device)


def _profile(bench: Bench[Options], contestant: Contestant, workload: Workload) -> None:
    bench.say(f"profile of {contestant.name}")
    with bench.guarded(f"profile of {contestant.name}"), contestant.settings():
        batches = workload.batches(NUM_BATCHES, bench.device, seed=0)
        step = warm(contestant, workload, bench.device, batches)
        num_steps = 3 if bench.device.type == "cuda" else 1
        found = profile_run(partial(step, batches[:num_steps]), bench.device, num_steps)
        bench.record["profile"].append(
            {"contestant": contestant.name, "batch_size": workload.batch_size, **found}
        )


if __name__ == "__main__":
    sys.exit(command(Options, run, "step"))
