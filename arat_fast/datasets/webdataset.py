"""Images of one's own in WebDataset's tar shards, which are read where they lie."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from arat_fast.datasets.base import Content, Dataset, Samples, register
from arat_fast.datasets.encoded import IMAGE_SUFFIXES, TarImages
from arat_fast.datasets.rows import HIGHEST_LABEL
from arat_fast.datasets.splits import count_classes, in_order, splits_in_name

_END = 1024
"""Bytes of zeros at the end of a tar archive, at least."""


def tar_shards(root: Path) -> Content:
    """WebDataset shards, each with its split (train, val or test) as a word of its name or of its
    folder's; a sample is KEY.jpg (or another image) and KEY.cls, its label as a number.

    Where no name says a split, all are trained on. ROOT/classes.txt, a name a line, names the
    classes; without it they are called by their numbers.

    Args:
        root: the folder, or one archive.

    Raises:
        FileNotFoundError: no archive is there.
        ValueError: an archive is compressed, cut short or no tar; an image without a label or a
            label without an image; two images of one sample; a class without training images; a
            label that ``classes.txt`` does not have; only some names say a split.
    """
    shards = {"train": [root]} if root.is_file() else _shards_by_split(root)
    parts: dict[str, Samples] = {split: index_shards(paths) for split, paths in shards.items()}
    num_classes = count_classes(root, parts)
    classes = tuple(map(str, range(num_classes)))
    names = (root if root.is_dir() else root.parent) / "classes.txt"
    if names.is_file():
        lines = map(str.strip, names.read_text(encoding="utf-8").split("\n"))
        classes = tuple(line for line in lines if line)
        if len(classes) != num_classes:
            raise ValueError(
                f"{names}: expected a name for each of the labels 0 to {num_classes - 1} that "
                f"{root} has images to train on of, got {len(classes)} names"
            )
    return Content.of_splits(parts, classes)


def _shards_by_split(root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in tar_files(root):
        name = path.relative_to(root).as_posix()
        splits = sorted(splits_in_name(name))
        if len(splits) > 1:
            raise ValueError(
                f"{path}: expected the name of one split at most, got {' and '.join(splits)}"
            )
        found.setdefault("".join(splits), []).append(path)
    if not found:
        raise FileNotFoundError(f"no .tar archive to train on in {root}")
    if set(found) == {""}:
        return {"train": found[""]}
    if "" in found or "train" not in found:
        path = (found.get("") or next(iter(found.values())))[0]
        problem = "only others have" if "" in found else "none to train on is there"
        raise ValueError(
            f"{path}: expected the word train, val or test in the names of all archives or of "
            f"none, and train in some; {problem}"
        )
    return in_order(found)


def tar_files(root: Path) -> list[Path]:
    """The archives below a folder, sorted; hidden ones are passed over."""
    return sorted(path for path in root.rglob("*.tar") if not path.name.startswith("."))


def index_shards(shards: Sequence[Path]) -> TarImages:
    """The images of tar shards.

    Args:
        shards: the archives.

    Raises:
        ValueError: as for :func:`tar_shards`, as far as an archive alone shows it.
    """
    members, names, labels = [], [], []
    for number, shard in enumerate(shards):
        for name, (start, size), label in _tar_samples(shard):
            members.append((number, start, size))
            names.append(name)
            labels.append(label)
    if not names:
        raise ValueError(f"{shards[0]}: expected images with labels, got none")
    index = np.array(members, np.int64).reshape(-1, 3)
    return TarImages(shards, index, names, torch.tensor(labels, dtype=torch.int64))


def _tar_samples(shard: Path) -> list[tuple[str, tuple[int, int], int]]:
    """Name, place and label of each image in an archive."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}".lstrip("/"), f".{suffix.lower()}"
                if suffix in IMAGE_SUFFIXES:
                    other = images.setdefault(key, member)
                    if other is not member:
                        raise ValueError(
                            f"{shard}: expected one image for the key {key}, got {other.name} and "
                            f"{member.name}"
                        )
                elif suffix == ".cls":
                    if key in labels:
                        raise ValueError(f"{shard}: expected {member.name} once, got it twice")
                    labels[key] = _label(tar, member, shard)
            _check_end(shard, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{shard}: expected an uncompressed tar archive, but reading it fails: {error}"
        ) from error
    for key in sorted(images.keys() ^ labels.keys()):
        if key in images:
            raise ValueError(f"{shard}: {images[key].name} has no label, expected {key}.cls")
        raise ValueError(
            f"{shard}: {key}.cls has no image, expected one of {', '.join(IMAGE_SUFFIXES)}"
        )
    return [(m.name, (m.offset_data, m.size), labels[key]) for key, m in images.items()]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = tar.extractfile(member)
    assert file is not None
    text = file.read(32).strip()
    if not text.isdigit() or int(text) > HIGHEST_LABEL:
        raise ValueError(
            f"{shard}: {member.name} holds {text!r}, expected a label in [0, {HIGHEST_LABEL}]"
        )
    return int(text)


def _check_end(shard: Path, end: int) -> None:
    """tarfile takes any header that it cannot read for the end: damage, the end of the first of
    several archives in a row, the end of a file that was cut between two members."""
    with shard.open("rb") as file:
        file.seek(end)
        mark = file.read(_END)
        if len(mark) < _END:
            raise ValueError(f"{shard}: the end of the archive is missing: it was cut short")
        while mark:
            if any(mark):
                raise ValueError(
                    f"{shard}: expected nothing after the end of the archive at byte {end}, got "
                    "more: it is damaged, or several archives in a row"
                )
            mark = file.read(2**20)


register(Dataset("webdataset", tar_shards, own=True))
