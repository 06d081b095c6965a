"""``arat-fast bench data``: how fast each loader delivers, and how long the step waits for it."""

from __future__ import annotations

import datetime
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from arat_fast.bench.contestants import all_contestants
from arat_fast.bench.machine import describe_machine, new_record, synchronize
from arat_fast.bench.measure import alternate, failure, free_memory, spread
from arat_fast.bench.step import guarded, warm
from arat_fast.bench.workload import Workload
from arat_fast.data.arrays import StreamedBatches
from arat_fast.data.batches import ResidentBatches
from arat_fast.data.dali import DaliBatches, has_dali
from arat_fast.data.framing import Framing
from arat_fast.data.images import LoaderBatches
from arat_fast.data.plan import BatchPlan
from arat_fast.datasets.encoded import FileImages, default_workers
from arat_fast.datasets.rows import ArrayRows
from arat_fast.device import resolve_device
from arat_fast.display import Display
from arat_fast.files import write_json, write_text

CLASSES = tuple("0123456789")
PHOTO = (375, 500)
"""Height and width of the generated photographs, those of many ImageNet files."""
QUALITY = 90
PADDING = 4
OURS = ("resident", "dali")
"""Loaders of this package, whose batches are those of the :data:`REFERENCE`."""
REFERENCE = "dataloader"


@dataclass(frozen=True)
class DataOptions:
    """Images/s of the loaders on generated files: 32 pixels in arrays, 224 pixels cut out of
    JPEGs."""

    batch_size: int = 128
    """Images; >= 2."""
    num_arrays: int = 10_000
    """Images of 32 x 32; at least one batch."""
    num_files: int = 384
    """JPEG files of 375 x 500; at least one batch."""
    workers: tuple[int, ...] = ()
    """Numbers of workers that are tried, the fastest counts; default none to one per core."""
    rounds: int = 3
    """Epochs of each that are timed, in turns; >= 1."""
    beside_step: bool | None = None
    """Also measure what share of the time the training step waits; default on a GPU only."""
    steps: int = 50
    """Training steps of that measurement; >= 1."""
    model: str = "resnet18"
    """Network of that step: resnet8, resnet18 or wrn34-10."""
    attack_steps: int = 10
    """PGD steps of that step; >= 0."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """File for the record; default benchmarks/results/ in a checkout, else the current folder,
    named by device and date. The table lies beside it."""


class Loader(NamedTuple):
    """A contestant with one number of workers.

    Attributes:
        epoch: the batches of an epoch, on the device: images, float32 in [0, 1], and labels.
        stop: called when it is not needed any more.
    """

    epoch: Callable[[int], Iterable[tuple[Tensor, Tensor]]]
    stop: Callable[[], None]


Make = Callable[[int], Loader]


def bench_data(options: DataOptions) -> int:
    """Measure, print the table, and write JSON and Markdown.

    Returns:
        0, or 1 if a contestant failed.

    Raises:
        ValueError: an option is out of range.
    """
    _check(options)
    device = resolve_device(options.device)
    workers = options.workers or tuple(range(default_workers() + 1))
    display = Display()
    now = datetime.datetime.now(datetime.timezone.utc)
    path = new_record("data", options.out, device, now)
    started = time.monotonic()
    record: dict[str, Any] = {
        "kind": "data",
        "date": now.isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "settings": {
            "batch_size": options.batch_size,
            "num_arrays": options.num_arrays,
            "num_files": options.num_files,
            "workers": list(workers),
            "rounds": options.rounds,
        },
        "results": [],
        "problems": [],
    }
    beside = device.type == "cuda" if options.beside_step is None else options.beside_step
    with tempfile.TemporaryDirectory() as folder:
        display.say(f"data: {options.num_files} JPEG files of {PHOTO[0]} x {PHOTO[1]}")
        files = write_photos(Path(folder), options.num_files)
        record["settings"]["bytes_per_file"] = round(
            statistics.mean(file.stat().st_size for file in files)
        )
        for size, contestants in (
            (32, array_loaders(options, device)),
            (224, file_loaders(files, options, device)),
        ):
            chosen = _choose_workers(size, contestants, workers, record, display, device)
            try:
                _leave_out_unequal(size, chosen, record, display, device)
                _time(size, chosen, options, record, display, device)
                if beside:
                    _beside_step(size, chosen, options, record, display, device)
            finally:
                for loader in chosen.values():
                    loader.stop()
            record["seconds"] = round(time.monotonic() - started, 1)
            write_json(path, record)
    table = data_table(record)
    write_text(path.with_suffix(".md"), table)
    print(table)
    print(f"record: {path}")
    return int(bool(record["problems"]))


def _check(options: DataOptions) -> None:
    for name, least in (("batch_size", 2), ("rounds", 1), ("steps", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be >= {least}, got {getattr(options, name)}")
    for name in ("num_arrays", "num_files"):
        if getattr(options, name) < options.batch_size:
            raise ValueError(
                f"--{name} must be at least one batch of {options.batch_size}, got "
                f"{getattr(options, name)}"
            )
    if any(number < 0 for number in options.workers):
        raise ValueError(f"--workers must be >= 0, got {min(options.workers)}")


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


def array_loaders(options: DataOptions, device: torch.device) -> dict[str, Make]:
    """The contestants for images of 32 × 32: random crop with four pixels of padding, flip."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (options.num_arrays, 32, 32, 3), dtype=np.uint8)
    labels = torch.from_numpy(rng.integers(0, 10, options.num_arrays))

    def resident(workers: int) -> Loader:
        batches = ResidentBatches(
            torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device),
            labels.to(device),
            CLASSES,
            batch_size=options.batch_size,
            shuffle=True,
            padding=PADDING,
            flip=True,
        )
        return Loader(batches.epoch, _nothing)

    def streamed(loader: str, workers: int) -> Loader:
        batches = StreamedBatches(
            ArrayRows(pixels),
            labels,
            CLASSES,
            BatchPlan(options.num_arrays, options.batch_size, shuffle=True),
            device=device,
            loader=loader,
            padding=PADDING,
            flip=True,
            num_workers=workers,
        )
        return Loader(batches.epoch, batches.close)

    makes: dict[str, Make] = {"resident": resident}
    if has_dali():
        makes["dali"] = partial(streamed, "dali")
    makes["dataloader"] = partial(streamed, "dataloader")
    makes["torchvision"] = partial(_torchvision_arrays, pixels, labels, options, device)
    return makes


