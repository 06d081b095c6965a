"""What a dataset on disk is: kind, classes, sizes, mean and std, a sheet of images."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from arat_fast.config import DataConfig, DatasetName
from arat_fast.data.arrays import Rows
from arat_fast.data.datasets import (
    hold_out_a_tenth,
    list_tiny_imagenet,
    read_arrays,
    read_imagenette,
)
from arat_fast.data.formats import (
    Encoded,
    array_folder,
    class_folders,
    has_class_folders,
    index_shards,
    named_splits,
    tar_files,
    tar_shards,
)
from arat_fast.data.prepare import first_images, open_npz
from arat_fast.data.sources import IMAGE_SUFFIXES, EncodedImages, FileImages, decode_image
from arat_fast.files import write_atomic
from arat_fast.recipes import RECIPES

Pixels = npt.NDArray[np.uint8]

CIFAR: dict[str, tuple[DatasetName, str]] = {
    "cifar-10-batches-py": ("cifar10", "CIFAR-10, Python version"),
    "cifar-10-batches-bin": ("cifar10", "CIFAR-10, binary version"),
    "cifar-100-python": ("cifar100", "CIFAR-100, Python version"),
    "cifar-100-binary": ("cifar100", "CIFAR-100, binary version"),
}
"""Folders of CIFAR: the dataset, and what it is."""

FOLDERS: dict[str, tuple[DatasetName, str, Callable[[DataConfig], Encoded]]] = {
    "imagenette2-160": ("imagenette", "Imagenette, 160 pixels", read_imagenette),
    "tiny-imagenet-200": ("tiny-imagenet", "Tiny-ImageNet", list_tiny_imagenet),
}
"""Folders of published image files: the dataset, what it is, and what lists it."""

HELD_OUT = "a tenth held out"
"""Said of the test images of a dataset that has none of its own."""
ALL_OR_A_TENTH = "--data.unsup takes all, training on them alone holds out a tenth"
"""Said of arrays in one folder, which are generated images or a dataset."""

TILE = 96
"""Pixels of an image on the contact sheet, each way."""

SHEET = (6, 8)
"""Rows and columns of the contact sheet."""

_CAPTION = 16
_GAP = 8
_PIXELS = 2**20


@dataclass(frozen=True)
class Part:
    """One split.

    Attributes:
        name: train, test, …
        labels: (num_samples,), int64.
        image: decodes one image by number: (height, width, 3), uint8.
        num_viewable: of the first images only, where not all can be looked at; None for all.
    """

    name: str
    labels: Tensor
    image: Callable[[int], Pixels]
    num_viewable: int | None = None

    @property
    def viewable(self) -> Tensor:
        """The labels of the images that can be looked at."""
        return self.labels[: self.num_viewable]


class _Opened(NamedTuple):
    """A dataset.

    Attributes:
        kind: in words.
        use: the command that trains on it; empty if none does.
        classes: class names, one per label; empty where there are no labels.
        parts: the splits.
        bad: files in its class folders that are no images, and why.
        note: on the splits; empty for none.
    """

    kind: str
    use: str
    classes: tuple[str, ...]
    parts: list[Part]
    bad: tuple[str, ...] = ()
    note: str = ""


@dataclass
class Inspection:
    """What was found.

    Attributes:
        path: what was looked at.
        kind: in words.
        use: the command that trains on it; empty if none does.
        classes: class names, one per label; empty where there are no labels.
        counts: images by split; those that training holds out for testing are of the test.
        note: on the splits; empty for none.
        per_class: images by class name and split.
        sizes: number of looked-at images by "height x width".
        mean: of red, green and blue over the looked-at images, in [0, 1].
        std: likewise, the standard deviation of the pixels.
        looked_at: images that were decoded.
        bad: those of them that could not be, and other files in class folders, and why.
        out_of: images of which those were chosen, evenly spread.
    """

    path: Path
    kind: str
    use: str = ""
    classes: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    note: str = ""
    per_class: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    looked_at: int = 0
    bad: list[str] = field(default_factory=list)
    out_of: int = 0

    def lines(self) -> list[str]:
        """The inspection in words."""
        lines = [f"{self.path}: {self.kind}"]
        if self.use:
            lines.append(f"train with   {self.use}")
        counts = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        lines.append(f"images       {counts}" + (f" ({self.note})" if self.note else ""))
        if self.classes:
            lines.append(f"classes      {len(self.classes)}")
            shown = list(self.per_class.items())[:20]
            width = max(len(name) for name, _ in shown)
            for name, counted in shown:
                each = "  ".join(f"{split} {count:,}" for split, count in counted.items())
                lines.append(f"             {name:{width}}  {each}")
            if len(self.per_class) > len(shown):
                lines.append(f"             and {len(self.per_class) - len(shown)} more")
        else:
            lines.append("classes      none: no labels")
        some = self.out_of < sum(self.counts.values())
        of = f" over the first {self.out_of:,}" if some else ""
        lines.append(f"looked at    {self.looked_at:,} images, evenly spread{of}")
        common = sorted(self.sizes.items(), key=lambda item: -item[1])
        shown_sizes = ", ".join(f"{size} ({count:,})" for size, count in common[:5])
        more = f", and {len(common) - 5} other sizes" if len(common) > 5 else ""
        lines.append(f"sizes        {shown_sizes}{more} (height x width)")
        if self.mean:
            lines.append("mean         " + ", ".join(f"{v:.4f}" for v in self.mean))
            lines.append("std          " + ", ".join(f"{v:.4f}" for v in self.std))
        lines += [f"unreadable   {reason}" for reason in self.bad[:10]]
        if len(self.bad) > 10:
            lines.append(f"unreadable   and {len(self.bad) - 10} more")
        return lines


def inspect(path: Path, sheet: Path | None = None, max_samples: int = 2000) -> Inspection:
    """Find out what a dataset is.

    Args:
        path: a file or a folder.
        sheet: PNG file for the contact sheet; None for none.
        max_samples: images that are decoded for sizes, mean and std, evenly spread; >= 1.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is no dataset that can be read; ``max_samples`` < 1.
    """
    if max_samples < 1:
        raise ValueError(f"max_samples must be >= 1, got {max_samples}")
    if not path.exists():
        raise FileNotFoundError(f"nothing at {path}, expected a dataset's file or folder")
    opened = _open(path)
    parts, classes = opened.parts, opened.classes
    found = Inspection(
        path, opened.kind, opened.use, classes, note=opened.note, bad=list(opened.bad)
    )
    for part in parts:
        found.counts[part.name] = len(part.labels)
        counted = torch.bincount(part.labels, minlength=len(classes))
        for name, count in zip(classes, counted.tolist(), strict=False):
            found.per_class.setdefault(name, {})[part.name] = count
    found.out_of = sum(len(part.viewable) for part in parts)
    number = min(max_samples, found.out_of)
    spread = np.unique(np.linspace(0, found.out_of - 1, number).astype(np.int64))
    histogram = np.zeros((3, 256), np.int64)
    for part, index in _places(parts, spread):
        try:
            image = part.image(index)
        except ValueError as error:
            found.bad.append(str(error))
            continue
        flat = image.reshape(-1, 3)
        # A piece at a time: bincount makes 8 bytes of each value.
        for start in range(0, len(flat), _PIXELS):
            for channel, values in enumerate(flat[start : start + _PIXELS].T):
                histogram[channel] += np.bincount(values, minlength=256)
        size = f"{image.shape[0]} x {image.shape[1]}"
        found.sizes[size] = found.sizes.get(size, 0) + 1
    found.looked_at = len(spread)
    if found.sizes:
        shares = histogram / histogram.sum(1, keepdims=True)
        levels = np.arange(256) / 255
        mean = shares @ levels
        found.mean = mean.tolist()
        found.std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1)).tolist()
    if sheet is not None:
        draw_sheet(parts, classes, sheet)
    return found


def _places(parts: list[Part], numbers: npt.NDArray[np.int64]) -> list[tuple[Part, int]]:
    """Split and number in it of images that are counted over the viewable ones of all splits."""
    ends = np.cumsum([len(part.viewable) for part in parts])
    places = []
    for number in numbers.tolist():
        which = int(np.searchsorted(ends, number, side="right"))
        start = int(ends[which - 1]) if which else 0
        places.append((parts[which], number - start))
    return places


def _open(path: Path) -> _Opened:
    if path.is_file():
        if path.suffix == ".npz":
            shape, labels = open_npz(path)
            kind = (
                f"an .npz file of {shape[0]:,} generated images; convert it with arat-fast data "
                f"prepare {path} FOLDER"
            )
            classes, labels = _numbered(labels)
            return _Opened(kind, "", classes, [_npz_part(path, labels)])
        if path.suffix == ".tar":
            shard = index_shards([path])
            classes, shard.labels = _numbered(shard.labels)
            return _Opened("a tar shard", "", classes, [_encoded("images", shard)])
        raise ValueError(
            f"{path}: expected an .npz file, a .tar shard or a folder, got another kind of file"
        )
    if (path / "images.npy").is_file():
        rows, labels = array_folder(path)
        classes, labels = _numbered(labels)
        use = _command("arrays", path)
        part = _rows("images", rows, labels)
        return _Opened("prepared arrays", use, classes, [part], note=ALL_OR_A_TENTH)
    for folder, (name, words) in CIFAR.items():
        root = path.parent if path.name == folder else path
        if (root / folder).is_dir():
            return _stored(name, root, words)
    if (path / "train_32x32.mat").is_file():
        return _stored("svhn", path, "SVHN")
    for folder, (name, words, read) in FOLDERS.items():
        root = path.parent if path.name == folder else path
        if (root / folder).is_dir():
            encoded = read(DataConfig(name, root=root))
            assert encoded.test is not None
            parts = [_encoded("train", encoded.train), _encoded("val", encoded.test)]
            use = _command(name, root)
            return _Opened(words, use, encoded.classes, parts)
    if any((folder / "images.npy").is_file() for _, folder in named_splits(path)):
        return _stored("arrays", path, "prepared arrays")
    if not has_class_folders(path):
        if tar_files(path):
            return _images("webdataset", path, "WebDataset shards", tar_shards(path))
        files = (file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        flat = sorted(file for file in files if file.is_file() and not file.name.startswith("."))
        if flat:
            unlabelled = FileImages([(file, 0) for file in flat])
            return _Opened("images without classes", "", (), [_encoded("images", unlabelled)])
    return _images("folder", path, "images in folders by class", class_folders(path))


def _images(name: DatasetName, root: Path, kind: str, dataset: Encoded) -> _Opened:
    train, test, use, note = dataset.train, dataset.test, _command(name, root), ""
    if test is None:
        try:
            chosen, tenth = hold_out_a_tenth(train.labels)
            train, test, note = train.subset(chosen), train.subset(tenth), HELD_OUT
        except ValueError as error:
            use, note = "", str(error)
    parts = {"train": train, "val": dataset.val, "test": test}
    splits = [_encoded(split, part) for split, part in parts.items() if part is not None]
    return _Opened(kind, use, dataset.classes, splits, dataset.bad, note)


def _stored(name: DatasetName, root: Path, kind: str) -> _Opened:
    dataset = read_arrays(DataConfig(name, root=root))
    parts = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    splits = [_rows(split, *part) for split, part in parts.items() if part is not None]
    alone = name == "arrays" and len(list(named_splits(root))) == 1
    note = HELD_OUT if alone else ""
    return _Opened(kind, _command(name, root), dataset.classes, splits, note=note)


def _command(name: DatasetName, root: Path) -> str:
    """What trains a ResNet-18 on the dataset: its own recipe, or that of images in folders."""
    recipe = f"{name}-resnet18"
    chosen = [recipe] if recipe in RECIPES else ["folder-resnet18", "--data.name", name]
    return shlex.join(["arat-fast", "train", *chosen, "--data.root", str(root)])


def _numbered(labels: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """The labels that occur, as the names of classes, and which of these each image is of."""
    values, index = np.unique(labels.numpy(), return_inverse=True)
    return tuple(str(value) for value in values.tolist()), torch.from_numpy(index)


def _rows(name: str, rows: Rows, labels: Tensor) -> Part:
    def image(index: int) -> Pixels:
        pixels = rows.take(np.array([index]))[0]
        return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels

    return Part(name, labels, image)


def _encoded(name: str, source: EncodedImages) -> Part:
    def image(index: int) -> Pixels:
        return decode_image(source.read(index), source.name(index))

    return Part(name, source.labels, image)


def _npz_part(path: Path, labels: Tensor) -> Part:
    # An archive is read from its start: a part of it is enough to look at.
    first = first_images(path, 2048)

    def image(index: int) -> Pixels:
        pixels: Pixels = first[index]
        return pixels

    return Part("images", labels, image, len(first))


def draw_sheet(parts: list[Part], classes: tuple[str, ...], path: Path) -> None:
    """Write a contact sheet: images evenly spread over the splits, each with its class.

    Args:
        parts: the splits.
        classes: class names, one per label; empty for none.
        path: PNG file.
    """
    # Evenly over the classes: the images of a folder are sorted by class.
    order = np.argsort(torch.cat([part.viewable for part in parts]).numpy(), kind="stable")
    rows, columns = SHEET
    number = min(rows * columns, len(order))
    chosen = _places(parts, order[np.linspace(0, len(order) - 1, number).astype(int)])
    rows = -(-number // columns)
    cell = (TILE + _GAP, TILE + _CAPTION + _GAP)
    columns = min(columns, number)
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    font: Any = ImageFont.load_default(size=11)
    for place, (part, index) in enumerate(chosen):
        left = _GAP + place % columns * cell[0]
        top = _GAP + place // columns * cell[1]
        caption = classes[int(part.labels[index])] if classes else ""
        try:
            image = Image.fromarray(part.image(index))
        except ValueError:
            pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=(235, 235, 235))
            pen.text((left + 6, top + 40), "unreadable", fill=(150, 30, 30), font=font)
        else:
            small = max(image.size) <= TILE
            scale = TILE / max(image.size)
            size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
            shown = image.resize(
                size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            )
            sheet.paste(shown, (left + (TILE - shown.width) // 2, top + (TILE - shown.height) // 2))
        while caption and pen.textlength(caption, font=font) > TILE:
            caption = caption[:-2].rstrip("…") + "…"
        pen.text((left, top + TILE + 1), caption, fill=(60, 60, 60), font=font)
    write_atomic(path, lambda file: sheet.save(file, "PNG"))
