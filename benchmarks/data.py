"""``python -m benchmarks.data``: how fast each loader is, and how long the step waits."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from arat_fast.data.batches import ResidentBatches
from arat_fast.data.dali import DaliBatches, has_dali
from arat_fast.data.framing import Framing, Shift
from arat_fast.data.loader import LoaderBatches
from arat_fast.data.plan import BatchPlan
from arat_fast.datasets.base import Samples
from arat_fast.datasets.encoded import EncodedImages, default_workers
from arat_fast.datasets.rows import Images
from arat_fast.settings import Count, Number
from benchmarks import harness
from benchmarks.contestants import all_contestants
from benchmarks.harness import Bench, Record, alternate, command, spread
from benchmarks.measure import free_memory, seconds
from benchmarks.table import grid, page
from benchmarks.turns import warm
from benchmarks.workload import Workload

CLASSES = tuple("0123456789")
PHOTO = (375, 500)
"""Height and width of the generated photographs, those of many ImageNet files."""
QUALITY = 90
PADDING = 4
OURS = ("resident", "dali")
"""Loaders of this package, whose batches are those of the :data:`REFERENCE`."""
REFERENCE = "dataloader"


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    """Images/s of the loaders on generated files: 32 pixels in arrays, 224 pixels cut out of
    JPEGs. A turn is an epoch."""

    batch_size: int = 128
    """Images; >= 2."""
    num_arrays: int = 10_000
    """Images of 32 x 32; at least one batch."""
    num_files: int = 384
    """JPEG files of 375 x 500; at least one batch."""
    workers: tuple[Number, ...] = ()
    """Numbers of workers that are tried, the fastest counts; default none to one per core."""
    beside_step: bool | None = None
    """Also measure what share of the time the training step waits; default on a GPU only."""
    steps: Count = 50
    """Training steps of that measurement."""
    model: str = "resnet18"
    """Network of that step: resnet8, resnet18 or wrn34-10."""
    attack_steps: Number = 10
    """PGD steps of that step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.batch_size <= min(self.num_arrays, self.num_files):
            raise ValueError(
                "2 <= --batch-size <= --num-arrays and --num-files is expected, got "
                f"{self.batch_size}, {self.num_arrays} and {self.num_files}"
            )


class Loader(NamedTuple):
    """A contestant with one number of workers.

    Attributes:
        epoch: the batches of an epoch, on the device: images, float32 in [0, 1], and labels.
        stop: called when it is not needed any more.
    """

    epoch: Callable[[int], Iterable[tuple[Tensor, Tensor]]]
    stop: Callable[[], object]


Make = Callable[[int], Loader]


def run(options: Options) -> int:
    """Measure, print the table, and write JSON and Markdown.

    Returns:
        0, or 1 if a contestant failed.
    """
    bench = Bench("data", options, table)
    device = bench.device
    beside = device.type == "cuda" if options.beside_step is None else options.beside_step
    with tempfile.TemporaryDirectory() as folder:
        bench.say(f"{options.num_files} JPEG files of {PHOTO[0]} x {PHOTO[1]}")
        files = write_photos(Path(folder), options.num_files)
        bench.record["settings"] |= {
            "batch_size": options.batch_size,
            "num_arrays": options.num_arrays,
            "num_files": options.num_files,
            "rounds": options.rounds,
            "bytes_per_file": round(statistics.mean(file.stat().st_size for file in files)),
        }
        measure(bench, 32, array_loaders(options, device), beside)
        measure(bench, 224, file_loaders(files, options, device), beside)
    return bench.finish()


def measure(
    bench: Bench[Options], size: int, contestants: Mapping[str, Make], beside: bool
) -> None:
    """All loaders of images of one size; what is right takes turns.

    Args:
        bench: to whose record the results go.
        size: pixels.
        contestants: by name.
        beside: measure beside the training step too.
    """
    chosen: dict[str, Loader] = {}
    entries: dict[str, Record] = {}
    try:
        for name, make in contestants.items():
            with bench.guarded(f"{name} at {size} pixels"):
                chosen[name], tried = _fastest(bench, name, make)
                entries[name] = {
                    "size": size,
                    "contestant": name,
                    "workers": max(tried, key=lambda n: tried[n]),
                    "tried": {str(n): round(rate, 1) for n, rate in tried.items()},
                }
                told = ", ".join(f"{n}: {rate:,.0f}" for n, rate in tried.items())
                bench.say(f"{size} pixels  {name:12} images/s by workers  {told}")
        bench.record["results"] += entries.values()
        _leave_out_unequal(bench, size, chosen)
        _time(bench, size, chosen, entries)
        if beside:
            _beside_step(bench, size, chosen, entries)
    finally:
        for loader in chosen.values():
            loader.stop()
    bench.save()