def file_loaders(files: list[Path], options: DataOptions, device: torch.device) -> dict[str, Make]:
    """The contestants for JPEG files: random resized crop to 224 × 224, flip."""
    source = FileImages([(file, index % 10) for index, file in enumerate(files)])
    framing = Framing(224, "resized", random=True, flip=True)

    def ours(kind: type[DaliBatches] | type[LoaderBatches], workers: int) -> Loader:
        batches = kind(
            source,
            CLASSES,
            framing,
            batch_size=options.batch_size,
            device=device,
            shuffle=True,
            num_workers=workers,
        )
        return Loader(batches.epoch, batches.close)

    makes: dict[str, Make] = {}
    if has_dali():
        makes["dali"] = partial(ours, DaliBatches)
    makes["dataloader"] = partial(ours, LoaderBatches)
    makes["torchvision"] = partial(_torchvision_files, files, options, device)
    return makes


class _PerSample(Dataset[tuple[Tensor, int]]):
    """Images one by one through torchvision's transforms, as most training scripts have it."""

    def __init__(
        self, number: int, image: Callable[[int], Image.Image], transform: Callable[..., Tensor]
    ) -> None:
        self.number, self.image, self.transform = number, image, transform

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.image(index)), index % 10


def _torchvision_arrays(
    pixels: np.ndarray[Any, np.dtype[np.uint8]],
    labels: Tensor,
    options: DataOptions,
    device: torch.device,
    workers: int,
) -> Loader:
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, PADDING),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    samples = _PerSample(len(labels), partial(_picture, pixels), transform)
    return _torch_loader(samples, options, device, workers)


def _torchvision_files(
    files: list[Path], options: DataOptions, device: torch.device, workers: int
) -> Loader:
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    samples = _PerSample(len(files), partial(_photo, files), transform)
    return _torch_loader(samples, options, device, workers)


