"""What a dataset is, and the registry of those that have a name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch

from arat_fast.datasets.encoded import EncodedImages
from arat_fast.datasets.rows import Images

Samples: TypeAlias = Images | EncodedImages


def without(part: Samples, numbers: Collection[int]) -> Samples:
    """The images of a split that are not among ``numbers``, in their order."""
    if not numbers:
        return part
    kept = torch.ones(len(part), dtype=torch.bool)
    kept[list(numbers)] = False
    return part.subset(torch.nonzero(kept)[:, 0])


class Content(NamedTuple):
    """What the files of a dataset hold.

    Attributes:
        parts: images in arrays, or encoded ones, by split: "train"; "test", where it has images to
            evaluate; "val", where it has both these and others to validate with.
        classes: class names, one per label.
        bad: what else lies there and was left out, and why.
        notes: on what was converted, in words.
        max_value: the uint8 value that stands for 1.0.
    """

    parts: Mapping[str, Samples]
    classes: tuple[str, ...]
    bad: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    max_value: int = 255

    @property
    def train(self) -> Samples:
        """The images to train on."""
        return self.parts["train"]

    @property
    def val(self) -> Samples | None:
        """The images to validate with; None where there are none apart from those to evaluate."""
        return self.parts.get("val")

    @property
    def test(self) -> Samples | None:
        """The images to evaluate; None where there are none."""
        return self.parts.get("test")

    def with_parts(self, parts: Mapping[str, Samples], note: str = "") -> Content:
        """With these instead of its splits, or beside them, and another note."""
        notes = (*self.notes, note) if note else self.notes
        return self._replace(parts={**self.parts, **parts}, notes=notes)


@dataclass(frozen=True)
class Dataset:
    """A dataset that can be asked for by its name.

    Args:
        name: as ``--data.name`` says it.
        read: what its files below a root hold; FileNotFoundError where they are absent, ValueError
            where they hold something else. Heavy libraries are imported in there.
        fetch: downloads it into a root; None where nobody publishes it.
        image_size: height and width of all images, which are kept as arrays; None for images of
            any size, or where only the files say it.
        channels: of an image.
        num_classes: number of classes; None where only the files say it.
        crop: what image files are cut to by default; None where images are in arrays.
        own: images of one's own, which differ with the place where they lie.
        places: what lies in its root, and what the dataset is then, in words.
        label: what a report calls it; the name by default.
        linked: as ``read``, which follows the links that that refuses; None where it refuses none.
    """

    name: str
    read: Callable[[Path], Content]
    fetch: Callable[[Path], None] | None = None
    image_size: int | None = None
    channels: int = 3
    num_classes: int | None = None
    crop: Literal["pad", "resized"] | None = "resized"
    own: bool = False
    places: Mapping[str, str] = field(default_factory=dict)
    label: str = ""
    linked: Callable[[Path], Content] | None = None

    def load(self, root: Path, download: bool = False, follow_links: bool = False) -> Content:
        """What its files hold, fetched first where they are absent or damaged.

        Args:
            root: the folder of the datasets; of one's own images their folder.
            download: fetch them.
            follow_links: also to class folders that are links.

        Raises:
            FileNotFoundError: it is absent, or could not be downloaded.
            ValueError: a file is not the published one, or holds something else.
        """
        root = root.expanduser()
        read = self.linked if follow_links and self.linked is not None else self.read
        try:
            return read(root)
        except (FileNotFoundError, ValueError):
            if self.fetch is None or not download:
                raise
        self.fetch(root)
        return read(root)


DATASETS: dict[str, Dataset] = {}
"""Those that have registered themselves, by name."""


def register(dataset: Dataset) -> None:
    """Let a dataset be found by its name."""
    DATASETS[dataset.name] = dataset
