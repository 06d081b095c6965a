"""The datasets by name, as the splits of a run."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arat_fast.config import DataConfig
from arat_fast.data.arrays import ArrayRows, JoinedRows, Rows, SelectedRows, StreamedBatches
from arat_fast.data.batches import Batches, ResidentBatches, check_samples
from arat_fast.data.dali import DaliBatches, has_dali
from arat_fast.data.digits import MAX_VALUE, load_digits
from arat_fast.data.formats import (
    Encoded,
    array_folder,
    cifar_binary,
    class_folders,
    tar_shards,
    unreadable,
)
from arat_fast.data.framing import Framing, Kind
from arat_fast.data.images import LoaderBatches
from arat_fast.data.plan import WHOLE, BatchPlan, MixedPlan, Shard, seeded_generator
from arat_fast.data.published import HINT, check_file, fetch, unpack
from arat_fast.data.sources import EncodedImages, FileImages, decode_image

# The class folders of Imagenette, in the order of their labels.
IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
_CROPS: dict[str, Kind] = {"imagenette": "pad"}
_VAL_SEED = 20
_EVALUATION_SEED = 21
_PROBE_STREAM = 1


class DataSplits(NamedTuple):
    """The splits of a run.

    Attributes:
        train: shuffled and augmented.
        probe: the same images, in another order and with other augmentation.
        val: images held out of training, in a fixed order, not augmented; None for none.
        test: the test images of the dataset, in a fixed order, not augmented. The first images of
            either are a sample of all classes.
        skipped: files that were left out, and why.
    """

    train: Batches
    probe: Batches
    val: Batches | None
    test: Batches
    skipped: tuple[str, ...] = ()


def load_data(
    config: DataConfig,
    *,
    device: torch.device,
    seed: int,
    eval_batch_size: int,
    memory_format: torch.memory_format = torch.contiguous_format,
    shard: Shard = WHOLE,
) -> DataSplits:
    """Read a dataset and split it.

    Args:
        config: which dataset, where it is and how training augments it.
        device: where the batches go; images in arrays stay there as a whole where they fit.
        seed: of order and augmentation, >= 0; the held-out images do not depend on it.
        eval_batch_size: samples in a batch of ``val`` and ``test``, over all ranks.
        memory_format: of the training images that stay on the device.
        shard: this process; every split is shared by all ranks.

    Raises:
        FileNotFoundError: the dataset is absent, or could not be downloaded.
        ValueError: a file is not the published one, an image or a label does not fit, or
            ``num_val`` leaves too few images to train on.
    """
    make = (
        _encoded_splits if config.name in ("imagenette", "folder", "webdataset") else _array_splits
    )
    return make(config, device, seed, eval_batch_size, memory_format, shard)


def stratified_split(labels: Tensor, num_val: int) -> tuple[Tensor, Tensor]:
    """Choose a fixed held-out set with the class shares of the whole, as nearly as counts allow.

    Args:
        labels: (num_samples,), int64, >= 0.
        num_val: images to hold out, in [0, num_samples - 2].

    Returns:
        sorted indices of the images to train on and of those held out, int64.

    Raises:
        ValueError: a label is negative, or num_val leaves fewer than two images to train on.
    """
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels must be >= 0, got {int(labels.min())}")
    if num_val and num_val > len(labels) - 2:
        raise ValueError(
            f"data.num_val must be at most {max(len(labels) - 2, 0)} to leave two of the "
            f"{len(labels)} training images, got {num_val}"
        )
    counts = torch.bincount(labels)
    exact = counts * num_val
    quota = exact // len(labels)
    rest = num_val - int(quota.sum())
    largest = torch.argsort(exact % len(labels), descending=True, stable=True)[:rest]
    quota[largest] += 1
    generator = seeded_generator(_VAL_SEED)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, number in enumerate(quota.tolist()):
        members = torch.nonzero(labels == label)[:, 0]
        chosen = torch.randperm(len(members), generator=generator)[:number]
        held_out[members[chosen]] = True
    return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]


class _Images(NamedTuple):
    rows: Rows
    labels: Tensor

    def subset(self, index: Tensor) -> _Images:
        chosen = index.numpy()
        if isinstance(self.rows, ArrayRows):
            return _Images(ArrayRows(self.rows.pixels[chosen]), self.labels[index])
        return _Images(SelectedRows(self.rows, chosen), self.labels[index])


class _Arrays(NamedTuple):
    train: _Images
    test: _Images
    classes: tuple[str, ...]
    max_value: int = 255


def _array_splits(
    config: DataConfig,
    device: torch.device,
    seed: int,
    eval_batch_size: int,
    memory_format: torch.memory_format,
    shard: Shard,
) -> DataSplits:
    readers = {
        "digits": _read_digits,
        "cifar10": _read_cifar,
        "cifar100": _read_cifar,
        "svhn": _read_svhn,
        "arrays": _read_arrays,
    }
    dataset = readers[config.name](config)
    try:
        for part in (dataset.train, dataset.test):
            if isinstance(part.rows, ArrayRows):
                check_samples(_tensor(part), part.labels, len(dataset.classes), dataset.max_value)
        return _make_array_splits(
            dataset, config, device, seed, eval_batch_size, memory_format, shard
        )
    except ValueError as error:
        raise ValueError(f"dataset {config.name}: {error}") from error


def _make_array_splits(
    dataset: _Arrays,
    config: DataConfig,
    device: torch.device,
    seed: int,
    eval_batch_size: int,
    memory_format: torch.memory_format,
    shard: Shard,
) -> DataSplits:
    chosen, held_out = stratified_split(dataset.train.labels, config.num_val)
    train = dataset.train if not config.num_val else dataset.train.subset(chosen)
    val = dataset.train.subset(held_out)
    num_original = train.rows.shape[0]
    if config.unsup is not None:
        train = _with_generated(train, config.unsup.expanduser(), len(dataset.classes))

    def plan(training_seed: int) -> BatchPlan:
        if config.unsup is None:
            return BatchPlan(
                num_original, config.batch_size, shuffle=True, seed=training_seed, shard=shard
            )
        return MixedPlan(
            num_original,
            train.rows.shape[0] - num_original,
            config.batch_size,
            config.unsup_fraction,
            seed=training_seed,
            shard=shard,
        )

    num_bytes = sum(math.prod(part.rows.shape) for part in (train, val, dataset.test))
    loader = config.loader
    if loader == "auto":
        streamed = "dali" if has_dali() else "dataloader"
        loader = "resident" if num_bytes <= _room(device) else streamed

    def make(images: _Images, plans: list[BatchPlan], training: bool) -> list[Batches]:
        padding = config.padding if training else 0
        flip = config.flip and training
        layout = memory_format if training else torch.contiguous_format
        if loader != "resident":
            return [
                StreamedBatches(
                    images.rows,
                    images.labels,
                    dataset.classes,
                    one,
                    device=device,
                    loader=loader,
                    max_value=dataset.max_value,
                    padding=padding,
                    flip=flip,
                    memory_format=layout,
                    num_workers=config.num_workers,
                )
                for one in plans
            ]
        x, y = _tensor(images).to(device), images.labels.to(device)
        return [
            ResidentBatches(
                x,
                y,
                dataset.classes,
                batch_size=one.batch_size,
                max_value=dataset.max_value,
                padding=padding,
                flip=flip,
                memory_format=layout,
                plan=one,
            )
            for one in plans
        ]

    def evaluated(images: _Images) -> Batches:
        one = BatchPlan(images.rows.shape[0], eval_batch_size, shard=shard)
        return make(images, [one], False)[0]

    training = make(train, [plan(seed), plan(_probe_seed(seed))], True)
    return DataSplits(
        train=training[0],
        probe=training[1],
        val=evaluated(val) if config.num_val else None,
        test=evaluated(dataset.test),
    )


def _tensor(images: _Images) -> Tensor:
    """All images, (num_samples, C, H, W), uint8, in memory."""
    rows = images.rows
    pixels = rows.pixels if isinstance(rows, ArrayRows) else rows.take(np.arange(rows.shape[0]))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _with_generated(train: _Images, folder: Path, num_classes: int) -> _Images:
    rows, labels = array_folder(folder)
    if len(labels) and int(labels.max()) >= num_classes:
        raise ValueError(
            f"{folder}: pseudo-labels must lie in [0, {num_classes - 1}], got {int(labels.max())}"
        )
    return _Images(JoinedRows([train.rows, rows]), torch.cat([train.labels, labels]))


def _room(device: torch.device) -> int:
    """Bytes that a dataset may take on a device: half of what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 2**32


