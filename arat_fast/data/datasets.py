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
from arat_fast.data.formats import (
    Encoded,
    array_folder,
    cifar_binary,
    count_classes,
    decode_all,
    split_folders,
    validation_and_test,
)
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
TINY_IMAGENET = (
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
)
"""Address of the archive, and its MD5."""

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
        val: the images to validate with, where the dataset has both these and test images.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    max_value: int = 255
    val: Images | None = None


def read_arrays(config: DataConfig) -> Arrays:
    """Read a dataset of images of one size.

    Args:
        config: its name (digits, cifar10, cifar100, svhn, tiny-imagenet or arrays) and where it is.

    Raises:
        FileNotFoundError: it is absent, or could not be downloaded.
        ValueError: a file is not the published one, or holds something else.
    """
    readers = {
        "digits": _read_digits,
        "cifar10": _read_cifar,
        "cifar100": _read_cifar,
        "svhn": _read_svhn,
        "tiny-imagenet": _read_tiny_imagenet,
        "arrays": _read_prepared,
    }
    return readers[config.name](config)


def stratified_split(labels: Tensor, num_val: int) -> tuple[Tensor, Tensor]:
    """Choose a fixed held-out set with the class shares of the whole, as nearly as counts allow;
    one image of each class, at least, is left to train on.

    Args:
        labels: (num_samples,), int64, >= 0.
        num_val: images to hold out, >= 0.

    Returns:
        sorted indices of the images to train on and of those held out, int64.

    Raises:
        ValueError: a label is negative, or num_val leaves fewer than two images to train on, or
            none of a class.
    """
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels must be >= 0, got {int(labels.min())}")
    if not num_val:
        return torch.arange(len(labels)), torch.empty(0, dtype=torch.int64)
    counts = torch.bincount(labels)
    most = _most_held_out(counts)
    if num_val > most:
        raise ValueError(
            f"data.num_val must be at most {most} to leave two of the {len(labels)} training "
            f"images, and one of each class, got {num_val}"
        )
    exact = counts * num_val
    quota = exact // len(labels)
    rest = num_val - int(quota.sum())
    largest = torch.argsort(exact % len(labels), descending=True, stable=True)[:rest]
    quota[largest] += 1
    quota = torch.minimum(quota, (counts - 1).clamp(min=0))
    for _ in range(num_val - int(quota.sum())):
        quota[torch.argmax(counts - quota)] += 1
    generator = seeded_generator(_VAL_SEED)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, number in enumerate(quota.tolist()):
        members = torch.nonzero(labels == label)[:, 0]
        chosen = torch.randperm(len(members), generator=generator)[:number]
        held_out[members[chosen]] = True
    return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]


def hold_out_a_tenth(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the test images of a dataset that has none: a tenth, or fewer where classes are small.

    Args:
        labels: (num_samples,), int64, >= 0.

    Returns:
        as :func:`stratified_split`.

    Raises:
        ValueError: there are too few images.
    """
    counts = torch.bincount(labels)
    number = min(max(len(labels) // 10, 1), _most_held_out(counts))
    if not number:
        raise ValueError(
            f"without test images a tenth of the others is held out, but {len(labels)} images of "
            f"{int((counts > 0).sum())} classes are too few to leave two of them and one of each "
            "class; add images, or a split val or test"
        )
    return stratified_split(labels, number)


def _most_held_out(counts: Tensor) -> int:
    """Images that can be held out so that two are left, and one of each class."""
    return max(int(counts.sum()) - max(int((counts > 0).sum()), 2), 0)


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
    if (root / "images.npy").exists():
        folders = {"train": root}
    else:
        folders = split_folders(root) or {"train": root / "train"}
    parts = {split: Images(*array_folder(folder)) for split, folder in folders.items()}

    def names(folder: Path) -> Callable[[int], str]:
        return lambda index: f"{folder}: image {index}"

    named = [(parts[split].labels, names(folder)) for split, folder in folders.items()]
    num_classes = count_classes(root, named)
    train, (val, test) = parts["train"], validation_and_test(parts)
    if test is None:
        chosen, tenth = hold_out_a_tenth(train.labels)
        train, test = train.subset(chosen), train.subset(tenth)
    return Arrays(train, test, tuple(str(label) for label in range(num_classes)), val=val)


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


def _read_tiny_imagenet(config: DataConfig) -> Arrays:
    dataset = list_tiny_imagenet(config)
    assert dataset.test is not None
    train, test = (
        Images(ArrayRows(decode_all(part, 64, "Tiny-ImageNet has")), part.labels)
        for part in (dataset.train, dataset.test)
    )
    return Arrays(train, test, dataset.classes)


def list_tiny_imagenet(config: DataConfig) -> Encoded:
    """List the files of Tiny-ImageNet, its validation images as test images; as
    :func:`read_arrays`.

    The labels are the numbers of the sorted class folders; the published test images have none.
    """
    folder = config.root.expanduser() / "tiny-imagenet-200"
    found: list[Encoded] = []

    def check() -> None:
        if not folder.is_dir():
            raise FileNotFoundError(_absent(config, folder))
        found.append(_tiny_imagenet_files(folder))

    def download() -> None:
        url, md5 = TINY_IMAGENET
        archive = folder.parent / url.rsplit("/", 1)[-1]
        fetch(url, archive, md5)
        unpack(archive, folder)

    _ensure(check, download if config.download else None)
    return found[-1]


def _tiny_imagenet_files(folder: Path) -> Encoded:
    texts = {}
    for name in ("wnids.txt", "words.txt", "val/val_annotations.txt"):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"no dataset file at {path}; {HINT}")
        texts[name] = path.read_text(encoding="utf-8", errors="replace").splitlines()
    wnids = sorted({line.strip() for line in texts["wnids.txt"] if line.strip()})
    words = dict(line.split("\t", 1) for line in texts["words.txt"] if "\t" in line)
    classes = tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)
    train = []
    for label, wnid in enumerate(wnids):
        files = sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
        if not files:
            raise ValueError(
                f"{folder / 'train' / wnid / 'images'}: expected .JPEG images, got none; {HINT}"
            )
        train += [(file, label) for file in files]
    test = []
    annotations = folder / "val" / "val_annotations.txt"
    for number, line in enumerate(texts["val/val_annotations.txt"], 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0].strip()
        if wnid not in wnids or Path(name).name != name:
            raise ValueError(
                f"{annotations}: line {number}: expected a file name and a class of wnids.txt, got "
                f"{line[:60]!r}"
            )
        test.append((annotations.parent / "images" / name, wnids.index(wnid)))
    there = set((annotations.parent / "images").glob("*.JPEG"))
    listed = {file for file, _ in test}
    if not test or len(listed) != len(test) or listed != there:
        raise ValueError(
            f"{annotations}: expected each image of {annotations.parent / 'images'} once, got "
            f"{len(test)} lines for {len(there)} images; {HINT}"
        )
    return Encoded(FileImages(train), FileImages(test), classes)


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
