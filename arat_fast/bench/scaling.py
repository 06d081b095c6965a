"""``arat-fast bench scaling``: what a step costs as work grows."""

from __future__ import annotations

import datetime
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from arat_fast.bench.contestants import Contestant, choose
from arat_fast.bench.machine import new_record
from arat_fast.bench.measure import PeakMemory, device_seconds, failure, free_memory
from arat_fast.bench.official import check_official
from arat_fast.bench.plot import plot_scaling
from arat_fast.bench.step import NUM_BATCHES, finish, start_record, warm
from arat_fast.bench.table import scaling_tables
from arat_fast.bench.workload import Workload
from arat_fast.device import resolve_device
from arat_fast.display import Display
from arat_fast.files import write_json

AXES = {
    "batch_size": "batch size",
    "image_size": "image size, pixels",
    "num_steps": "attack steps",
    "width": "model width, published = 1",
}
REPEATS = 3
LONGEST_SECONDS = 2.0
"""A measurement takes fewer steps, but at least one, where they would take longer."""


@dataclass(frozen=True)
class ScalingOptions:
    """Images/s and peak memory against batch size, image size, attack steps and model width."""

    model: str = "resnet18"
    """resnet18, wrn34-10, or resnet8."""
    contestants: tuple[str, ...] = ("naive", "fast", "fast-folded")
    """As in bench step."""
    batch_sizes: tuple[int, ...] = ()
    """Default 32 to 2048 on a GPU, 4 to 32 on the CPU."""
    image_sizes: tuple[int, ...] = ()
    """Pixels; default 32 to 224 on a GPU, to 96 on the CPU."""
    num_steps: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Steps of the attack."""
    widths: tuple[float, ...] = ()
    """Multiples of the published channels; default 0.25 to 2 on a GPU, to 1 on the CPU."""
    base_batch_size: int | None = None
    """Where another axis varies; default 128 on a GPU, 8 on the CPU."""
    steps: int | None = None
    """Training steps in each of three measurements, >= 1, fewer where they would take more than two
    seconds; default 10 on a GPU, 1 on the CPU."""
    official: Path | None = None
    """Checkout of the official AR-AT code, for the contestant official. Its code runs."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """File for the record; default benchmarks/results/ in a checkout, else the current folder,
    named by device and date. The table and the plot lie beside it."""
    quick: bool = False
    """Two values of each axis only."""


def scaling_axes(
    options: ScalingOptions, device: torch.device
) -> tuple[Workload, dict[str, tuple[float, ...]]]:
    """The workload from which one axis at a time departs, and the values of each."""
    on_gpu = device.type == "cuda"
    base = Workload(options.model, options.base_batch_size or (128 if on_gpu else 8))
    axes: dict[str, tuple[float, ...]] = {
        "batch_size": options.batch_sizes
        or ((32, 64, 128, 256, 512, 1024, 2048) if on_gpu else (4, 8, 16, 32)),
        "image_size": options.image_sizes
        or ((32, 64, 96, 128, 160, 224) if on_gpu else (32, 48, 64, 96)),
        "num_steps": options.num_steps,
        "width": options.widths or ((0.25, 0.5, 1.0, 2.0) if on_gpu else (0.25, 0.5, 1.0)),
    }
    if options.quick:
        axes = {
            axis: (values[0], values[len(values) // 2])[: len(values)]
            for axis, values in axes.items()
        }
    for axis, values in axes.items():
        for value in values:
            _at(base, axis, value)
    return base, axes


def bench_scaling(options: ScalingOptions) -> int:
    """Measure, print the tables, and write JSON, Markdown and a plot.

    Returns:
        0, or 1 if a contestant failed; out of memory is no failure.

    Raises:
        ValueError: a contestant, a size or the device is unknown or cannot take part.
        FileNotFoundError: the official code is not where it is said to be.
    """
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps must be >= 1, got {options.steps}")
    device = resolve_device(options.device)
    base, axes = scaling_axes(options, device)
    if options.official is not None:
        check_official(options.official, base)
    contestants = choose(options.contestants, device, options.official)
    steps = options.steps or (10 if device.type == "cuda" else 1)
    display = Display()
    now = datetime.datetime.now(datetime.timezone.utc)
    path = new_record("scaling", options.out, device, now)
    started = time.monotonic()
    record = start_record("scaling", device, now, display)
    record["settings"] = {
        "base": base.as_dict(),
        "axes": {axis: AXES[axis] for axis in axes},
        "contestants": {name: c.what for name, c in contestants.items()},
        "repeats": REPEATS,
        "steps": steps,
    }
    record |= {"results": [], "problems": []}
    done: dict[tuple[str, Workload], dict[str, Any]] = {}
    for axis, values in axes.items():
        for value in values:
            workload = _at(base, axis, value)
            for name, contestant in contestants.items():
                if (name, workload) not in done:
                    done[name, workload] = measure_alone(contestant, workload, device, steps)
                entry = {
                    "axis": axis,
                    "value": value,
                    "contestant": name,
                    "workload": workload.as_dict(),
                    **done[name, workload],
                }
                record["results"].append(entry)
                display.say(f"  {axis}={value:g}  {name:18} {_told(entry)}")
                if entry["status"] == "failed":
                    record["problems"].append(f"{name} at {axis}={value:g}: {entry['reason']}")
            record["seconds"] = round(time.monotonic() - started, 1)
            write_json(path, record)
    return finish(record, path, scaling_tables(record), plot_scaling)


def measure_alone(
    contestant: Contestant, workload: Workload, device: torch.device, steps: int
) -> dict[str, Any]:
    """Images/s and peak memory of one contestant at one size."""
    if contestant.compiles:
        torch.compiler.reset()
    free_memory(device)
    try:
        batches = workload.batches(NUM_BATCHES, device, seed=0)
        memory = PeakMemory(device)
        run = warm(contestant, workload, device, batches)
        peak = memory.read()
        with contestant.settings():
            first = device_seconds(partial(run, batches[:1]), device)
            steps = max(1, min(steps, round(LONGEST_SECONDS / first)))
            chosen = [batches[i % len(batches)] for i in range(steps)]
            times = [device_seconds(partial(run, chosen), device) / steps for _ in range(REPEATS)]
    except Exception as error:
        return failure(error)
    seconds = statistics.median(times)
    return {
        "status": "measured",
        "round_seconds_per_step": times,
        "seconds_per_step": seconds,
        "images_per_second": workload.batch_size / seconds,
        "peak_memory_bytes": peak,
    }


def _at(base: Workload, axis: str, value: float) -> Workload:
    changed: dict[str, Any] = {axis: value}
    return replace(base, **changed)


def _told(entry: dict[str, Any]) -> str:
    if entry["status"] != "measured":
        return str(entry["status"])
    return f"{entry['images_per_second']:,.1f} images/s"
