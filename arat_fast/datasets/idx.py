"""MNIST and what is published in its format: Fashion-MNIST, KMNIST, EMNIST (balanced)."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arat_fast.datasets.base import Content, Dataset, register
from arat_fast.datasets.published import fetch, fetch_folder, require_folder
from arat_fast.datasets.rows import Images


@dataclass(frozen=True)
class _Source:
    """Where the files of a dataset lie and how they are called.

    Attributes:
        torchvision: torchvision's class, which has their addresses, checksums and class names.
        prefix: before "train-images-idx3-ubyte" and so on.
        transposed: images are stored column by column.
        test: instead of "train" for the images to evaluate.
    """

    torchvision: str
    label: str
    num_classes: int = 10
    prefix: str = ""
    transposed: bool = False
    test: str = "t10k"


SOURCES = {
    "mnist": _Source("MNIST", "MNIST"),
    "fashion-mnist": _Source("FashionMNIST", "Fashion-MNIST"),
    "kmnist": _Source("KMNIST", "KMNIST"),
    "emnist": _Source("EMNIST", "EMNIST, balanced", 47, "emnist-balanced-", True, "test"),
}


def _torchvision(source: _Source) -> Any:
    from torchvision import datasets

    return getattr(datasets, source.torchvision)


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An array of bytes in IDX format.

    Args:
        path: the file without .gz; where it is absent, the compressed one beside it is read.

    Returns:
        the array in its own shape.

    Raises:
        FileNotFoundError: neither of them is there.
        ValueError: it holds something else, or another number of bytes than its header promises.

    Source: http://yann.lecun.com/exdb/mnist, "The IDX file format".
    """
    packed = path.with_name(path.name + ".gz")
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{packed}: expected a gzip file, got {error}") from error
    # Two zero bytes, the type of unsigned bytes, the number of dimensions and these.
    ndim = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * ndim
    if not 1 <= ndim <= 3 or len(content) < start:
        raise ValueError(f"{path}: expected an IDX file of bytes, got one that begins otherwise")
    shape = tuple(np.frombuffer(content, ">u4", ndim, 4).tolist())
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path}: expected {math.prod(shape):,} bytes after its header, got "
            f"{len(content) - start:,}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _read(name: str, root: Path) -> Content:
    source = SOURCES[name]
    first = f"{source.prefix}train-images-idx3-ubyte"
    places = [root / place for place in (*_folders(name), ".")]
    found = [place for place in places if any(place.glob(f"{first}*"))]
    if not found:
        require_folder(places[0], name)
        raise FileNotFoundError(f"no dataset file at {places[0] / first}, nor with .gz behind it")
    files = {"train": "train", "test": source.test}
    parts = {split: _images(source, found[0], file) for split, file in files.items()}
    dataset = _torchvision(source)
    names = dataset.classes_split_dict["balanced"] if name == "emnist" else dataset.classes
    return Content(parts, tuple(names))


def _folders(name: str) -> tuple[str, ...]:
    """Below the root: torchvision's folder, its archive's, and Debian's."""
    raw = f"{SOURCES[name].torchvision}/raw"
    return raw, f"{raw}/gzip", name


def _images(source: _Source, folder: Path, split: str) -> Images:
    path = folder / f"{source.prefix}{split}-images-idx3-ubyte"
    pixels = read_idx(path)
    labels = read_idx(folder / f"{source.prefix}{split}-labels-idx1-ubyte")
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"{path}: expected images (N, height, width) and as many labels, got {pixels.shape} "
            f"and {labels.shape}"
        )
    if source.transposed:
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 1))
    return Images(pixels[..., None], torch.from_numpy(labels.astype(np.int64)))


def _fetch(name: str, root: Path) -> None:
    dataset = _torchvision(SOURCES[name])
    raw = root / SOURCES[name].torchvision / "raw"
    if name == "emnist":
        fetch_folder(dataset.url, raw / "gzip.zip", dataset.md5, raw / "gzip")
        return
    for file, md5 in dataset.resources:
        # The last mirror is the one of torchvision or of the authors.
        fetch(f"{dataset.mirrors[-1]}{file}", raw / file, md5)


for _name, _source in SOURCES.items():
    register(
        Dataset(
            _name,
            partial(_read, _name),
            partial(_fetch, _name),
            image_size=28,
            channels=1,
            num_classes=_source.num_classes,
            label=_source.label,
            places={
                f"{folder}/{_source.prefix}train-images-idx3-ubyte{packed}": _source.label
                for folder in _folders(_name)
                for packed in ("", ".gz")
            },
        )
    )
