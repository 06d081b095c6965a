"""The datasets by name, as the splits of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arat_fast.config import DataConfig
from arat_fast.data.batches import Batches, ResidentBatches, check_samples
from arat_fast.data.digits import MAX_VALUE, load_digits
from arat_fast.data.folder import FolderBatches
from arat_fast.data.plan import WHOLE, Shard, seeded_generator
from arat_fast.data.published import HINT, check_file, fetch, unpack

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
    """

    train: Batches
    probe: Batches
    val: Batches | None
    test: Batches


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
        device: where the batches go; all but Imagenette stay there as a whole.
        seed: of order and augmentation, >= 0; the held-out images do not depend on it.
        eval_batch_size: samples in a batch of ``val`` and ``test``, over all ranks.
        memory_format: of the training images that stay on the device.
        shard: this process; every split is shared by all ranks.

    Raises:
        FileNotFoundError: the dataset is absent, or could not be downloaded.
        ValueError: a file is not the published one, an image or a label does not fit, or
            ``num_val`` leaves too few images to train on.
    """
    if config.name == "imagenette":
        return _folder_splits(config, device, seed, eval_batch_size, shard)
    return _resident_splits(config, device, seed, eval_batch_size, memory_format, shard)


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
    x: Tensor
    y: Tensor


class _Resident(NamedTuple):
    train: _Images
    test: _Images
    classes: tuple[str, ...]
    max_value: int = 255


def _resident_splits(
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
    }
    dataset = readers[config.name](config)

    def on_device(images: _Images) -> _Images:
        return _Images(images.x.to(device), images.y.to(device))

    def batches(images: _Images, training_seed: int | None = None) -> ResidentBatches:
        training = training_seed is not None
        return ResidentBatches(
            images.x,
            images.y,
            dataset.classes,
            batch_size=config.batch_size if training else eval_batch_size,
            max_value=dataset.max_value,
            shuffle=training,
            padding=config.padding if training else 0,
            flip=config.flip and training,
            seed=training_seed or 0,
            shard=shard,
            memory_format=memory_format if training else torch.contiguous_format,
        )

    try:
        check_samples(*dataset.train, len(dataset.classes), dataset.max_value)
        chosen, held_out = stratified_split(dataset.train.y, config.num_val)
        train = on_device(_Images(dataset.train.x[chosen], dataset.train.y[chosen]))
        val = on_device(_Images(dataset.train.x[held_out], dataset.train.y[held_out]))
        return DataSplits(
            train=batches(train, seed),
            probe=batches(train, _probe_seed(seed)),
            val=batches(val) if config.num_val else None,
            test=batches(on_device(dataset.test)),
        )
    except ValueError as error:
        raise ValueError(f"dataset {config.name}: {error}") from error


def _probe_seed(seed: int) -> int:
    return seeded_generator(seed, _PROBE_STREAM).initial_seed()


def _read_digits(config: DataConfig) -> _Resident:
    train, test = _Images(*load_digits(True)), _Images(*load_digits(False))
    return _Resident(train, test, tuple("0123456789"), MAX_VALUE)


def _read_cifar(config: DataConfig) -> _Resident:
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

    _ensure(check, download if config.download else None)
    try:
        train, test = dataset(root, train=True), dataset(root, train=False)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: expected {config.name} as published, got {error}") from error

    def images(source: Any) -> _Images:
        x = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        return _Images(x, torch.tensor(source.targets))

    return _Resident(images(train), images(test), tuple(train.classes))


def _read_svhn(config: DataConfig) -> _Resident:
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
        x = torch.from_numpy(np.ascontiguousarray(source.data))
        return _Images(x, torch.from_numpy(source.labels).reshape(-1))

    return _Resident(images("train"), images("test"), tuple("0123456789"))


def _folder_splits(
    config: DataConfig, device: torch.device, seed: int, eval_batch_size: int, shard: Shard
) -> DataSplits:
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
    chosen, held_out = stratified_split(torch.tensor([y for _, y in train]), config.num_val)

    def batches(samples: list[tuple[Path, int]], training_seed: int | None = None) -> FolderBatches:
        training = training_seed is not None
        return FolderBatches(
            samples,
            tuple(IMAGENETTE_CLASSES.values()),
            batch_size=config.batch_size if training else eval_batch_size,
            image_size=config.image_size,
            device=device,
            shuffle=training,
            random_crop=training,
            padding=config.padding if training else 0,
            flip=config.flip and training,
            seed=training_seed or 0,
            shard=shard,
            num_workers=config.num_workers,
        )

    kept = [train[index] for index in chosen.tolist()]
    val = [train[index] for index in held_out.tolist()]
    return DataSplits(
        train=batches(kept, seed),
        probe=batches(kept, _probe_seed(seed)),
        val=batches(_mixed(val)) if val else None,
        test=batches(_mixed(test)),
    )


def _mixed(samples: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """The samples in another fixed order: the folders are sorted by class, and evaluation takes
    the first images where it is asked for fewer than all."""
    order = torch.randperm(len(samples), generator=seeded_generator(_EVALUATION_SEED))
    return [samples[index] for index in order.tolist()]


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
