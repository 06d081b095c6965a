"""Batches that are read while they are used: what the loaders have in common, and PyTorch's."""

from __future__ import annotations

import os
import signal
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from arat_fast.data.batches import Batch, Batches, check_labels
from arat_fast.data.crops import Buffers, CropFlip, to_unit_range
from arat_fast.data.framing import Framing, Shift
from arat_fast.data.plan import BatchPlan, seeded_generator
from arat_fast.datasets.base import Samples
from arat_fast.datasets.encoded import EncodedImages

Made = TypeVar("Made")


class StreamedBatches(Batches):
    """A dataset that is read batch by batch: images in arrays, or encoded ones, decoded as RGB.

    Args:
        samples: the images; labels in [0, number of classes).
        classes: class names, one per label.
        plan: which samples make which batch.
        framing: how images are cropped and mirrored: :class:`Shift` those in arrays, which give the
            same batches as :class:`arat_fast.data.batches.ResidentBatches`, :class:`Framing`
            encoded ones.
        device: where the batches go.
        max_value: the uint8 value that stands for 1.0.
        memory_format: of the batches, channels_last or contiguous.
        num_workers: processes or threads that read, >= 0.

    Raises:
        ValueError: an argument out of range, now; a file that is no readable image, when its batch
            is made.
    """

    def __init__(
        self,
        samples: Samples,
        classes: tuple[str, ...],
        plan: BatchPlan,
        framing: Shift | Framing,
        *,
        device: torch.device,
        max_value: int = 255,
        memory_format: torch.memory_format = torch.contiguous_format,
        num_workers: int = 0,
    ) -> None:
        check_labels(samples.labels, len(samples), len(classes), samples.name)
        if isinstance(framing, Framing):
            height, width, channels = framing.size, framing.size, 3
        else:
            assert not isinstance(samples, EncodedImages)
            _, height, width, channels = samples.rows.shape
        super().__init__(plan, classes, (channels, height, width))
        self.samples = samples
        self.framing = framing
        self.device = device
        self.max_value = max_value
        self.memory_format = memory_format
        self.num_workers = num_workers
        self._buffers = Buffers()

    @abstractmethod
    def close(self) -> None:
        """Stop what reads ahead; the next epoch starts it anew."""


