"""Images in arrays that are read batch by batch, from memory maps too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from arat_fast.data.batches import Batch, check_labels, draw_batch
from arat_fast.data.crops import Buffers, CropFlip, to_unit_range
from arat_fast.data.images import Workers, read_ahead
from arat_fast.data.plan import BatchPlan
from arat_fast.datasets.rows import Rows


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
        check_labels(labels, rows.shape[0], len(classes))
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
        self._workers = Workers(_Samples(rows, labels, plan), plan, num_workers, device)
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

    def __len__(self) -> int:
        return len(self.plan)

    def close(self) -> None:
        """Stop the workers and DALI; the next epoch starts others."""
        self._workers.close()
        if self._stream is not None:
            self._stream.close()

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches of epoch ``epoch`` (>= 0), from ``start_batch`` on."""
        read = self._by_dali if self.loader == "dali" else self._by_workers
        yield from read(epoch, start_batch)

    def _by_workers(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        on_gpu = self.device.type == "cuda"
        for number, (pixels, labels) in enumerate(
            self._workers.run(epoch, start_batch), start_batch
        ):
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

    def __init__(self, rows: Rows, labels: Tensor, plan: BatchPlan) -> None:
        self.rows, self.labels, self.plan = rows, labels, plan

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, Tensor]:
        chosen = self.plan.samples(*place)
        return torch.from_numpy(self.rows.take(chosen.numpy())), self.labels[chosen]
