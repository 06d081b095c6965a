"""Batches of a Dataset or DataLoader of anybody's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from arat_fast.data.batches import Batch, Batches
from arat_fast.data.fingerprint import Fingerprint
from arat_fast.data.load import DataSplits
from arat_fast.data.loader import Workers
from arat_fast.data.plan import WHOLE, BatchPlan, Shard, seeded_generator
from arat_fast.datasets.encoded import default_workers
from arat_fast.models.features import logits_of

Given: TypeAlias = "Dataset[Any] | DataLoader[Any]"
"""Of pairs of an image and a label: an image is a tensor (C, H, W), float in [0, 1] or uint8, or a
PIL image; a label an integer. A DataLoader's batches are (N, C, H, W) and (N,)."""


def given_splits(
    train: Given,
    test: Given,
    val: Given | None = None,
    *,
    batch_size: int,
    eval_batch_size: int,
    seed: int,
    device: torch.device,
    num_workers: int = 0,
    shard: Shard = WHOLE,
    model: nn.Module | None = None,
) -> DataSplits:
    """What a run trains and is evaluated on, from the caller's own data.

    A Dataset is shuffled by the seed, and read in ``num_workers`` processes; a DataLoader gives its
    own batches in its own order, which a resumed run cannot repeat.

    Args:
        train, test, val: the images; nothing is cropped or mirrored but by them.
        batch_size, eval_batch_size: of Datasets.
        seed: of the order.
        device: where the batches go.
        num_workers: processes that read a Dataset, at most one for a core.
        shard: this process.
        model: tells the number of classes where ``train`` has no attribute ``classes``.

    Raises:
        ValueError: an image or a label does not fit, or the number of classes is not known.
    """
    for data in (train, test, val):
        if isinstance(data, DataLoader) and (
            data.batch_size is None or not isinstance(data.sampler, Sized)
        ):
            raise ValueError("a DataLoader with a batch_size and a length is expected")
    if isinstance(train, DataLoader):
        x, _ = _tensors(next(iter(train)))
    else:
        x, _ = _collated([train[0]])
    shape = (x.shape[1], x.shape[2], x.shape[3])
    classes = _classes(train, model, x)
    seeds = seed, seeded_generator(seed, 1).initial_seed()

    def make(data: Given, batch_size: int, seed: int | None) -> Batches:
        read: Callable[[int, int], Iterator[Any]]
        if isinstance(data, DataLoader):
            if shard.world_size > 1:
                raise ValueError(
                    "several processes share a Dataset, got a DataLoader: pass its own"
                )
            size, sampler = data.batch_size, data.sampler
            assert size is not None and isinstance(sampler, Sized)
            number = len(data) * size if data.drop_last else len(sampler)
            plan, read = BatchPlan(number, size), partial(_next_batches, data)
        else:
            own, shuffle = (WHOLE, False) if seed is None else (shard, True)
            plan = BatchPlan(_length(data), batch_size, shuffle=shuffle, seed=seed or 0, shard=own)
            workers = min(num_workers, default_workers())
            read = Workers(_Read(data, plan), plan, workers, device).run
        return GivenBatches(read, plan, classes, shape, device)

    training, probe = (make(train, batch_size, s) for s in seeds)
    validated = None if val is None else make(val, eval_batch_size, None)
    tested = make(test, eval_batch_size, None)
    return DataSplits(
        training, probe, validated, tested, Fingerprint(training.num_samples, "given")
    )


class GivenBatches(Batches):
    """Of a Dataset the batches of a plan, of a DataLoader the next ones, whatever the epoch.

    Args:
        read: the batches of an epoch from one on.
        plan, classes, image_shape: as of :class:`Batches`.
        device: where they go.
    """

    def __init__(
        self,
        read: Callable[[int, int], Iterator[tuple[Tensor, Tensor]]],
        plan: BatchPlan,
        classes: tuple[str, ...],
        image_shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        super().__init__(plan, classes, image_shape)
        self._read = read
        self._device = device

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """As :meth:`Batches.epoch`."""
        for x, y in self._read(epoch, start_batch):
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"labels must lie in [0, {self.num_classes - 1}], got {low} to {high}"
                )
            yield Batch(x.to(self._device), y.to(self._device))


def _next_batches(
    loader: DataLoader[Any], epoch: int, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    return map(_tensors, islice(loader, start, None))


class _Read(Dataset[tuple[Tensor, Tensor]]):
    """Batches by their epoch and number."""

    def __init__(self, data: Dataset[Any], plan: BatchPlan) -> None:
        self.data, self.plan = data, plan

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return _collated([self.data[i] for i in self.plan.samples(*place).tolist()])


def images_and_labels(data: Given, max_samples: int = 0) -> tuple[Tensor, Tensor]:
    """All images, or the first ones, as (N, C, H, W) float32 and (N,) int64, on the CPU.

    Args:
        data: the pairs.
        max_samples: 0 for all.
    """
    if not isinstance(data, DataLoader):
        number = min(max_samples or _length(data), _length(data))
        return _collated([data[i] for i in range(number)])
    batches, seen = [], 0
    for batch in data:
        batches.append(_tensors(batch))
        seen += len(batches[-1][1])
        if max_samples and seen >= max_samples:
            break
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return (x[:max_samples], y[:max_samples]) if max_samples else (x, y)


def _collated(pairs: list[Any]) -> tuple[Tensor, Tensor]:
    images = [_image(image) for image, _ in pairs]
    return _tensors(default_collate(list(zip(images, (y for _, y in pairs), strict=True))))


def _image(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    pixels = torch.from_numpy(np.array(image))
    # A PIL image: rows, columns, then channels where there are several.
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _tensors(batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if x.ndim != 4 or y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(
            "images (C, H, W), each with an integer label, are expected, got batches of shape "
            f"{tuple(x.shape)} and labels {y.dtype} of shape {tuple(y.shape)}"
        )
    return x, y.long()


def _length(data: Any) -> int:
    if not isinstance(data, Sized):
        raise ValueError(f"a Dataset with a length is expected, got {type(data).__name__}")
    return len(data)


def _classes(data: Any, model: nn.Module | None, x: Tensor) -> tuple[str, ...]:
    """Names of the classes: the Dataset's, also of one that others wrap, else numbers."""
    while data is not None:
        if getattr(data, "classes", None):
            return tuple(str(name) for name in data.classes)
        data = getattr(data, "dataset", None)
    if model is None:
        raise ValueError("train_data has no attribute classes: give it one, or pass a model")
    logits = logits_of(model, x[:1].to(next(model.parameters()).device))
    return tuple(str(number) for number in range(logits.shape[1]))