def _probe_seed(seed: int) -> int:
    return seeded_generator(seed, _PROBE_STREAM).initial_seed()


def _rows(pixels: Tensor) -> ArrayRows:
    """Images (num_samples, C, H, W), uint8, as rows."""
    return ArrayRows(pixels.permute(0, 2, 3, 1).numpy())


def _read_digits(config: DataConfig) -> _Arrays:
    (train, train_labels), (test, test_labels) = load_digits(True), load_digits(False)
    return _Arrays(
        _Images(_rows(train), train_labels),
        _Images(_rows(test), test_labels),
        tuple("0123456789"),
        MAX_VALUE,
    )


def _read_arrays(config: DataConfig) -> _Arrays:
    root = config.root.expanduser()
    whole = root if (root / "images.npy").exists() else root / "train"
    train = _Images(*array_folder(whole))
    held_out = next((root / n for n in ("val", "test") if (root / n).is_dir()), None)
    if held_out is not None and whole != root:
        test = _Images(*array_folder(held_out))
    else:
        chosen, tenth = stratified_split(train.labels, _a_tenth(len(train.labels)))
        train, test = train.subset(chosen), train.subset(tenth)
    labels = torch.cat([train.labels, test.labels])
    num_classes = int(labels.max()) + 1
    missing = (torch.bincount(train.labels, minlength=num_classes) == 0).nonzero()
    if len(missing):
        raise ValueError(
            f"{root}: expected images of every class to train on, got none with label "
            f"{int(missing[0])}"
        )
    return _Arrays(train, test, tuple(str(label) for label in range(num_classes)))


