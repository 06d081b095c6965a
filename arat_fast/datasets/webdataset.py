"""Images of one's own in WebDataset's tar shards, which are read where they lie."""

from __future__ import annotations

import codecs
import tarfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.encoded import EncodedImages
from arat_fast.datasets.members import (
    CLASSES,
    IMAGE_SUFFIXES,
    files_below,
    is_clutter,
    is_description,
    is_document,
    is_image,
    read_classes,
    told,
)
from arat_fast.datasets.rows import HIGHEST_LABEL
from arat_fast.datasets.splits import own_content, splits_in_name

_END = 1024
"""Bytes of zeros at the end of a tar archive, at least."""

_LONGEST = 64
"""Bytes of a label, at most."""


def tar_shards(root: Path) -> Content:
    """WebDataset shards, each with its split (train, val or test) as a word of its name or of its
    folder's; a sample is KEY.jpg (or another image) and KEY.cls, its label as a number.

    Where no name says a split, all are trained on. ROOT/classes.txt, a name a line, names the
    classes; without it they are called by their numbers. Other members are in ``bad``, but for
    clutter, documents and files about a sample (KEY.json).

    Args:
        root: the folder, or one archive.

    Raises:
        FileNotFoundError: no archive is there.
        ValueError: an archive is compressed, cut short or no tar; it has no image with a label; two
            images or labels of one sample; only some names say a split; as for
            :func:`arat_fast.datasets.splits.own_content`.
    """
    if root.is_file():
        shards, bad, folder = {"train": [root]}, [], root.parent
    else:
        shards, bad, folder = _shards_by_split(root), _strays(root), root
    parts = {}
    for split, paths in shards.items():
        parts[split], others = index_shards(paths)
        bad += others
    return own_content(root, parts, read_classes(folder), bad)


def _strays(root: Path) -> list[str]:
    """What is wrong with the files beside the shards."""
    bad = []
    for file in files_below(root):
        # DALI's index of a shard.
        index = file.suffix == ".idx" and file.with_suffix(".tar").is_file()
        if file.name == CLASSES and file.parent != root:
            bad.append(f"{file}: expected the names of the classes in {root / CLASSES}")
        elif not (is_shard(file) or index or is_description(file.name)):
            bad.append(f"{file}: expected .tar archives, got another kind of file")
    return bad


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
    return found


def is_shard(path: Path) -> bool:
    """Whether a file is called an archive."""
    return path.suffix.lower() == ".tar"


def tar_files(root: Path) -> list[Path]:
    """The archives below a folder, sorted."""
    return [path for path in files_below(root) if is_shard(path)]


def index_shards(shards: Sequence[Path]) -> tuple[EncodedImages, list[str]]:
    """The images of tar shards, and what is wrong with the other members.

    Args:
        shards: the archives.

    Raises:
        ValueError: as for :func:`tar_shards`, as far as an archive alone shows it.
    """
    members, names, labels, bad = [], [], [], []
    for number, shard in enumerate(shards):
        samples, others = _tar_samples(shard)
        bad += others or [f"{shard}: expected images with labels, got none"] * (not samples)
        for member, label in samples:
            members.append((number, member.offset_data, member.size))
            names.append(member.name)
            labels.append(label)
    if not names:
        raise ValueError(told(bad))
    index = np.array(members, np.int64).reshape(-1, 3)
    return EncodedImages(shards, torch.tensor(labels), index, names), bad


def _tar_samples(shard: Path) -> tuple[list[tuple[tarfile.TarInfo, int]], list[str]]:
    """The images of an archive with their labels, and what is wrong with its other members."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    others: list[tuple[str, str]] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                # Of a pair one name may be in another Unicode form, and its key can have dots.
                path = PurePosixPath(unicodedata.normalize("NFC", member.name).lstrip("/"))
                name, key = str(path), str(path.parent / path.stem)
                if member.isdir() or is_clutter(name) or is_document(name):
                    continue
                if not member.isfile():
                    others.append(("", f"{name} is a link or a device, expected a file"))
                elif is_image(name):
                    if key in images:
                        raise ValueError(
                            f"{shard}: expected one image for the key {key}, got "
                            f"{images[key].name} and {name}"
                        )
                    images[key] = member
                elif path.suffix.lower() == ".cls":
                    if key in labels:
                        raise ValueError(f"{shard}: expected {name} once, got it twice")
                    labels[key] = _label(tar, member, shard)
                else:
                    about = key if is_description(name) else ""
                    others.append((about, f"{name} is neither an image nor a label"))
            _check_end(shard, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{shard}: expected an uncompressed tar archive, but reading it fails: {error}"
        ) from error
    paired = images.keys() & labels.keys()
    suffixes = ", ".join(IMAGE_SUFFIXES)
    bad = [reason for key, reason in others if key not in paired]
    bad += [f"{images[k].name} has no label, expected {k}.cls" for k in images if k not in paired]
    bad += [f"{k}.cls has no image, expected one of {suffixes}" for k in labels if k not in paired]
    samples = [(member, labels[key]) for key, member in images.items() if key in paired]
    return samples, [f"{shard}: {reason}" for reason in bad]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = tar.extractfile(member)
    assert file is not None
    text = file.read(_LONGEST).removeprefix(codecs.BOM_UTF8).strip()
    if member.size > _LONGEST or not text.isdigit() or int(text) > HIGHEST_LABEL:
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
