"""What a dataset on disk is: kind, classes, sizes, mean and std, a sheet of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from arat_fast.config import DataConfig, DatasetName
from arat_fast.data.arrays import Rows
from arat_fast.data.datasets import read_arrays, read_imagenette
from arat_fast.data.formats import (
    array_folder,
    class_folders,
    image_files,
    tar_shards,
)
from arat_fast.data.prepare import first_images, open_npz
from arat_fast.data.sources import EncodedImages, FileImages, decode_image
from arat_fast.files import write_atomic

Pixels = npt.NDArray[np.uint8]

CIFAR: dict[str, tuple[DatasetName, str]] = {
    "cifar-10-batches-py": ("cifar10", "CIFAR-10, Python version"),
    "cifar-10-batches-bin": ("cifar10", "CIFAR-10, binary version"),
    "cifar-100-python": ("cifar100", "CIFAR-100, Python version"),
    "cifar-100-binary": ("cifar100", "CIFAR-100, binary version"),
}
"""Folders of CIFAR: the dataset, and what it is."""

TILE = 96
"""Pixels of an image on the contact sheet, each way."""

SHEET = (6, 8)
"""Rows and columns of the contact sheet."""

_CAPTION = 16
_GAP = 8


@dataclass(frozen=True)
class Part:
    """One split.

    Attributes:
        name: train, test, …
        labels: (num_samples,), int64.
        image: decodes one image by number: (height, width, 3), uint8.
    """

    name: str
    labels: Tensor
    image: Callable[[int], Pixels]


@dataclass
class Inspection:
    """What was found.

    Attributes:
        path: what was looked at.
        kind: in words.
        use: options of ``arat-fast train`` that read it; empty if none does.
        classes: class names, one per label; empty where there are no labels.
        counts: images by split.
        per_class: images by class name and split.
        sizes: number of looked-at images by "height x width".
        mean: of red, green and blue over the looked-at images, in [0, 1].
        std: likewise, the standard deviation of the pixels.
        looked_at: images that were decoded.
        bad: those of them that could not be, and why.
    """

    path: Path
    kind: str
    use: str = ""
    classes: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    per_class: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    looked_at: int = 0
    bad: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The inspection in words."""
        lines = [f"{self.path}: {self.kind}"]
        if self.use:
            lines.append(f"train with   {self.use}")
        counts = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        lines.append(f"images       {counts}")
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
        lines.append(f"looked at    {self.looked_at:,} images, evenly spread")
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
    kind, use, classes, parts = _open(path)
    found = Inspection(path, kind, use, classes)
    for part in parts:
        found.counts[part.name] = len(part.labels)
        counted = Counter(part.labels.tolist())
        for label, name in enumerate(classes):
            found.per_class.setdefault(name, {})[part.name] = counted[label]
    places = [(part, index) for part in parts for index in range(len(part.labels))]
    spread = np.unique(np.linspace(0, len(places) - 1, min(max_samples, len(places))).astype(int))
    total, squares, pixels = np.zeros(3), np.zeros(3), 0
    for place in spread.tolist():
        part, index = places[place]
        try:
            image = part.image(index)
        except ValueError as error:
            found.bad.append(str(error))
            continue
        flat = image.reshape(-1, 3) / 255
        total, squares = total + flat.sum(0), squares + (flat**2).sum(0)
        pixels += len(flat)
        size = f"{image.shape[0]} x {image.shape[1]}"
        found.sizes[size] = found.sizes.get(size, 0) + 1
    found.looked_at = len(spread)
    if pixels:
        mean = total / pixels
        found.mean = mean.tolist()
        found.std = np.sqrt(np.maximum(squares / pixels - mean**2, 0)).tolist()
    if sheet is not None:
        draw_sheet(parts, classes, sheet)
    return found


def _open(path: Path) -> tuple[str, str, tuple[str, ...], list[Part]]:
    """Kind, options, classes and splits."""
    if path.is_file():
        if path.suffix == ".npz":
            shape, labels = open_npz(path)
            kind = (
                f"an .npz file of {shape[0]:,} generated images; convert it with arat-fast data "
                f"prepare {path} FOLDER"
            )
            return kind, "", _numbers(labels), [_npz_part(path, labels)]
        if path.suffix == ".tar":
            encoded = tar_shards(path)
            return "a tar shard", "", encoded.classes, [_encoded("images", encoded.train)]
        raise ValueError(
            f"{path}: expected an .npz file, a .tar shard or a folder, got another kind of file"
        )
    if (path / "images.npy").is_file():
        rows, labels = array_folder(path)
        use = f"--data.name arrays --data.root {path}"
        return "prepared arrays", use, _numbers(labels), [_rows("images", rows, labels)]
    if (path / "train" / "images.npy").is_file():
        return _stored("arrays", path, "prepared arrays")
    for folder, (name, words) in CIFAR.items():
        root = path.parent if path.name == folder else path
        if (root / folder).is_dir():
            return _stored(name, root, words)
    if (path / "train_32x32.mat").is_file():
        return _stored("svhn", path, "SVHN")
    if (path / "imagenette2-160").is_dir() or path.name == "imagenette2-160":
        root = path.parent if path.name == "imagenette2-160" else path
        encoded = read_imagenette(DataConfig("imagenette", root=root))
        assert encoded.test is not None
        parts = [_encoded("train", encoded.train), _encoded("val", encoded.test)]
        use = f"--data.name imagenette --data.root {root}"
        return "Imagenette, 160 pixels", use, encoded.classes, parts
    if any(path.rglob("*.tar")):
        encoded = tar_shards(path)
        name = "webdataset"
        kind = "WebDataset shards"
    else:
        flat = [file for file in image_files(path) if file.parent == path]
        if flat:
            unlabelled = FileImages([(file, 0) for file in flat])
            return "images without classes", "", (), [_encoded("images", unlabelled)]
        encoded, name, kind = class_folders(path), "folder", "images in folders by class"
    parts = [_encoded("train", encoded.train)]
    if encoded.test is not None:
        parts.append(_encoded("test", encoded.test))
    return kind, f"--data.name {name} --data.root {path}", encoded.classes, parts


def _stored(
    name: DatasetName, root: Path, kind: str
) -> tuple[str, str, tuple[str, ...], list[Part]]:
    dataset = read_arrays(DataConfig(name, root=root))
    parts = [
        _rows("train", dataset.train.rows, dataset.train.labels),
        _rows("test", dataset.test.rows, dataset.test.labels),
    ]
    return kind, f"--data.name {name} --data.root {root}", dataset.classes, parts


def _numbers(labels: Tensor) -> tuple[str, ...]:
    return tuple(str(label) for label in range(int(labels.max()) + 1))


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

    return Part("images", labels[: len(first)], image)


def draw_sheet(parts: list[Part], classes: tuple[str, ...], path: Path) -> None:
    """Write a contact sheet: images evenly spread over the splits, each with its class.

    Args:
        parts: the splits.
        classes: class names, one per label; empty for none.
        path: PNG file.
    """
    places = [(part, index) for part in parts for index in range(len(part.labels))]
    # Evenly over the classes: the images of a folder are sorted by class.
    places.sort(key=lambda place: int(place[0].labels[place[1]]))
    rows, columns = SHEET
    number = min(rows * columns, len(places))
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, number).astype(int).tolist()]
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
