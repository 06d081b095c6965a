"""``python -m benchmarks.scaling``: what a step costs as work grows."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from arat_fast.settings import Count
from benchmarks.harness import Bench, Record, command
from benchmarks.plot import plot_scaling
from benchmarks.table import scaling_tables
from benchmarks.turns import StepOptions, Turns
from benchmarks.workload import Workload

AXES = {
    "batch_size": "batch size",
    "image_size": "image size, pixels",
    "num_steps": "attack steps",
    "width": "model width, published = 1",
}
LONGEST_SECONDS = 2.0
"""Of a turn; it has fewer steps, but at least one, where they would take longer."""


@dataclass(frozen=True, kw_only=True)
class Options(StepOptions):
    """Images/s and peak memory against batch size, image size, attack steps and model width."""

    contestants: tuple[str, ...] = ("naive", "fast", "fast-folded")
    """As benchmarks.step has them."""
    batch_sizes: tuple[int, ...] = ()
    """Default 32 to 2048 on a GPU, 4 to 32 on the CPU."""
    image_sizes: tuple[int, ...] = ()
    """Pixels; default 32 to 224 on a GPU, to 96 on the CPU."""
    num_steps: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Steps of the attack."""
    widths: tuple[float, ...] = ()
    """Multiples of the published channels; default 0.25 to 2 on a GPU, to 1 on the CPU."""
    base_batch_size: Count | None = None
    """Where another axis varies; default 128 on a GPU, 8 on the CPU."""
    quick: bool = False
    """Two values of each axis only."""


def workloads(options: Options, on_gpu: bool) -> tuple[Workload, list[tuple[str, float, Workload]]]:
    """The workload from which one axis at a time departs; axis, value and workload of each.

    Raises:
        ValueError: a size that no network has.
    """
    base = Workload(options.model, options.base_batch_size or (128 if on_gpu else 8))
    axes: dict[str, tuple[float, ...]] = {
        "batch_size": options.batch_sizes
        or ((32, 64, 128, 256, 512, 1024, 2048) if on_gpu else (4, 8, 16, 32)),
        "image_size": options.image_sizes
        or ((32, 64, 96, 128, 160, 224) if on_gpu else (32, 48, 64, 96)),
        "num_steps": options.num_steps,
        "width": options.widths or ((0.25, 0.5, 1.0, 2.0) if on_gpu else (0.25, 0.5, 1.0)),
    }
    found = []
    for axis, values in axes.items():
        if options.quick:
            values = values[:: max(1, len(values) // 2)][:2]
        for value in values:
            change: dict[str, Any] = {axis: value}
            found.append((axis, value, replace(base, **change)))
    return base, found


def run(options: Options) -> int:
    """Measure, print the tables, and write JSON, Markdown and a plot.

    Returns:
        0, or 1 if a contestant failed; out of memory is no failure.

    Raises:
        ValueError: a contestant, a size or the device is unknown or cannot take part.
        FileNotFoundError: the official code is not where it is said to be.
    """
    bench = Bench("scaling", options, scaling_tables)
    on_gpu = bench.device.type == "cuda"
    base, todo = workloads(options, on_gpu)
    steps = options.steps or (10 if on_gpu else 1)
    turns = Turns.chosen(bench, options.contestants, steps, base, LONGEST_SECONDS)
    bench.record["settings"] |= {"base": asdict(base), "axes": AXES}
    bench.measure_rates()
    done: dict[Workload, list[Record]] = {}
    for axis, value, workload in todo:
        bench.say(f"{axis}={value:g}")
        if workload not in done:
            done[workload] = turns.measure(workload)
        bench.record["results"] += [
            {"axis": axis, "value": value, "workload": asdict(workload), **entry}
            for entry in done[workload]
        ]
        bench.save()
    return bench.finish(plot_scaling)


if __name__ == "__main__":
    sys.exit(command(Options, run, "scaling"))
