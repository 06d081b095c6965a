"""Datasets loaded in few words, and what is compared of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arat_fast.config import DataConfig
from arat_fast.data import Batches, DataSplits, load_data
from arat_fast.data.dali import has_dali

CPU = torch.device("cpu")
needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
LOADERS = ["dataloader", pytest.param("dali", marks=needs_dali)]


def load(name: str, root: Path = Path("unused"), **options: Any) -> DataSplits:
    """A dataset by one loader; some options are those of ``load_data``."""
    own: dict[str, Any] = {"device": CPU, "seed": 0}
    names = ("device", "seed", "shard", "bad_images_found", "memory_format")
    own |= {key: options.pop(key) for key in names if key in options}
    own["bad_images"] = own.pop("bad_images_found", None)
    defaults = {"batch_size": 6, "image_size": 24, "num_workers": 0, "loader": "dataloader"}
    config = DataConfig(name=name, root=root, **{**defaults, **options})
    return load_data(config, eval_batch_size=7, **own)


def collect(batches: Batches, epoch: int = 0) -> tuple[Tensor, Tensor]:
    """The images and labels of an epoch."""
    parts = list(batches.epoch(epoch))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def levels(x: Tensor) -> Tensor:
    """Pixels as uint8."""
    return (255 * x).round().to(torch.uint8)


def same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether these are the same batches, bit for bit."""
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(a, b, strict=True)
    )


@contextmanager
def refused(message: str) -> Iterator[None]:
    """Expects an error for the user, of one line."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        yield
    assert "\n" not in str(error.value)