def _picture(pixels: np.ndarray[Any, np.dtype[np.uint8]], index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


def _photo(files: list[Path], index: int) -> Image.Image:
    return Image.open(files[index]).convert("RGB")


def _torch_loader(
    samples: _PerSample, options: DataOptions, device: torch.device, workers: int
) -> Loader:
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


def _nothing() -> None:
    """A resident loader has nothing to stop."""


def _choose_workers(
    size: int,
    contestants: dict[str, Make],
    workers: tuple[int, ...],
    record: dict[str, Any],
    display: Display,
    device: torch.device,
) -> dict[str, Loader]:
    """Each contestant with the number of workers that is fastest in one epoch after another."""
    chosen = {}
    for name, make in contestants.items():
        tried: dict[int, float] = {}
        best: tuple[float, Loader] | None = None
        # DALI counts threads, of which it has one at least.
        numbers = {"resident": (0,), "dali": sorted({max(n, 1) for n in workers})}
        try:
            for number in numbers.get(name, workers):
                loader = make(number)
                _epoch_rate(loader, 0, device)
                tried[number] = _epoch_rate(loader, 1, device)
                if best is None or tried[number] > best[0]:
                    if best is not None:
                        best[1].stop()
                    best = (tried[number], loader)
                else:
                    loader.stop()
        except Exception as error:
            record["problems"].append(f"{name} at {size} pixels: {failure(error)['reason']}")
            if best is not None:
                best[1].stop()
            continue
        assert best is not None
        chosen[name] = best[1]
        fastest = max(tried, key=lambda n: tried[n])
        record["results"].append(
            {
                "size": size,
                "contestant": name,
                "workers": fastest,
                "tried": {str(n): round(rate, 1) for n, rate in tried.items()},
            }
        )
        told = ", ".join(f"{n}: {rate:,.0f}" for n, rate in tried.items())
        display.say(f"  {size} pixels  {name:12} images/s by workers  {told}")
    return chosen


def _epoch_rate(loader: Loader, epoch: int, device: torch.device) -> float:
    start = time.perf_counter()
    images = sum(len(y) for _, y in loader.epoch(epoch))
    synchronize(device)
    return images / (time.perf_counter() - start)


def _leave_out_unequal(
    size: int,
    chosen: dict[str, Loader],
    record: dict[str, Any],
    display: Display,
    device: torch.device,
) -> None:
    """Stop the loaders of this package whose first batch is not that of its DataLoader, or cannot
    be compared with it.

    A GPU decodes and scales by its own arithmetic: there the mean may differ by a level of 255.
    """
    expected: tuple[Tensor, Tensor] | None = None
    if REFERENCE in chosen:
        with guarded(record, f"{REFERENCE} at {size} pixels, its first batch", display):
            expected = next(iter(chosen[REFERENCE].epoch(0)))
    for name in [name for name in OURS if name in chosen]:
        problem = f"there is no batch of {REFERENCE} to compare its own with"
        if expected is not None:
            problem = "its first batch cannot be compared"
            with guarded(record, f"{name} at {size} pixels, its first batch", display):
                problem = _difference(next(iter(chosen[name].epoch(0))), expected, device)
        if problem:
            record["problems"].append(f"{name} at {size} pixels: {problem}; it was not timed")
            chosen.pop(name).stop()


def _difference(
    batch: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], device: torch.device
) -> str:
    """What tells a batch from the one that is expected; empty for nothing."""
    (x, y), (other_x, other_y) = batch, expected
    levels = 255 * float((x - other_x).abs().mean()) if x.shape == other_x.shape else 255
    if levels <= (1 if device.type == "cuda" else 0) and torch.equal(y, other_y):
        return ""
    return (
        f"its first batch is not that of {REFERENCE}, the mean difference is {levels:.3g} levels "
        "of 255"
    )


def _time(
    size: int,
    chosen: dict[str, Loader],
    options: DataOptions,
    record: dict[str, Any],
    display: Display,
    device: torch.device,
) -> None:
    epochs = {name: itertools.count(2) for name in chosen}
    calls = {
        name: (lambda name=name, loader=loader: _epoch_rate(loader, next(epochs[name]), device))
        for name, loader in chosen.items()
    }
    values, failures = alternate(calls, options.rounds)
    for entry in record["results"]:
        name = entry["contestant"]
        if entry["size"] != size or name not in chosen:
            continue
        if name in failures:
            record["problems"].append(f"{name} at {size} pixels: {failures[name]['reason']}")
            continue
        entry["round_images_per_second"] = [round(rate, 1) for rate in values[name]]
        entry["images_per_second"] = round(statistics.median(values[name]), 1)
        entry["spread"] = round(spread(values[name]), 3)
        display.say(f"  {size} pixels  {name:12} {entry['images_per_second']:,.0f} images/s")


