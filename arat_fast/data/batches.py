"""Batches of images on the device: what every loader yields and the resident loader."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from arat_fast.data.crops import CropFlip
from arat_fast.data.framing import Framing
from arat_fast.data.plan import WHOLE, BatchPlan, Shard, seeded_generator


class Batch(NamedTuple):
    """Images x (N, C, H, W), float32 in [0, 1], and labels y (N,), int64, on one device."""

    x: Tensor
    y: Tensor


class Batches(Protocol):
    """One split of a dataset, as batches on the device.

    ``len`` is the number of batches of an epoch, the same on every rank. The batches of an epoch,
    joined over the ranks, depend on the seed, the epoch and nothing else, so that a run can go on
    from any batch; PyTorch's global generators are neither read nor moved.

    Attributes:
        plan: which samples make which batch, and this rank's share of it.
        num_samples: images in the split, over all ranks.
        num_classes: number of classes.
        image_shape: (C, H, W) of a batch.
        classes: class names, one per label.
    """

    plan: BatchPlan
    num_samples: int
    num_classes: int
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches of one epoch, from ``start_batch`` on."""


def stream_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator for one use of a run's seed, on ``device``.

    Two uses of one seed would draw the same numbers: the first random start of an attack would
    repeat the initial weights.

    Args:
        seed: of the run, >= 0.
        name: of the use.
        device: where it draws.
    """
    stream = seeded_generator(seed, zlib.crc32(name.encode()), 0, 0).initial_seed()
    return torch.Generator(device).manual_seed(stream)


def check_samples(images: Tensor, labels: Tensor, num_classes: int, max_value: int) -> None:
    """Raise unless these are images with one label each.

    Args:
        images: (num_samples, C, H, W), uint8 in [0, max_value].
        labels: (num_samples,), int64 in [0, num_classes).
        num_classes: number of classes.
        max_value: the largest value of a pixel.

    Raises:
        ValueError: shapes, dtypes, labels or values that do not fit; no image at all.
    """
    if images.ndim != 4 or images.dtype != torch.uint8:
        raise ValueError(
            f"images must be (num_samples, C, H, W) uint8, got {tuple(images.shape)} {images.dtype}"
        )
    if images.numel() == 0:
        raise ValueError("the dataset is empty, expected at least one image")
    check_labels(labels, len(images), num_classes)
    if int(images.max()) > max_value:
        raise ValueError(f"pixels must be <= {max_value}, got {int(images.max())}")


def check_labels(labels: Tensor, num_samples: int, num_classes: int) -> None:
    """Raise ValueError unless these are labels (num_samples,), int64 in [0, num_classes)."""
    if labels.shape != (num_samples,) or labels.dtype != torch.int64:
        raise ValueError(
            f"one label per image is expected, int64, got {tuple(labels.shape)} labels of "
            f"{labels.dtype} for {num_samples} images"
        )
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes - 1}], got values from {low} to {high}"
        )


class ResidentBatches:
    """A dataset that lives on the device as uint8; augmentation is a random crop and a flip.

    Args:
        images: (num_samples, C, H, W), uint8.
        labels: (num_samples,), int64 in [0, num_classes).
        classes: class names, one per label.
        batch_size: samples in a batch, over all ranks; the last one of an epoch can differ
            (:class:`arat_fast.data.plan.BatchPlan`).
        max_value: the uint8 value that stands for 1.0.
        shuffle: new order in each epoch.
        padding: pixels of zeros around the image before a random crop of its own size; 0: no crop.
        flip: mirror half of the images horizontally.
        seed: of order and augmentation.
        shard: this process; augmentation belongs to a sample's place in the whole batch.
        memory_format: of the images, channels_last or contiguous.
        plan: which samples make which batch, instead of what ``batch_size``, ``shuffle``,
            ``seed`` and ``shard`` say.
        framing: draws crops and flips as for image files, instead of ``padding`` and ``flip``;
            ``images`` have its size.

    Raises:
        ValueError: shapes, dtypes, labels or values that do not fit.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: tuple[str, ...],
        *,
        batch_size: int,
        max_value: int = 255,
        shuffle: bool = False,
        padding: int = 0,
        flip: bool = False,
        seed: int = 0,
        shard: Shard = WHOLE,
        memory_format: torch.memory_format = torch.contiguous_format,
        plan: BatchPlan | None = None,
        framing: Framing | None = None,
    ) -> None:
        check_samples(images, labels, len(classes), max_value)
        self.plan = plan or BatchPlan(
            len(images), batch_size, shuffle=shuffle, seed=seed, shard=shard
        )
        # On a CPU whole rows are copied: pixels lie as the batch will.
        on_cpu = images.device.type == "cpu"
        self.images = images.contiguous(memory_format=memory_format) if on_cpu else images
        self.labels = labels
        self.classes = classes
        self.num_classes = len(classes)
        self.num_samples = self.plan.num_samples
        self.image_shape = (images.shape[1], images.shape[2], images.shape[3])
        self.max_value = max_value
        self.padding = padding if framing is None else framing.padding
        self.flip = flip if framing is None else framing.flip
        self.framing = framing
        self.memory_format = memory_format
        self._crop_flip = CropFlip(self.padding, max_value, memory_format)

    def __len__(self) -> int:
        return len(self.plan)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``epoch`` (>= 0), from batch ``start_batch`` on."""
        for index, draws in self.epoch_indices(epoch, start_batch):
            yield self.assemble(index, draws)

    def epoch_indices(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """What :meth:`assemble` makes the batches of an epoch of, on the device.

        Args:
            epoch: >= 0.
            start_batch: the first batch.

        Yields:
            samples (N,), int64, and where to crop and what to mirror, (N, 3), int32.
        """
        plan = self.plan
        numbers = range(start_batch, len(self))
        order = plan.order(epoch)
        draws = torch.empty(len(order), 3, dtype=torch.int32)
        for number in numbers:
            draws[plan.places(number)] = (
                draw_batch(plan, epoch, number, self.padding, self.flip)
                if self.framing is None
                else self.framing.offsets(plan, epoch, number)
            )
        # One copy an epoch: the host would wait for the device at each.
        device = self.images.device
        order, draws = order.to(device), draws.to(device)
        for number in numbers:
            places = plan.places(number)
            yield order[places], draws[places]

    def assemble(self, index: Tensor, draws: Tensor) -> Batch:
        """Gather, crop, mirror and convert the images of one batch, and gather their labels.

        Args:
            index: samples (N,), int64 in [0, num_samples).
            draws: (N, 3), int32: first row and column of the crop in the padded image, and 1 to
                mirror it.
        """
        return Batch(self._crop_flip(self.images, index, draws), self.labels[index])


def draw_batch(plan: BatchPlan, epoch: int, number: int, padding: int, flip: bool) -> Tensor:
    """Where to crop and what to mirror in this rank's share of a batch: (N, 3), int32, on the CPU.

    The draws belong to the places of the whole batch, whatever the number of ranks.
    """
    share = plan.share(number)
    if not padding and not flip:
        return torch.zeros(share.stop - share.start, 3, dtype=torch.int32)
    batch = plan.batch(number)
    generator = seeded_generator(plan.seed, epoch, number)
    draws = draw_crop_flip(batch.stop - batch.start, padding, generator)[share]
    if not flip:
        draws[:, 2] = 0
    return draws


def draw_crop_flip(num_samples: int, padding: int, generator: torch.Generator) -> Tensor:
    """Where to crop and what to mirror, for :func:`arat_kernels.crop_flip.crop_flip`.

    Args:
        num_samples: images.
        padding: pixels on each side.
        generator: on the CPU, so that every device sees the same draws.

    Returns:
        (num_samples, 3), int32: first row and column of the crop in the padded image, uniform in
        [0, 2 * padding], and 1 to mirror it, with probability 1/2, else 0.
    """
    corner = torch.randint(2 * padding + 1, (2, num_samples), generator=generator)
    mirror = torch.rand(num_samples, generator=generator) < 0.5
    return torch.stack([*corner, mirror.to(torch.int64)], dim=1).int()
