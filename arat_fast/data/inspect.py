"""What a dataset on disk is: kind, classes, sizes, mean and std, a sheet of images."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from arat_fast.attacks.norms import NORMS
from arat_fast.data.holdout import with_test_images
from arat_fast.data.load import check_arrays
from arat_fast.data.prepare import own_dataset
from arat_fast.datasets import DATASETS, Content
from arat_fast.datasets.base import Samples
from arat_fast.datasets.decoding import Pixels
from arat_fast.datasets.encoded import EncodedImages
from arat_fast.datasets.folder import has_class_folders
from arat_fast.datasets.members import entries, is_image
from arat_fast.datasets.npz import images_in, members_of, opened_npz
from arat_fast.datasets.prepared import IMAGES, array_folder
from arat_fast.datasets.webdataset import index_shards, is_shard
from arat_fast.files import write_atomic

OWN = {
    "folder": "images in folders by class",
    "webdataset": "WebDataset shards",
    "arrays": "arrays",
    "npz": "an .npz file of images with labels",
}
"""What a folder of one's own images is, in words."""

FIRST = 2048
"""Images of an .npz file that can be looked at."""

TILE = 96
"""Pixels of an image on the contact sheet, each way."""

SHEET = (6, 8)
"""Rows and columns of the contact sheet."""

_GENERATED = frozenset(("image.npy", "label.npy", "classes.npy"))
"""Arrays of an .npz file of generated images."""

_CAPTION = 16
_GAP = 8
_PIXELS = 2**20


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
        notes: on what is converted.
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
    notes: list[str] = field(default_factory=list)
    per_class: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: Counter[str] = field(default_factory=Counter)
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
            if self.kind == OWN["folder"] and self.counts.get("train", 0) < 1000:
                lines.append("             settings for few images: docs/tutorial-your-images.md")
            lines.append("             --data.no-flip where a mirror image is of another class")
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
        shown_sizes = ", ".join(f"{s} ({count:,})" for s, count in self.sizes.most_common(5))
        more = f", and {len(self.sizes) - 5} other sizes" if len(self.sizes) > 5 else ""
        lines.append(f"sizes        {shown_sizes}{more} (height x width)")
        if self.mean:
            lines.append("mean         " + ", ".join(f"{v:.4f}" for v in self.mean))
            lines.append("std          " + ", ".join(f"{v:.4f}" for v in self.std))
        lines += [f"converted    {note}" for note in self.notes]
        lines += [f"unreadable   {reason}" for reason in self.bad[:10]]
        if len(self.bad) > 10:
            lines.append(f"unreadable   and {len(self.bad) - 10:,} more of {len(self.bad):,}")
        return lines


def inspect(
    path: Path,
    sheet: Path | None = None,
    max_samples: int = 2000,
    follow_links: bool = False,
    *,
    radii: tuple[Path, Sequence[float]] | None = None,
) -> Inspection:
    """Find out what a dataset is.

    Args:
        path: a file or a folder.
        sheet: PNG file for the contact sheet; None for none.
        max_samples: images that are decoded for sizes, mean and std, evenly spread; >= 1.
        follow_links: also to class folders that are links.
        radii: PNG file for :func:`draw_radii`, and the radii; None for none.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is no dataset that can be read; ``max_samples`` < 1.
    """
    if max_samples < 1:
        raise ValueError(f"max_samples must be >= 1, got {max_samples}")
    if not path.exists():
        raise FileNotFoundError(f"nothing at {path}, expected a dataset's file or folder")
    found, content = _open(path, follow_links)
    classes, parts = content.classes, list(content.parts.values())
    found.classes, found.bad, found.notes = classes, list(content.bad), list(content.notes)
    for split, part in content.parts.items():
        found.counts[split] = len(part.labels)
        counted = torch.bincount(part.labels, minlength=len(classes))
        for name, count in zip(classes, counted.tolist(), strict=False):
            found.per_class.setdefault(name, {})[split] = count
    found.out_of = sum(map(len, parts))
    number = min(max_samples, found.out_of)
    spread = np.unique(np.linspace(0, found.out_of - 1, number).astype(np.int64))
    histogram = np.zeros((3, 256), np.int64)
    lost: Counter[tuple[int, int]] = Counter()
    for part, index in _places(parts, spread):
        try:
            image = part.image(index)
        except ValueError as error:
            found.bad.append(str(error))
            lost[id(part), int(part.labels[index])] += 1
            continue
        flat = image.reshape(-1, 3)
        # A piece at a time: bincount makes 8 bytes of each value.
        for start in range(0, len(flat), _PIXELS):
            for channel, values in enumerate(flat[start : start + _PIXELS].T):
                histogram[channel] += np.bincount(values, minlength=256)
        found.sizes[f"{image.shape[0]} x {image.shape[1]}"] += 1
    found.looked_at = len(spread)
    if found.sizes:
        shares = histogram / histogram.sum(1, keepdims=True)
        levels = np.arange(256) / 255
        mean = shares @ levels
        found.mean = mean.tolist()
        found.std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1)).tolist()
        sides = [min(map(int, size.split(" x "))) for size in found.sizes]
        if "folder-resnet18" in found.use and isinstance(parts[0], EncodedImages):
            from arat_fast.recipes import recipe  # As below.

            # Or they would be scaled up.
            small = max(sides) < recipe("folder-resnet18").data.image_size
            found.use += f" --data.image-size {max(sides)}" if small else ""
    if found.bad and found.use:
        found.use += f" --data.bad-images skip{'' if lost else '-strays'}"
    for part in parts:
        for label, count in enumerate(torch.bincount(part.labels, minlength=1).tolist()):
            if 0 < count <= lost[id(part), label]:
                found.use, found.note = "", f"no image with label {label} can be read in a split"
    if sheet is not None:
        draw_sheet(parts, classes, sheet)
    if radii is not None:
        draw_radii(parts, classes, radii[1], radii[0])
    return found