def _beside_step(
    size: int,
    chosen: dict[str, Loader],
    options: DataOptions,
    record: dict[str, Any],
    display: Display,
    device: torch.device,
) -> None:
    """Share of the time that the step of this package waits for each loader."""
    workload = Workload(options.model, options.batch_size, size, options.attack_steps)
    contestant = all_contestants(device, None)["fast"]
    with guarded(record, f"the step at {size} pixels", display):
        ready = workload.batches(2, device, seed=0)
        run = warm(contestant, workload, device, ready)
        for entry in record["results"]:
            name = entry["contestant"]
            if entry["size"] != size or name not in chosen:
                continue
            what = f"{name} at {size} pixels, beside the step"
            with guarded(record, what, display), contestant.settings():
                share, rate = waited(run, chosen[name], ready[0], options.steps, device)
                entry["waited"] = round(share, 4)
                entry["trained_images_per_second"] = round(rate, 1)
                display.say(f"  {size} pixels  {name:12} the step waits {100 * share:.1f} %")
    free_memory(device)


def waited(
    run: Callable[[list[tuple[Tensor, Tensor]]], object],
    loader: Loader,
    ready: tuple[Tensor, Tensor],
    steps: int,
    device: torch.device,
) -> tuple[float, float]:
    """The share of the time in which a step had no batch, and the images/s with the loader.

    The same number of steps is timed on one batch that is there already.

    Args:
        run: trains on batches.
        loader: delivers them.
        ready: a batch on the device.
        steps: whole batches that are trained on, >= 1.
        device: that trains.
    """
    number, shape = len(ready[1]), ready[0].shape
    endless = (batch for epoch in itertools.count(100) for batch in loader.epoch(epoch))
    batches = (batch for batch in endless if batch[0].shape == shape)
    times = []
    for source in (itertools.repeat(ready), batches):
        run([next(source)])
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            run([next(source)])
        synchronize(device)
        times.append(time.perf_counter() - start)
    return max(1 - times[0] / times[1], 0.0), steps * number / times[1]


def data_table(record: dict[str, Any]) -> str:
    """The record for people to read."""
    machine, settings = record["machine"], record["settings"]
    commit = machine["commit"][:12] + (" with local changes" if machine["dirty"] else "")
    waits = any("waited" in entry for entry in record["results"])
    lines = [
        f"# Loaders: {machine['device']}",
        "",
        f"{record['date']}; torch {machine['versions']['torch']}, commit {commit}. Batches of "
        f"{settings['batch_size']}, float32 on the device. 32 pixels: "
        f"{settings['num_arrays']:,} generated images in an array, random crop and flip. 224 "
        f"pixels: {settings['num_files']} generated JPEG files of {PHOTO[0]} x {PHOTO[1]}, "
        f"{settings['bytes_per_file'] / 1e3:.0f} kB each, random resized crop and flip. Median of "
        f"{settings['rounds']} epochs in turns, with the fastest number of workers.",
        "",
        "| pixels | loader | workers | images/s | spread | × dataloader | × torchvision |"
        + (" step waits | images/s trained |" if waits else ""),
        "|---|---|---|---|---|---|---|" + ("---|---|" if waits else ""),
    ]
    for entry in record["results"]:
        rate = entry.get("images_per_second")
        if rate is None:
            continue
        others = {
            other["contestant"]: other["images_per_second"]
            for other in record["results"]
            if other["size"] == entry["size"] and "images_per_second" in other
        }
        ratios = [
            f"{rate / others[name]:.2f}" if name in others else "–"
            for name in ("dataloader", "torchvision")
        ]
        cells = [
            str(entry["size"]),
            entry["contestant"],
            str(entry["workers"]),
            f"{rate:,.0f}",
            f"{100 * entry['spread']:.0f} %",
            *ratios,
        ]
        if waits:
            cells += (
                [f"{100 * entry['waited']:.1f} %", f"{entry['trained_images_per_second']:,.0f}"]
                if "waited" in entry
                else ["–", "–"]
            )
        lines.append(f"| {' | '.join(cells)} |")
    if record["problems"]:
        lines += ["", "Problems:", "", *(f"- {problem}" for problem in record["problems"])]
    return "\n".join(lines) + "\n"
