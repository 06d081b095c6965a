"""Images in arrays that are read batch by batch, from memory maps too."""

from __future__ import annotations

import math
import mmap
import tokenize
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from arat_fast.data.batches import Batch, draw_batch
from arat_fast.data.crops import Buffers, CropFlip, to_unit_range
from arat_fast.data.images import (
    BatchNumbers,
    close_at_exit,
    leave_signals_to_the_parent,
    read_ahead,
)
from arat_fast.data.plan import BatchPlan, seeded_generator

Index = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


class Rows(Protocol):
    """Images of one size by number.

    Attributes:
        shape: (num_samples, height, width, channels).
    """

    shape: tuple[int, int, int, int]

    def take(self, index: Index) -> Pixels:
        """The images ``index`` (N,), in that order: (N, height, width, channels), uint8."""


class MappedRows:
    """The images of an .npy file, (num_samples, height, width, channels), uint8, left on disk.

    A process keeps none of the pages it has read, so that its memory does not grow with the file.

    Args:
        path: the file, as ``numpy.save`` writes it.

    Raises:
        ValueError: it holds something else, or fewer bytes than its header promises.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shape, self._offset = _read_header(path)
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_map": None}

    def take(self, index: Index) -> Pixels:
        """The images ``index`` (N,), in that order: (N, height, width, channels), uint8."""
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):
                self._map.madvise(mmap.MADV_RANDOM)
        num_bytes = int(np.prod(self.shape))
        pixels = np.frombuffer(self._map, np.uint8, num_bytes, self._offset).reshape(self.shape)
        taken = pixels[index]
        del pixels
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return taken


class ArrayRows:
    """The images of an array in memory.

    Args:
        pixels: (num_samples, height, width, channels), uint8.
    """

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2], pixels.shape[3])

    @property
    def images(self) -> Tensor:
        """All images, (num_samples, C, H, W), uint8; the same memory."""
        return torch.from_numpy(self.pixels).permute(0, 3, 1, 2)

    def take(self, index: Index) -> Pixels:
        """The images ``index`` (N,), in that order: (N, height, width, channels), uint8."""
        return self.pixels[index]


class JoinedRows:
    """Several arrays, one behind the other.

    Args:
        parts: images of one shape.

    Raises:
        ValueError: the images of one part are of another shape than those of the first.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        for part in parts:
            if part.shape[1:] != parts[0].shape[1:]:
                raise ValueError(
                    f"images of {_size(parts[0])} and of {_size(part)} cannot be mixed, expected "
                    "one size"
                )
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.shape = (int(self._starts[-1]), *parts[0].shape[1:])

    def take(self, index: Index) -> Pixels:
        """The images ``index`` (N,), in that order: (N, height, width, channels), uint8."""
        taken = np.empty((len(index), *self.shape[1:]), np.uint8)
        owner = np.searchsorted(self._starts, index, side="right") - 1
        for number, part in enumerate(self.parts):
            own = owner == number
            if own.any():
                taken[own] = part.take(index[own] - self._starts[number])
        return taken


class SelectedRows:
    """Some of the images of an array.

    Args:
        rows: all of them.
        index: (N,), int64: those that are meant, in order.
    """

    def __init__(self, rows: Rows, index: Index) -> None:
        self.rows = rows
        self.index = index
        self.shape = (len(index), *rows.shape[1:])

    def take(self, index: Index) -> Pixels:
        """The images ``index`` (N,), in that order: (N, height, width, channels), uint8."""
        return self.rows.take(self.index[index])


