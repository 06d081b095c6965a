"""What lies in a folder or an archive beside the images of a dataset: harmless, or to be named."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from arat_fast.files import read_lines

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""Names of image files end in one of these, in any case."""

DESCRIPTIONS = frozenset(
    (".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".xml", ".html")
    + (".pdf", ".log", ".cff", ".bib", ".md5", ".sha256")
)
"""Files about a dataset, beside what it holds, end in one of these, in any case."""

CLASSES = "classes.txt"
"""Beside shards or arrays: the names of the classes, a name a line."""

_CLUTTER = re.compile(
    r"\..*|__macosx|@eadir|#recycle|\$recycle\.bin|system volume information|lost\+found"
    r"|(eh)?thumbs(_vista)?\.db|_?desktop\.ini|icon\r",
    re.IGNORECASE | re.DOTALL,
)
_DOCUMENT = re.compile(r"(readme|licen[cs]e|copying|notice)(\.(txt|md|rst))?", re.IGNORECASE)

_BESIDE = re.compile(
    # What torchvision keeps beside ImageNet's train and val.
    r"ilsvrc2012_(devkit_t12\.tar\.gz|img_(train|val|test)\w*\.tar)|meta\.bin"
    r"|(md5|sha\d+)sums?|checksums",
    re.IGNORECASE,
)


def is_clutter(name: str) -> bool:
    """Whether a path, as a folder or an archive has it, is hidden or left there by a system, or
    lies in a folder that is."""
    return any(_CLUTTER.fullmatch(part) for part in PurePosixPath(name).parts if part != "..")


def is_document(name: str) -> bool:
    """Whether a file is one that archives bring along (README, LICENSE, ...)."""
    return bool(_DOCUMENT.fullmatch(PurePosixPath(name).name))


def is_description(name: str) -> bool:
    """Whether a file is about the dataset, rather than a part of it."""
    file = PurePosixPath(name)
    known = is_document(name) or _BESIDE.fullmatch(file.name) is not None
    return known or file.suffix.lower() in DESCRIPTIONS


def is_image(name: str) -> bool:
    """Whether the name of a file is an image's."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, but for clutter."""
    found = (Path(entry.path) for entry in os.scandir(folder) if not is_clutter(entry.name))
    return sorted(found)


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, but for clutter."""
    return [entry for entry in entries(folder) if entry.is_dir()]


def files_below(folder: Path) -> list[Path]:
    """The files below a folder at any depth, sorted, but for clutter; links to folders, which are
    not followed, are among them."""
    found = []
    for base, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(base, name))]
        folders[:] = [name for name in folders if not is_clutter(name)]
        found += [Path(base, name) for name in names + links if not is_clutter(name)]
    return sorted(found)


def strays(folder: Path, used: Iterable[Path], expected: str) -> list[str]:
    """What lies in a folder beside that which is used and is not about the dataset either.

    Args:
        folder: the folder.
        used: entries of it that are a part of the dataset.
        expected: what is read from the folder, for the messages.

    Returns:
        a message for each file, and for each folder with such files.
    """
    known, found = set(used), []
    for entry in entries(folder):
        if entry in known:
            continue
        files = files_below(entry) if entry.is_dir() else [entry]
        others = [file for file in files if not is_description(file.name)]
        if others:
            inside = f" with {len(others):,} files" if entry.is_dir() else ""
            found.append(f"{entry}: expected {expected}, got this{inside} beside them")
    return found


def class_name(name: str) -> str:
    """A name, of whose Unicode forms some systems write one and some another.

    Raises:
        ValueError: it is not UTF-8, and could not be written.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r}: expected a name in UTF-8, got another encoding") from error
    return unicodedata.normalize("NFC", name)


def read_classes(folder: Path) -> tuple[str, ...] | None:
    """The names of the classes in a folder's :data:`CLASSES`; None where it has no such file.

    Raises:
        ValueError: it is not UTF-8, a line between others is empty, or a name comes twice.
    """
    path = folder / CLASSES
    if not path.is_file():
        return None
    names = [class_name(line.strip()) for line in read_lines(path)]
    while names and not names[-1]:
        names.pop()
    for number, name in enumerate(names, 1):
        if not name or names.index(name) < number - 1:
            problem = f"{name} again" if name else "an empty line"
            raise ValueError(f"{path}: line {number}: expected a class's name, got {problem}")
    return tuple(names)


def told(reasons: Sequence[str]) -> str:
    """The first of several reasons, and how many more there are."""
    more = f" (and {len(reasons) - 1:,} files more)" if len(reasons) > 1 else ""
    return reasons[0] + more
