"""The datasets that have a name: what their files hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arat_fast.config import DataConfig
from arat_fast.data.arrays import ArrayRows, Rows, SelectedRows
from arat_fast.data.digits import MAX_VALUE, load_digits
from arat_fast.data.formats import Encoded, array_folder, cifar_binary
from arat_fast.data.plan import seeded_generator
from arat_fast.data.published import HINT, check_file, fetch, unpack
from arat_fast.data.sources import FileImages

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


class Images(NamedTuple):
    """Images of one size and their labels (num_samples,), int64."""

    rows: Rows
    labels: Tensor

    def subset(self, index: Tensor) -> Images:
        """The images ``index`` (N,), int64, in that order."""
        chosen = index.numpy()
        if isinstance(self.rows, ArrayRows):
            return Images(ArrayRows(self.rows.pixels[chosen]), self.labels[index])
        return Images(SelectedRows(self.rows, chosen), self.labels[index])


class Arrays(NamedTuple):
    """A dataset of images of one size.

    Attributes:
        train: the images to train on.
        test: the images to evaluate.
        classes: class names, one per label.
        max_value: the uint8 value that stands for 1.0.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    max_value: int = 255


def read_arrays(config: DataConfig) -> Arrays:
    """Read a dataset of images of one size.

    Args:
        config: its name (digits, cifar10, cifar100, svhn or arrays) and where it is.

    Raises:
        FileNotFoundError: it is absent, or could not be downloaded.
        ValueError: a file is not the published one, or holds something else.
    """
    readers = {
        "digits": _read_digits,
        "cifar10": _read_cifar,
        "cifar100": _read_cifar,
        "svhn": _read_svhn,
        "arrays": _read_prepared,
    }
    return readers[config.name](config)


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
    if not num_val:
        return torch.arange(len(labels)), torch.empty(0, dtype=torch.int64)
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


def _rows(pixels: Tensor) -> ArrayRows:
    """Images (num_samples, C, H, W), uint8, as rows."""
    return ArrayRows(pixels.permute(0, 2, 3, 1).numpy())


def _read_digits(config: DataConfig) -> Arrays:
    (train, train_labels), (test, test_labels) = load_digits(True), load_digits(False)
    return Arrays(
        Images(_rows(train), train_labels),
        Images(_rows(test), test_labels),
        tuple("0123456789"),
        MAX_VALUE,
    )


def _read_prepared(config: DataConfig) -> Arrays:
    root = config.root.expanduser()
    whole = root if (root / "images.npy").exists() else root / "train"
    train = Images(*array_folder(whole))
    held_out = next((root / n for n in ("val", "test") if (root / n).is_dir()), None)
    if held_out is not None and whole != root:
        test = Images(*array_folder(held_out))
    else:
        chosen, tenth = stratified_split(train.labels, a_tenth(len(train.labels)))
        train, test = train.subset(chosen), train.subset(tenth)
    labels = torch.cat([train.labels, test.labels])
    num_classes = int(labels.max()) + 1
    missing = (torch.bincount(train.labels, minlength=num_classes) == 0).nonzero()
    if len(missing):
        raise ValueError(
            f"{root}: expected images of every class to train on, got none with label "
            f"{int(missing[0])}"
        )
    return Arrays(train, test, tuple(str(label) for label in range(num_classes)))


def a_tenth(num_samples: int) -> int:
    """Images to hold out of a dataset that has no test images."""
    return max(num_samples // 10, 1)


def _read_cifar(config: DataConfig) -> Arrays:
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
            return Arrays(Images(_rows(x), y), Images(_rows(test_x), test_y), classes)
    _ensure(check, download if config.download else None)
    try:
        train, test = dataset(root, train=True), dataset(root, train=False)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: expected {config.name} as published, got {error}") from error

    def images(source: Any) -> Images:
        return Images(ArrayRows(source.data), torch.tensor(source.targets))

    return Arrays(images(train), images(test), tuple(train.classes))


def _read_svhn(config: DataConfig) -> Arrays:
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

    def images(split: str) -> Images:
        path = root / files[split][1]
        try:
            source = datasets.SVHN(root, split=split)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: expected svhn as published, got {error}") from error
        if source.data.shape[1:] != (3, 32, 32):
            size = "x".join(map(str, source.data.shape[1:]))
            raise ValueError(f"{path}: expected images of 3x32x32, got {size}")
        rows = ArrayRows(source.data.transpose(0, 2, 3, 1))
        return Images(rows, torch.from_numpy(source.labels).reshape(-1))

    return Arrays(images("train"), images("test"), tuple("0123456789"))


def read_imagenette(config: DataConfig) -> Encoded:
    """List the files of Imagenette at 160 pixels; as :func:`read_arrays`."""
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