def _a_tenth(num_samples: int) -> int:
    return max(num_samples // 10, 1)


def _read_cifar(config: DataConfig) -> _Arrays:
    from torchvision import datasets

    dataset = datasets.CIFAR10 if config.name == "cifar10" else datasets.CIFAR100
    root = config.root.expanduser()
    folder = root / dataset.base_folder
    files = [*dataset.train_list, *dataset.test_list]
    files.append([dataset.meta["filename"], dataset.meta["md5"]])

    def check() -> None:
        if not folder.is_dir():
            raise FileNotFoundError(_absent(config, folder))
        for name, md5 in files:
            check_file(folder / name, md5)

    def download() -> None:
        archive = root / dataset.filename
        fetch(dataset.url, archive, dataset.tgz_md5)
        unpack(archive, folder)

    if not folder.is_dir():
        binary = cifar_binary(config.name, root)
        if binary is not None:
            (x, y, test_x, test_y), classes = binary
            return _Arrays(_Images(_rows(x), y), _Images(_rows(test_x), test_y), classes)
    _ensure(check, download if config.download else None)
    try:
        train, test = dataset(root, train=True), dataset(root, train=False)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: expected {config.name} as published, got {error}") from error

    def images(source: Any) -> _Images:
        return _Images(ArrayRows(source.data), torch.tensor(source.targets))

    return _Arrays(images(train), images(test), tuple(train.classes))


def _read_svhn(config: DataConfig) -> _Arrays:
    from torchvision import datasets

    root = config.root.expanduser()
    files = {split: datasets.SVHN.split_list[split] for split in ("train", "test")}

    def check() -> None:
        for _, name, md5 in files.values():
            if not (root / name).exists():
                raise FileNotFoundError(_absent(config, root / name))
            check_file(root / name, md5)

    def download() -> None:
        for url, name, md5 in files.values():
            fetch(url, root / name, md5)

    _ensure(check, download if config.download else None)

    def images(split: str) -> _Images:
        path = root / files[split][1]
        try:
            source = datasets.SVHN(root, split=split)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: expected svhn as published, got {error}") from error
        if source.data.shape[1:] != (3, 32, 32):
            size = "x".join(map(str, source.data.shape[1:]))
            raise ValueError(f"{path}: expected images of 3x32x32, got {size}")
        rows = ArrayRows(source.data.transpose(0, 2, 3, 1))
        return _Images(rows, torch.from_numpy(source.labels).reshape(-1))

    return _Arrays(images("train"), images("test"), tuple("0123456789"))


def _read_imagenette(config: DataConfig) -> Encoded:
    folder = config.root.expanduser() / "imagenette2-160"

    def check() -> None:
        if not folder.is_dir():
            raise FileNotFoundError(_absent(config, folder))
        for split in ("train", "val"):
            _list_images(folder / split)

    def download() -> None:
        from torchvision import datasets

        url, md5 = datasets.Imagenette._ARCHIVES["160px"]
        archive = folder.parent / url.rsplit("/", 1)[-1]
        fetch(url, archive, md5)
        unpack(archive, folder)

    _ensure(check, download if config.download else None)
    train, test = _list_images(folder / "train"), _list_images(folder / "val")
    return Encoded(FileImages(train), FileImages(test), tuple(IMAGENETTE_CLASSES.values()))


def _encoded_splits(
    config: DataConfig,
    device: torch.device,
    seed: int,
    eval_batch_size: int,
    memory_format: torch.memory_format,
    shard: Shard,
) -> DataSplits:
    if config.unsup is not None:
        raise ValueError(
            f"data.unsup is mixed with images in arrays (cifar10, …), got data.name {config.name}"
        )
    root = config.root.expanduser()
    if config.name == "imagenette":
        dataset = _read_imagenette(config)
    else:
        dataset = class_folders(root) if config.name == "folder" else tar_shards(root)
    train, test, skipped = dataset.train, dataset.test, []
    if config.bad_images == "skip":
        train, reasons = _readable(train)
        skipped += reasons
        if test is not None:
            test, reasons = _readable(test)
            skipped += reasons
    if test is None:
        chosen, tenth = stratified_split(train.labels, _a_tenth(len(train)))
        train, test = train.subset(chosen), train.subset(tenth)
    chosen, held_out = stratified_split(train.labels, config.num_val)
    kept, val = train.subset(chosen), _mixed(train.subset(held_out))
    cut = config.crop if config.crop != "auto" else _CROPS.get(config.name, "resized")
    evaluated = Framing(config.image_size, cut)
    trained = Framing(config.image_size, cut, True, config.padding, config.flip)
    loader = config.loader
    if loader == "auto":
        loader = "dali" if has_dali() else "dataloader"
    if loader == "resident":
        if cut == "resized":
            raise ValueError(
                "data.loader resident keeps images of one size: it needs --data.crop pad with "
                f"images of {config.image_size} x {config.image_size} pixels"
            )
        parts = [_decode_all(part, config.image_size) for part in (kept, val, _mixed(test))]
        arrays = _Arrays(parts[0], parts[2], dataset.classes)
        splits = _make_array_splits(
            arrays,
            dataclasses.replace(config, num_val=0),
            device,
            seed,
            eval_batch_size,
            memory_format,
            shard,
        )
        if len(val):
            pixels, labels = _tensor(parts[1]).to(device), parts[1].labels.to(device)
            plan = BatchPlan(len(labels), eval_batch_size, shard=shard)
            splits = splits._replace(
                val=ResidentBatches(
                    pixels, labels, dataset.classes, batch_size=eval_batch_size, plan=plan
                )
            )
        return splits._replace(skipped=tuple(skipped))

    def batches(source: EncodedImages, training_seed: int | None = None) -> Batches:
        training = training_seed is not None
        kind = DaliBatches if loader == "dali" else LoaderBatches
        return kind(
            source,
            dataset.classes,
            trained if training else evaluated,
            batch_size=config.batch_size if training else eval_batch_size,
            device=device,
            shuffle=training,
            seed=training_seed or 0,
            shard=shard,
            num_workers=config.num_workers,
        )

    return DataSplits(
        train=batches(kept, seed),
        probe=batches(kept, _probe_seed(seed)),
        val=batches(val) if len(val) else None,
        test=batches(_mixed(test)),
        skipped=tuple(skipped),
    )


def _readable(source: EncodedImages) -> tuple[EncodedImages, list[str]]:
    """The images that can be decoded, and what is wrong with the others."""
    bad = unreadable(source)
    kept = torch.tensor([index for index in range(len(source)) if index not in bad])
    for label in set(source.labels.tolist()) - set(source.labels[kept].tolist()):
        first = next(index for index in bad if int(source.labels[index]) == label)
        raise ValueError(f"no image with label {label} can be read; {bad[first]}")
    return source.subset(kept), list(bad.values())


def _decode_all(source: EncodedImages, size: int) -> _Images:
    pixels = np.empty((len(source), size, size, 3), np.uint8)
    for index in range(len(source)):
        image = decode_image(source.read(index), source.name(index))
        if image.shape[:2] != (size, size):
            raise ValueError(
                f"{source.name(index)}: data.loader resident needs images of {size} x {size} "
                f"pixels (data.image_size), got {image.shape[0]} x {image.shape[1]}"
            )
        pixels[index] = image
    return _Images(ArrayRows(pixels), source.labels)


def _mixed(source: EncodedImages) -> EncodedImages:
    """The samples in another fixed order: the folders are sorted by class, and evaluation takes
    the first images where it is asked for fewer than all."""
    return source.subset(torch.randperm(len(source), generator=seeded_generator(_EVALUATION_SEED)))


def _list_images(folder: Path) -> list[tuple[Path, int]]:
    """Files and labels of one split of Imagenette, in a fixed order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}, expected one of images by class; {HINT}")
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    for name in found:
        if name not in IMAGENETTE_CLASSES and not name.startswith("."):
            expected = ", ".join(IMAGENETTE_CLASSES)
            raise ValueError(f"{folder}: expected the class folders {expected}, got {name}")
    samples = []
    for label, (name, title) in enumerate(IMAGENETTE_CLASSES.items()):
        files = sorted((folder / name).glob("*.[jJ][pP][eE][gG]"))
        if not files:
            raise ValueError(f"{folder / name}: expected .JPEG images ({title}), got none; {HINT}")
        samples += [(file, label) for file in files]
    return samples


def _ensure(check: Callable[[], None], download: Callable[[], None] | None) -> None:
    """Check that a dataset is there and intact; where it is not, download it and check again."""
    try:
        check()
    except (FileNotFoundError, ValueError):
        if download is None:
            raise
        download()
        check()


def _absent(config: DataConfig, path: Path) -> str:
    return (
        f"dataset {config.name} not found, looked at {path}; {HINT} into {config.root}, or "
        f"--data.root with the folder that holds it"
    )
