"""Batches of images on the device: what every loader yields and the resident loader."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from arat_fast.data.crops import CropFlip
from arat_fast.data.framing import NO_SHIFT, Framing, Shift
from arat_fast.data.plan import BatchPlan, seeded_generator
from arat_kernels.implementation import Impl


class Batch(NamedTuple):
    """Images x (N, C, H, W), float32 in [0, 1], and labels y (N,), int64, on one device."""

    x: Tensor
    y: Tensor


class Batches(ABC):
    """One split of a dataset, as batches on the device.

    ``len`` is the number of batches of an epoch, the same on every rank. The batches of an epoch,
    joined over the ranks, depend on the seed, the epoch and nothing else, neither on what loads
    them, so that a run can go on from any batch; PyTorch's global generators are neither read nor
    moved.

    Attributes:
        plan: which samples make which batch, and this rank's share of it.
        num_samples: images in the split, over all ranks.
        num_classes: number of classes.
        image_shape: (C, H, W) of a batch.
        classes: class names, one per label.
        impl: implementation of the cropping; None: the fastest for the device.
    """

    impl: Impl | None = None

    def __init__(
        self, plan: BatchPlan, classes: tuple[str, ...], image_shape: tuple[int, int, int]
    ) -> None:
        self.plan = plan
        self.num_samples = plan.num_samples
        self.classes = classes
        self.num_classes = len(classes)
        self.image_shape = image_shape

    def __len__(self) -> int:
        return len(self.plan)

    @abstractmethod
    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches of epoch ``epoch`` (>= 0), from ``start_batch`` on."""


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
    check_labels(labels, len(images), num_classes, "image {}".format)
    if int(images.max()) > max_value:
        raise ValueError(f"pixels must be <= {max_value}, got {int(images.max())}")


def check_labels(
    labels: Tensor, num_samples: int, num_classes: int, name: Callable[[int], str]
) -> None:
    """Raise ValueError unless these are labels (num_samples,), int64 in [0, num_classes); ``name``
    is what a sample is called."""
    if labels.shape != (num_samples,) or labels.dtype != torch.int64:
        raise ValueError(
            f"one label per image is expected, int64, got {tuple(labels.shape)} labels of "
            f"{labels.dtype} for {num_samples} images"
        )
    for index in (int(labels.argmin()), int(labels.argmax())):
        if not 0 <= int(labels[index]) < num_classes:
            raise ValueError(
                f"{name(index)}: labels must lie in [0, {num_classes - 1}], got "
                f"{int(labels[index])}"
            )


class ResidentBatches(Batches):
    """A dataset that lives on the device as uint8.

    Args:
        images: (num_samples, C, H, W), uint8.
        labels: (num_samples,), int64 in [0, num_classes).
        classes: class names, one per label.
        plan: which samples make which batch.
        framing: where images are cropped and which are mirrored; a :class:`Framing` has their size.
        max_value: the uint8 value that stands for 1.0.
        memory_format: of the batches, channels_last or contiguous.

    Raises:
        ValueError: shapes, dtypes, labels or values that do not fit.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: tuple[str, ...],
        plan: BatchPlan,
        framing: Shift | Framing = NO_SHIFT,
        *,
        max_value: int = 255,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        check_samples(images, labels, len(classes), max_value)
        super().__init__(plan, classes, (images.shape[1], images.shape[2], images.shape[3]))
        # On a CPU whole rows are copied: pixels lie as the batch will.
        on_cpu = images.device.type == "cpu"
        self.images = images.contiguous(memory_format=memory_format) if on_cpu else images
        self.labels = labels
        self.framing = framing
        self._crop_flip = CropFlip(framing.padding, max_value, memory_format)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """As :meth:`Batches.epoch`."""
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
            draws[plan.places(number)] = self.framing.offsets(plan, epoch, number)
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
        return Batch(self._crop_flip(self.images, index, draws, self.impl), self.labels[index])