def _places(parts: list[Samples], numbers: npt.NDArray[np.int64]) -> list[tuple[Samples, int]]:
    """Split and number in it of images that are counted over all splits."""
    ends = np.cumsum(list(map(len, parts)))
    which = np.searchsorted(ends, numbers, side="right").tolist()
    starts = [0, *ends.tolist()]
    return [(parts[w], n - starts[w]) for w, n in zip(which, numbers.tolist(), strict=True)]


def _open(path: Path, follow_links: bool) -> tuple[Inspection, Content]:
    """What a dataset is, not yet looked at, and its splits, or one of "images"; of some only the
    first images can be looked at, as their length says."""
    if path.suffix == ".npz":
        with opened_npz(path) as archive:
            if _GENERATED.issuperset(archive.namelist()):
                found = Inspection(
                    path,
                    f"an .npz file of images; convert it with arat-fast data prepare {path} FOLDER",
                )
                # An archive is read from its start: a part of it is enough to look at.
                images = images_in(archive, path, members_of(archive, path)["train"], FIRST)
                return found, _numbered(images)
    for dataset in DATASETS.values():
        for place, kind in dataset.places.items():
            root = path.parent if path.name == Path(place).parts[0] else path
            if (root / place).exists():
                content = dataset.read(root)
                check_arrays(dataset, content)
                return Inspection(path, kind, _command(dataset.name, root)), content
    if path.is_file() and not (is_shard(path) or path.suffix == ".npz"):
        raise ValueError(
            f"{path}: expected an .npz file, a .tar shard or a folder, got another kind of file"
        )
    dataset = own_dataset(path)
    if dataset.name == "folder" and not has_class_folders(path):
        flat = [file for file in entries(path) if file.is_file() and is_image(file.name)]
        if flat:
            unlabelled = EncodedImages(flat, torch.zeros(len(flat), dtype=torch.int64))
            return Inspection(path, "images without classes"), Content({"images": unlabelled}, ())
    found = Inspection(path, OWN[dataset.name], _command(dataset.name, path))
    if follow_links:
        found.use += " --data.follow-links"
    try:
        content = dataset.load(path, follow_links=follow_links)
    except ValueError as error:
        # A shard alone, or generated images, can be a part of a dataset.
        found.use, found.note = "", str(error)
        if dataset.name == "webdataset" and path.is_file():
            shard, bad = index_shards([path])
            return found, _numbered(shard)._replace(bad=tuple(bad))
        if (path / IMAGES).is_file():
            return found, _numbered(array_folder(path))
        raise
    if content.test is None:
        try:
            content = with_test_images(content)
            found.note = "a tenth held out"
            # Arrays in one folder are a dataset or generated images.
            found.note += "; --data.unsup takes all" if dataset.name == "arrays" else ""
        except ValueError as error:
            found.use, found.note = "", str(error)
    return found, content


def _numbered(part: Samples) -> Content:
    """Images that nothing trains on alone; their classes are the labels that occur."""
    values, index = np.unique(part.labels.numpy(), return_inverse=True)
    part.labels = torch.from_numpy(index)
    return Content({"images": part}, tuple(map(str, values.tolist())))