class StreamedBatches:
    """A dataset in arrays that is not kept on the device; the same batches as
    :class:`arat_fast.data.batches.ResidentBatches` makes of the same images.

    Args:
        rows: the images.
        labels: (num_samples,), int64 in [0, num_classes).
        classes: class names, one per label.
        plan: which samples make which batch.
        device: where the batches go.
        loader: what reads ahead: "dataloader" (PyTorch's, in ``num_workers`` processes) or "dali",
            which crops and mirrors too, on a GPU if ``device`` is one.
        max_value: the uint8 value that stands for 1.0.
        padding: pixels of zeros around the image before a random crop of its own size; 0: no crop.
        flip: mirror half of the images horizontally.
        memory_format: of the images, channels_last or contiguous.
        num_workers: processes that read; 0 reads in this one.

    Raises:
        ValueError: labels that do not fit; DALI is asked for and not installed.
    """

    def __init__(
        self,
        rows: Rows,
        labels: Tensor,
        classes: tuple[str, ...],
        plan: BatchPlan,
        *,
        device: torch.device,
        loader: str = "dataloader",
        max_value: int = 255,
        padding: int = 0,
        flip: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
        num_workers: int = 0,
    ) -> None:
        if labels.shape != (rows.shape[0],):
            raise ValueError(
                f"one label per image is expected, got {tuple(labels.shape)} labels for "
                f"{rows.shape[0]} images"
            )
        low, high = (int(v) for v in torch.aminmax(labels))
        if low < 0 or high >= len(classes):
            raise ValueError(
                f"labels must lie in [0, {len(classes) - 1}], got values from {low} to {high}"
            )
        self.rows = rows
        self.labels = labels
        self.classes = classes
        self.num_classes = len(classes)
        self.plan = plan
        self.num_samples = plan.num_samples
        _, height, width, channels = rows.shape
        self.image_shape = (channels, height, width)
        self.device = device
        self.loader = loader
        self.max_value = max_value
        self.padding = padding
        self.flip = flip
        self.memory_format = memory_format
        self.num_workers = num_workers
        self._buffers = Buffers()
        self._crop_flip = CropFlip(padding, max_value, memory_format)
        self._numbers = BatchNumbers()
        self._workers: DataLoader[tuple[Tensor, Tensor]] | None = None
        self._stream: Any = None
        if loader == "dali":
            from arat_fast.data.dali import DaliStream, array_pipeline, require_dali

            require_dali()
            self._stream = DaliStream(
                partial(
                    array_pipeline,
                    batch_size=plan.largest_share,
                    num_threads=max(num_workers, 1),
                    size=(height, width),
                    device=device,
                ),
                device,
            )
        close_at_exit(self)

    def __len__(self) -> int:
        return len(self.plan)

    def close(self) -> None:
        """Stop the workers and DALI; the next epoch starts others."""
        self._workers = None
        if self._stream is not None:
            self._stream.close()

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches of epoch ``epoch`` (>= 0), from ``start_batch`` on."""
        read = self._by_dali if self.loader == "dali" else self._by_workers
        yield from read(epoch, start_batch)

    def _by_workers(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        self._numbers.set(epoch, range(start_batch, len(self)))
        on_gpu = self.device.type == "cuda"
        if self._workers is None:
            num_workers = min(self.num_workers, len(self))
            self._workers = DataLoader(
                _Samples(self),
                batch_size=None,
                sampler=self._numbers,
                num_workers=num_workers,
                pin_memory=on_gpu,
                persistent_workers=num_workers > 0,
                worker_init_fn=leave_signals_to_the_parent,
                # Otherwise a number is drawn from the global generator, once per epoch.
                generator=seeded_generator(self.plan.seed, epoch),
            )
        for number, (pixels, labels) in enumerate(self._workers, start_batch):
            draws = draw_batch(self.plan, epoch, number, self.padding, self.flip)
            images = pixels.to(self.device, non_blocking=on_gpu).permute(0, 3, 1, 2)
            x = self._crop_flip(
                images,
                torch.arange(len(images), device=self.device),
                draws.to(self.device, non_blocking=on_gpu),
            )
            yield Batch(x, labels.to(self.device, non_blocking=on_gpu))

    def _by_dali(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        from arat_fast.data.dali import as_tensor

        feed = read_ahead(partial(self._feed, epoch), range(start_batch, len(self)))
        for labels, outputs in self._stream.run(feed):
            if isinstance(outputs, RuntimeError):
                raise outputs
            x = to_unit_range(as_tensor(outputs), self.max_value, self._buffers)
            # A copy from other memory than this can wait for the steps before it.
            labels = labels.pin_memory() if self.device.type == "cuda" else labels
            yield Batch(
                x.contiguous(memory_format=self.memory_format),
                labels.to(self.device, non_blocking=True),
            )

    def _feed(self, epoch: int, number: int) -> tuple[Tensor, dict[str, Any]]:
        """The labels of a batch, and what DALI is fed for it."""
        chosen = self.plan.samples(epoch, number)
        draws = draw_batch(self.plan, epoch, number, self.padding, self.flip).numpy()
        return self.labels[chosen], {
            "images": np.ascontiguousarray(self.rows.take(chosen.numpy())),
            "start": draws[:, :2] - np.int32(self.padding),
            "mirror": draws[:, 2].copy(),
        }


class _Samples(Dataset[tuple[Tensor, Tensor]]):
    """Batches by their epoch and number: images (N, H, W, C), uint8, and labels."""

    def __init__(self, batches: StreamedBatches) -> None:
        self.rows, self.labels, self.plan = batches.rows, batches.labels, batches.plan

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor]:
        chosen = self.plan.samples(*place)
        return torch.from_numpy(self.rows.take(chosen.numpy())), self.labels[chosen]


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of an open .npy file, left at the first byte of the array.

    Raises:
        ValueError: it is none.
    """
    lib: Any = np.lib.format
    version = lib.read_magic(file)
    read = {(1, 0): lib.read_array_header_1_0, (2, 0): lib.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format")
    try:
        header: tuple[tuple[int, ...], bool, np.dtype[Any]] = read(file)
    # numpy evaluates the header as a Python literal.
    except (SyntaxError, TypeError, tokenize.TokenError) as error:
        raise ValueError(f"its header is damaged: {error}") from error
    return header


def _read_header(path: Path) -> tuple[tuple[int, int, int, int], int]:
    """Shape and first byte of the images of an .npy file."""
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = read_npy_header(file)
            offset = file.tell()
    except ValueError as error:
        raise ValueError(f"{path}: expected an .npy array, got {error}") from error
    if len(shape) != 4 or dtype != np.uint8 or fortran:
        raise ValueError(
            f"{path}: expected images (num_samples, height, width, channels) uint8, got "
            f"{tuple(shape)} {dtype}"
        )
    expected, found = offset + math.prod(shape), path.stat().st_size
    if found < expected:
        raise ValueError(f"{path}: expected {expected} bytes, got {found}: it was cut short")
    return (int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3])), offset


def _size(rows: Rows) -> str:
    return "x".join(map(str, rows.shape[1:]))