class LoaderBatches(StreamedBatches):
    """:class:`StreamedBatches` by PyTorch's DataLoader, and by Pillow; arguments as there.

    ``num_workers`` processes read, and stay from one epoch to the next; 0 reads in this one.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._crop_flip = CropFlip(self.framing.padding, self.max_value, self.memory_format)
        read = _Read(self.samples, self.framing, self.plan)
        self._workers = Workers(read, self.plan, self.num_workers, self.device)

    def close(self) -> None:
        """Stop the workers; the next epoch starts others."""
        self._workers.close()

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """As :meth:`Batches.epoch`."""
        on_gpu = self.device.type == "cuda"
        for *tensors, error in self._workers.run(epoch, start_batch):
            if error:
                # Left to the garbage collector, the workers would be waited for in vain.
                self.close()
                raise ValueError(error)
            pixels, labels, draws = (t.to(self.device, non_blocking=on_gpu) for t in tensors)
            if isinstance(self.framing, Shift):
                every = torch.arange(len(pixels), device=self.device)
                x = self._crop_flip(pixels.permute(0, 3, 1, 2), every, draws, self.impl)
            else:
                x = to_unit_range(pixels, 255, self._buffers)
            yield Batch(x.contiguous(memory_format=self.memory_format), labels)


class _Read(Dataset[tuple[Tensor, Tensor, Tensor, str]]):
    """Batches by their epoch and number: images, labels, where to crop images in arrays (N, H, W,
    C), which is done on the device, and the error, if there was one: from a worker an exception
    would reach the user as a traceback of many lines."""

    def __init__(self, samples: Samples, framing: Shift | Framing, plan: BatchPlan) -> None:
        self.samples, self.framing, self.plan = samples, framing, plan

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, str]:
        chosen = self.plan.samples(*place)
        labels = self.samples.labels[chosen]
        if not isinstance(self.samples, EncodedImages):
            pixels = torch.from_numpy(self.samples.rows[chosen.numpy()])
            return pixels, labels, self.framing.offsets(self.plan, *place), ""
        assert isinstance(self.framing, Framing)
        draws = self.framing.draw(self.plan, *place)
        size = self.framing.size
        images = torch.empty(len(chosen), 3, size, size, dtype=torch.uint8)
        for number, index in enumerate(chosen.tolist()):
            try:
                image = self.samples.image(index)
            except ValueError as error:
                return torch.empty(0), labels, draws, str(error)
            boxes, mirror = self.framing.place(
                [image.shape[0]], [image.shape[1]], draws[number : number + 1]
            )
            cut_out(image, boxes[0].tolist(), bool(mirror[0]), images[number])
            if self.framing.augment:
                key = (self.plan.seed, *place, self.plan.share(place[1]).start + number)
                images[number] = randaugment(images[number], seeded_generator(*key))
        return images, labels, torch.empty(0), ""


class Workers:
    """PyTorch's DataLoader for whole batches, in processes that stay from one epoch to the next.

    Args:
        samples: a batch by its epoch and number.
        plan: the batches.
        num_workers: processes, >= 0; 0 makes the batches in this one.
        device: where they go; memory is pinned for a GPU.
    """

    def __init__(
        self, samples: Dataset[Any], plan: BatchPlan, num_workers: int, device: torch.device
    ) -> None:
        self._samples = samples
        self._plan = plan
        self._num_workers = min(num_workers, len(plan))
        self._device = device
        self._numbers = _BatchNumbers()
        # The one of the last epoch. Outside of every cycle of references: the garbage collector
        # would close the queues first, and wait five seconds for each process then. At exit before
        # the interpreter kills the processes, of which PyTorch would complain.
        self._loader: list[DataLoader[Any]] = []
        weakref.finalize(self, self._loader.clear)

    def close(self) -> None:
        """Stop the processes; the next epoch starts others."""
        self._loader.clear()

    def run(self, epoch: int, start_batch: int) -> Iterator[Any]:
        """The batches of an epoch, from ``start_batch`` on."""
        self._numbers.pairs = [(epoch, number) for number in range(start_batch, len(self._plan))]
        if not self._loader:
            self._loader.append(
                DataLoader(
                    self._samples,
                    batch_size=None,
                    sampler=self._numbers,
                    num_workers=self._num_workers,
                    pin_memory=self._device.type == "cuda",
                    persistent_workers=self._num_workers > 0,
                    worker_init_fn=_leave_signals_to_the_parent,
                    # Otherwise a number is drawn from the global generator, once per epoch.
                    generator=seeded_generator(self._plan.seed, epoch),
                )
            )
        yield from self._loader[0]


class _BatchNumbers:
    """The (epoch, batch) pairs that the DataLoader asks for; changed before each of its epochs."""

    pairs: Sequence[tuple[int, int]] = ()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)


def read_ahead(make: Callable[[int], Made], numbers: Iterable[int]) -> Generator[Made, None, None]:
    """``make(number)`` for each of ``numbers``, one of them ahead, in a thread of its own."""
    with ThreadPoolExecutor(1) as reader:
        ahead: deque[Future[Made]] = deque()
        for number in numbers:
            ahead.append(reader.submit(make, number))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def cut_out(image: npt.NDArray[np.uint8], box: list[int], mirror: bool, out: Tensor) -> None:
    """Write a part of an image, scaled where its size is another one.

    Args:
        image: (height, width, 3), uint8.
        box: first row, first column, height and width of the part; beyond the image there are
            zeros, but a part that is scaled lies inside.
        mirror: mirror it horizontally.
        out: (3, height, width), uint8, of any size; written.
    """
    # By NumPy, in this thread: PyTorch would share each copy between its threads, which then wait
    # for the next one in a loop, on the cores that decode.
    top, left, height, width = box
    size = (out.shape[1], out.shape[2])
    written = out.numpy()
    if (height, width) == size:
        inside = image[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
        inside = inside.transpose(2, 0, 1)
        if inside.shape != written.shape:
            written.fill(0)
        first, left = max(-top, 0), max(-left, 0)
        written[:, first : first + inside.shape[1], left : left + inside.shape[2]] = inside
        if mirror:
            written[:] = written[:, :, ::-1].copy()
    else:
        part = torch.from_numpy(image[top : top + height, left : left + width])
        scaled = F.interpolate(
            part.permute(2, 0, 1)[None], size=size, mode="bilinear", antialias=True
        )
        written[:] = scaled[0].numpy()[:, :, :: -1 if mirror else 1]


def randaugment(image: Tensor, generator: torch.Generator) -> Tensor:
    """An image after two random operations of colour or shape, of magnitude 9 of 30.

    Args:
        image: (3, height, width), uint8.
        generator: on the CPU, used for nothing else.

    Source: Cubuk et al., NeurIPS 2020 (arXiv 1909.13719), as torchvision implements it.
    """
    # It takes a second to import, and few runs need it.
    from torchvision.transforms.v2 import RandAugment

    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPU too.
        torch.default_generator.set_state(generator.get_state())
        augmented: Tensor = RandAugment()(image)
    return augmented


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C and torchrun signal the whole process group, and a fork inherits the trainer's
    # handlers: the batch under way must still arrive, and a worker that is told to terminate must
    # do so. Workers end with their parent, in whichever group they are.
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
