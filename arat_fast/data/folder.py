"""Image files decoded on the fly, for datasets that are too large to stay on the device."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from arat_fast.data.batches import Batch
from arat_fast.data.plan import WHOLE, BatchPlan, Shard, seeded_generator


class FolderBatches:
    """A dataset of image files; augmentation is a random crop and a flip.

    Images are converted to RGB. Order depends on the seed and the epoch, the augmentation of an
    image on the seed, the epoch and its place in ``samples``: neither depends on ``num_workers``.

    Args:
        samples: (file, label) of each image; labels in [0, number of classes).
        classes: class names, one per label.
        batch_size: samples in a batch, over all ranks; the last one of an epoch can differ
            (:class:`arat_fast.data.plan.BatchPlan`).
        image_size: height and width of the crops, in pixels.
        device: where the batches go.
        shuffle: new order in each epoch.
        random_crop: crop at a random place, otherwise in the centre. Zeros are added on both sides
            of an image that is smaller than the crop.
        padding: pixels of zeros around the image before a random crop.
        flip: mirror half of the images horizontally.
        seed: of order and augmentation.
        shard: this process.
        num_workers: processes that decode; 0 decodes in this one.

    Raises:
        ValueError: an argument out of range, now; a file that is no readable image, when its batch
            is made.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        classes: tuple[str, ...],
        *,
        batch_size: int,
        image_size: int,
        device: torch.device,
        shuffle: bool = False,
        random_crop: bool = False,
        padding: int = 0,
        flip: bool = False,
        seed: int = 0,
        shard: Shard = WHOLE,
        num_workers: int = 0,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be >= 1, got {image_size}")
        self.plan = BatchPlan(len(samples), batch_size, shuffle=shuffle, seed=seed, shard=shard)
        for path, label in samples:
            if not 0 <= label < len(classes):
                raise ValueError(
                    f"labels must lie in [0, {len(classes) - 1}], got {label} for {path}"
                )
        self.samples = tuple(samples)
        self.num_samples = len(samples)
        self.classes = classes
        self.num_classes = len(classes)
        self.image_shape = (3, image_size, image_size)
        self.image_size = image_size
        self.device = device
        self.random_crop = random_crop
        self.padding = padding
        self.flip = flip
        self.seed = seed
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.plan)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``epoch`` (>= 0), from batch ``start_batch`` on."""
        remaining = range(start_batch, len(self))
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            _Epoch(self, epoch),
            batch_size=None,
            sampler=remaining,
            num_workers=min(self.num_workers, len(remaining)),
            pin_memory=on_gpu,
            worker_init_fn=_leave_signals_to_the_parent,
            # Otherwise a number is drawn from the global generator, once per epoch.
            generator=seeded_generator(self.seed, epoch),
        )
        for images, labels, error in loader:
            if error:
                raise ValueError(error)
            x = images.to(self.device, non_blocking=on_gpu).to(torch.float32) / 255
            yield Batch(x, labels.to(self.device, non_blocking=on_gpu))

    def load_image(self, index: int, epoch: int) -> Tensor:
        """One image of an epoch, augmented: (3, image_size, image_size), uint8.

        Raises:
            ValueError: the file is no image that can be read.
        """
        image = read_image(self.samples[index][0])
        size = self.image_size
        height, width = image.shape[:2]
        if not self.random_crop and not self.flip:
            return _crop(image, _centre(height, size), _centre(width, size), size)
        generator = seeded_generator(self.seed, epoch, index)
        top, left = _centre(height, size), _centre(width, size)
        if self.random_crop:
            top = _random_offset(height, size, self.padding, generator)
            left = _random_offset(width, size, self.padding, generator)
        crop = _crop(image, top, left, size)
        if self.flip and bool(torch.rand((), generator=generator) < 0.5):
            crop = crop.flip(2)
        return crop


class _Epoch(Dataset[tuple[Tensor, Tensor, str]]):
    """The batches of one epoch by their number: images, labels and the error, if there was one.

    An exception in a worker would reach the user as a traceback of many lines.
    """

    def __init__(self, batches: FolderBatches, epoch: int) -> None:
        self.batches = batches
        self.epoch = epoch
        self.order = batches.plan.order(epoch)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, str]:
        batches = self.batches
        chosen = self.order[batches.plan.places(number)].tolist()
        labels = torch.tensor([batches.samples[index][1] for index in chosen])
        try:
            images = [batches.load_image(index, self.epoch) for index in chosen]
        except ValueError as error:
            return torch.empty(0), labels, str(error)
        return torch.stack(images), labels, ""


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C reaches the workers too, and a fork inherits the trainer's handlers: the batch under
    # way must still arrive, and a worker that is told to terminate must do so.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def read_image(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """Decode a file as RGB: (height, width, 3).

    Raises:
        ValueError: the file is absent, cut short or no image; the message names it.
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    # Pillow reports damage as any of these, depending on the format and on where the damage is.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: expected an image file, but reading it fails: {reason}"
        ) from error


def _centre(length: int, size: int) -> int:
    """Where a centred crop starts; negative where it is longer than the image."""
    return round((length - size) / 2) if length >= size else -((size - length) // 2)


def _random_offset(length: int, size: int, padding: int, generator: torch.Generator) -> int:
    """Where a random crop of the padded image starts, counted from the image itself."""
    padding += max(size - length - 2 * padding, 0)
    places = length + 2 * padding - size + 1
    return int(torch.randint(places, (), generator=generator)) - padding


def _crop(image: npt.NDArray[np.uint8], top: int, left: int, size: int) -> Tensor:
    """(size, size) pixels of a (height, width, 3) image, zeros outside it, as (3, size, size)."""
    crop = np.zeros((3, size, size), np.uint8)
    height, width = image.shape[:2]
    rows, columns = _overlap(top, size, height), _overlap(left, size, width)
    inside = image[rows.start : rows.stop, columns.start : columns.stop].transpose(2, 0, 1)
    crop[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = inside
    return torch.from_numpy(crop)


def _overlap(offset: int, size: int, length: int) -> range:
    """The places of ``range(offset, offset + size)`` that lie in the image; empty if none does."""
    start = max(offset, 0)
    return range(start, max(min(offset + size, length), start))
