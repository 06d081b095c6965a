"""Whether a dataset is the one that a run began with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
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