def write_photos(folder: Path, number: int, seed: int = 0) -> list[Path]:
    """Write generated photographs: soft colours under fine grain, about 80 kB each as JPEG.

    Args:
        folder: where they go.
        number: of files.
        seed: of the pictures.
    """
    rng = np.random.default_rng(seed)
    height, width = PHOTO
    files = []
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
        pixels = (soft + grain).clip(0, 255).astype(np.uint8)
        files.append(folder / f"{index:05}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=QUALITY)
    return files


def array_loaders(options: Options, device: torch.device) -> dict[str, Make]:
    """The contestants for images of 32 × 32: random crop with four pixels of padding, flip."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (options.num_arrays, 32, 32, 3), dtype=np.uint8)
    labels = torch.from_numpy(rng.integers(0, 10, options.num_arrays))
    framing = Shift(PADDING, flip=True)

    def resident(workers: int) -> Loader:
        batches = ResidentBatches(
            torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device),
            labels.to(device),
            CLASSES,
            BatchPlan(options.num_arrays, options.batch_size, shuffle=True),
            framing,
        )
        return Loader(batches.epoch, bool)

    makes: dict[str, Make] = {"resident": resident}
    makes |= _streamed(Images(pixels, labels), framing, options, device)
    cut = transforms.RandomCrop(32, PADDING)
    samples = _PerSample(len(labels), lambda index: Image.fromarray(pixels[index]), cut)
    makes["torchvision"] = partial(_usual, samples, options, device)
    return makes


def file_loaders(files: list[Path], options: Options, device: torch.device) -> dict[str, Make]:
    """The contestants for JPEG files: random resized crop to 224 × 224, flip."""
    source = EncodedImages(files, torch.arange(len(files)) % 10)
    framing = Framing(224, "resized", random=True, flip=True)
    makes = _streamed(source, framing, options, device)
    cut = transforms.RandomResizedCrop(224)
    samples = _PerSample(len(files), lambda index: Image.open(files[index]).convert("RGB"), cut)
    makes["torchvision"] = partial(_usual, samples, options, device)
    return makes


def _streamed(
    samples: Samples, framing: Shift | Framing, options: Options, device: torch.device
) -> dict[str, Make]:
    plan = BatchPlan(len(samples), options.batch_size, shuffle=True)

    def make(kind: type[DaliBatches] | type[LoaderBatches], workers: int) -> Loader:
        batches = kind(samples, CLASSES, plan, framing, device=device, num_workers=workers)
        return Loader(batches.epoch, batches.close)

    makes: dict[str, Make] = {"dali": partial(make, DaliBatches)} if has_dali() else {}
    return {**makes, "dataloader": partial(make, LoaderBatches)}


class _PerSample(Dataset[tuple[Tensor, int]]):
    """Images one by one through torchvision's transforms, as most training scripts have it."""

    def __init__(
        self,
        number: int,
        image: Callable[[int], Image.Image],
        cut: Callable[[Image.Image], Image.Image],
    ) -> None:
        self.number, self.image = number, image
        flip = transforms.RandomHorizontalFlip()
        self.transform = transforms.Compose([cut, flip, transforms.ToTensor()])

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.image(index)), index % 10


def _usual(samples: _PerSample, options: Options, device: torch.device, workers: int) -> Loader:
    on_gpu = device.type == "cuda"
    loaders = [
        DataLoader(
            samples,
            options.batch_size,
            shuffle=True,
            num_workers=workers,
            pin_memory=on_gpu,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(0),
        )
    ]

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in loaders[0]:
            yield x.to(device, non_blocking=on_gpu), y.to(device, non_blocking=on_gpu)

    return Loader(epoch, loaders.clear)


def _fastest(bench: Bench[Options], name: str, make: Make) -> tuple[Loader, dict[int, float]]:
    """The loader with the number of workers that is fastest in the second epoch, and the images/s
    of each number."""
    workers = bench.options.workers or tuple(range(default_workers() + 1))
    # DALI counts threads, of which it has one at least.
    numbers = {"resident": (0,), "dali": sorted({max(n, 1) for n in workers})}
    tried: dict[int, float] = {}
    with ExitStack() as stack:
        for number in numbers.get(name, workers):
            loader = make(number)
            with ExitStack() as trial:
                trial.callback(loader.stop)
                _epoch_rate(loader, 0, bench.device)
                tried[number] = _epoch_rate(loader, 1, bench.device)
                if tried[number] >= max(tried.values()):
                    stack.close()
                    best = loader
                    stack.push(trial.pop_all())
        stack.pop_all()
    return best, tried


def _epoch_rate(loader: Loader, epoch: int, device: torch.device) -> float:
    images: list[int] = []
    took = seconds(lambda: images.extend(len(y) for _, y in loader.epoch(epoch)), device)
    return sum(images) / took


def _leave_out_unequal(bench: Bench[Options], size: int, chosen: dict[str, Loader]) -> None:
    """Stop the loaders of this package whose first batch is not that of its DataLoader, or cannot
    be compared with it.

    A GPU decodes and scales by its own arithmetic: there the mean may differ by a level of 255.
    """
    expected: tuple[Tensor, Tensor] | None = None
    if REFERENCE in chosen:
        with bench.guarded(f"{REFERENCE} at {size} pixels, its first batch"):
            expected = next(iter(chosen[REFERENCE].epoch(0)))
    limit = 1 if bench.device.type == "cuda" else 0
    for name in [name for name in OURS if name in chosen]:
        levels = math.inf
        with bench.guarded(f"{name} at {size} pixels, its first batch"):
            x, y = next(iter(chosen[name].epoch(0)))
            if expected is not None and torch.equal(y, expected[1]):
                levels = 255 * float((x - expected[0]).abs().mean())
        if levels > limit:
            bench.problem(
                f"{name} at {size} pixels: its first batch is not that of {REFERENCE}, the mean "
                f"difference is {levels:.3g} levels of 255; it was not timed"
            )
            chosen.pop(name).stop()