def _command(name: str, root: Path) -> str:
    """What trains a ResNet-18 on the dataset: its own recipe, or that of images in folders."""
    from arat_fast.recipes import RECIPES  # With the command line's library.

    recipe = f"{name}-resnet18"
    chosen = [recipe] if recipe in RECIPES else ["folder-resnet18", "--data.name", name]
    return shlex.join(["arat-fast", "train", *chosen, "--data.root", str(root)])


def draw_sheet(parts: list[Samples], classes: tuple[str, ...], path: Path) -> None:
    """Write a contact sheet: images evenly spread over the splits, each with its class.

    Args:
        parts: the splits.
        classes: class names, one per label; empty for none.
        path: PNG file.
    """
    # Evenly over the classes: the images of a folder are sorted by class.
    labels = np.concatenate([part.labels[: len(part)].numpy() for part in parts])
    order = np.argsort(labels, kind="stable")
    rows, columns = SHEET
    number = min(rows * columns, len(order))
    chosen = _places(parts, order[np.linspace(0, len(order) - 1, number).astype(int)])
    rows = -(-number // columns)
    cell = (TILE + _GAP, TILE + _CAPTION + _GAP)
    columns = min(columns, number)
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font: Any = ImageFont.load_default(size=11)
    for place, (part, index) in enumerate(chosen):
        left = _GAP + place % columns * cell[0]
        top = _GAP + place // columns * cell[1]
        try:
            shown = _scaled(part.image(index), TILE, Image.Resampling.LANCZOS)
        except ValueError:
            pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=(235, 235, 235))
            pen.text((left + 6, top + 40), "unreadable", fill=(150, 30, 30), font=font)
        else:
            sheet.paste(shown, (left + (TILE - shown.width) // 2, top + (TILE - shown.height) // 2))
        caption = classes[int(part.labels[index])] if classes else ""
        while caption and pen.textlength(caption, font=font) > TILE:
            caption = caption[:-2].rstrip("…") + "…"
        pen.text((left, top + TILE + 1), caption, fill=(60, 60, 60), font=font)
    write_atomic(path, lambda file: sheet.save(file, "PNG"))


def draw_radii(
    parts: list[Samples], classes: tuple[str, ...], radii: Sequence[float], path: Path
) -> None:
    """Write images beside themselves with random signs of each radius: every pixel at the edge of
    the L∞ ball, where the perturbations of an attack are too.

    Args:
        parts: the splits; four images of the first, evenly spread, that can be read.
        classes: class names, one per label; empty for none.
        radii: in [0, 1].
        path: PNG file.

    Raises:
        ValueError: a radius is out of range.
    """
    for eps in radii:
        NORMS["Linf"].check("eps", eps)
    source = np.random.default_rng(0)
    number = min(4, len(parts[0]))
    side = 2 * TILE
    wide, high = side + _GAP, side + _GAP + _CAPTION
    size = ((1 + len(radii)) * wide + _GAP, number * high + _GAP + _CAPTION)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    write = partial(pen.text, fill=(60, 60, 60), font=ImageFont.load_default(size=12))
    for column, eps in enumerate((0.0, *radii)):
        write((_GAP + column * wide, _GAP), f"eps {255 * eps:.4g}/255" if eps else "as it is")
    for row, index in enumerate(np.linspace(0, len(parts[0]) - 1, number).astype(int).tolist()):
        try:
            image = parts[0].image(index)
        except ValueError:
            continue
        top = _GAP + _CAPTION + row * high
        write((_GAP, top), classes[int(parts[0].labels[index])] if classes else "")
        signs = source.integers(0, 2, image.shape) * 2.0 - 1
        for column, eps in enumerate((0.0, *radii)):
            pixels = (image + 255 * eps * signs).round().clip(0, 255).astype(np.uint8)
            shown = _scaled(pixels, side, Image.Resampling.NEAREST)
            sheet.paste(shown, (_GAP + column * wide, top + _CAPTION))
    write_atomic(path, lambda file: sheet.save(file, "PNG"))


def _scaled(pixels: Pixels, side: int, smaller: Image.Resampling) -> Image.Image:
    """An image whose longer edge is ``side`` pixels; ``smaller`` is how a larger one is scaled."""
    image = Image.fromarray(pixels)
    width, height = (max(round(edge * side / max(image.size)), 1) for edge in image.size)
    method = smaller if max(image.size) > side else Image.Resampling.NEAREST
    return image.resize((width, height), method)
