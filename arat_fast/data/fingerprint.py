"""Whether a dataset is the one that a run began with."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from arat_fast.datasets.base import Samples
from arat_fast.datasets.encoded import EncodedImages


class Fingerprint(NamedTuple):
    """The samples of a split as far as their batches depend on them; pixels are not looked at.

    Attributes:
        num_samples: in the split.
        sha256: of their labels and names, in order.
    """

    num_samples: int
    sha256: str


def fingerprint(labels: Tensor, names: Iterable[str] = ()) -> Fingerprint:
    """The fingerprint of samples in their order.

    Args:
        labels: (num_samples,), int64, on the CPU.
        names: of the samples, where they have some.
    """
    digest = hashlib.sha256(labels.numpy().astype("<i8").tobytes())
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
    return Fingerprint(len(labels), digest.hexdigest())


def names_below(source: Samples, root: Path) -> Iterator[str]:
    """The names of all images without the folder of their dataset, which may be moved; none of
    images in arrays, which have none."""
    if not isinstance(source, EncodedImages):
        return
    for index in range(len(source)):
        yield source.name(index).removeprefix(str(root)).replace(os.sep, "/")


def class_names(dataset: str, classes: Sequence[str]) -> tuple[str, ...]:
    """What the classes of a dataset are called; nothing where its labels are only counted, to which
    a classes.txt can give names later.

    Args:
        dataset: by its name.
        classes: as it has them, one per label.
    """
    counted = list(classes) in ([str(first + i) for i in range(len(classes))] for first in (0, 1))
    return () if counted and dataset in ("arrays", "webdataset") else tuple(classes)


def class_order(known: Sequence[str], given: Sequence[str], source: object) -> list[int] | None:
    """Which label of a network each label of some images is.

    Args:
        known: the network's class names in the order of its logits; empty where it has none.
        given: those of the images.
        source: where the network comes from, for the error.

    Returns:
        For each of ``given`` its place in ``known``; None where the order is the same, or nothing
        is known.

    Raises:
        ValueError: they are other classes, so that a label means something else.
    """
    ours, theirs = ([unicodedata.normalize("NFC", name) for name in n] for n in (known, given))
    if not ours or ours == theirs:
        return None
    if sorted(ours) != sorted(theirs):
        only = (sorted({*a} - {*b}) for a, b in ((ours, theirs), (theirs, ours)))
        lacking, instead = (f"{', '.join(n[:3])}{', …' * (len(n) > 3)}" or "none" for n in only)
        raise ValueError(
            f"{source} was trained on other classes, so that a label means something else: only "
            f"there {lacking}; only here {instead}; name the classes as in the training, or give "
            "other images"
        )
    return [ours.index(name) for name in theirs]