def _time(
    bench: Bench[Options], size: int, chosen: Mapping[str, Loader], entries: Mapping[str, Record]
) -> None:
    epochs = {name: itertools.count(2) for name in chosen}
    calls = {
        name: (
            lambda name=name, loader=loader: _epoch_rate(loader, next(epochs[name]), bench.device)
        )
        for name, loader in chosen.items()
    }
    values, failures = alternate(calls, bench.options.rounds)
    for name, failed in failures.items():
        bench.problem(f"{name} at {size} pixels: {failed['reason']}")
    for name, rates in values.items():
        entries[name] |= {
            "round_images_per_second": [round(rate, 1) for rate in rates],
            "images_per_second": round(statistics.median(rates), 1),
            "spread": round(spread(rates), 3),
        }
        bench.say(f"{size} pixels  {name:12} {entries[name]['images_per_second']:,.0f} images/s")


def _beside_step(
    bench: Bench[Options], size: int, chosen: Mapping[str, Loader], entries: Mapping[str, Record]
) -> None:
    """Share of the time that the step of this package waits for each loader."""
    options, device = bench.options, bench.device
    workload = Workload(options.model, options.batch_size, size, options.attack_steps)
    contestant = all_contestants(device, None)["fast"]
    with bench.guarded(f"the step at {size} pixels"):
        ready = workload.batches(2, device, seed=0)
        step = warm(contestant, workload, device, ready)
        for name, loader in chosen.items():
            what = f"{name} at {size} pixels, beside the step"
            with bench.guarded(what), contestant.settings():
                share, rate = waited(step, loader, ready[0], options.steps, device)
                entries[name]["waited"] = round(share, 4)
                entries[name]["trained_images_per_second"] = round(rate, 1)
                bench.say(f"{size} pixels  {name:12} the step waits {100 * share:.1f} %")
    free_memory(device)


def waited(
    step: Callable[[list[tuple[Tensor, Tensor]]], object],
    loader: Loader,
    ready: tuple[Tensor, Tensor],
    steps: int,
    device: torch.device,
) -> tuple[float, float]:
    """The share of the time in which a step had no batch, and the images/s with the loader.

    The same number of steps is timed on one batch that is there already.

    Args:
        step: trains on batches.
        loader: delivers them.
        ready: a batch on the device.
        steps: whole batches that are trained on, >= 1.
        device: that trains.
    """
    number, shape = len(ready[1]), ready[0].shape
    endless = (batch for epoch in itertools.count(100) for batch in loader.epoch(epoch))
    batches = (batch for batch in endless if batch[0].shape == shape)

    def train(source: Iterator[tuple[Tensor, Tensor]]) -> None:
        for _ in range(steps):
            step([next(source)])

    times = []
    for source in (itertools.repeat(ready), batches):
        step([next(source)])
        times.append(seconds(partial(train, source), device))
    return max(1 - times[0] / times[1], 0.0), steps * number / times[1]


def table(record: Record) -> str:
    """The record for people to read."""
    settings = record["settings"]
    about = (
        f"Batches of {settings['batch_size']}, float32 on the device. 32 pixels: "
        f"{settings['num_arrays']:,} generated images in an array, random crop and flip. 224 "
        f"pixels: {settings['num_files']} generated JPEG files of {PHOTO[0]} x {PHOTO[1]}, "
        f"{settings['bytes_per_file'] / 1e3:.0f} kB each, random resized crop and flip. Median of "
        f"{settings['rounds']} epochs in turns, with the fastest number of workers."
    )
    waits = any("waited" in entry for entry in record["results"])
    head = ["pixels", "loader", "workers", "images/s", "spread", "× dataloader", "× torchvision"]
    head += ["step waits", "images/s trained"] if waits else []
    timed = [entry for entry in record["results"] if "images_per_second" in entry]
    rates = {(entry["size"], entry["contestant"]): entry["images_per_second"] for entry in timed}
    rows = []
    for entry in timed:
        row = [
            str(entry["size"]),
            entry["contestant"],
            str(entry["workers"]),
            f"{entry['images_per_second']:,.0f}",
            f"{100 * entry['spread']:.0f} %",
        ]
        for name in ("dataloader", "torchvision"):
            other = rates.get((entry["size"], name))
            row.append(f"{entry['images_per_second'] / other:.2f}" if other else "–")
        if "waited" in entry:
            row.append(f"{100 * entry['waited']:.1f} %")
            row.append(f"{entry['trained_images_per_second']:,.0f}")
        rows.append([*row, *["–"] * (len(head) - len(row))])
    return page("Loaders", record, [about], grid(head, rows))


if __name__ == "__main__":
    sys.exit(command(Options, run, "data"))
