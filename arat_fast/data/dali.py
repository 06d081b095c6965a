"""Batches decoded by NVIDIA DALI: on the GPU where there is one, by its C++ threads on the CPU.

DALI's own readers, whose order depends on the number of shards and on how far they have come, are
not used: every batch is fed by number from the plan that all loaders share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from arat_fast.data.batches import Batch
from arat_fast.data.crops import to_unit_range
from arat_fast.data.framing import Boxes, Framing, Shift
from arat_fast.data.loader import StreamedBatches, cut_out, read_ahead
from arat_fast.datasets.decoding import as_ppm, decode_image, for_dali
from arat_fast.datasets.encoded import EncodedImages
from arat_fast.extras import install_command

QUEUE_DEPTH = 2
"""Batches that DALI prepares ahead."""


def has_dali() -> bool:
    """Whether DALI can be imported."""
    from importlib.util import find_spec

    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


Label = TypeVar("Label")
Inputs = dict[str, Any]


class _Fed(NamedTuple):
    """One batch on its way through DALI; of files also their contents and what is cut out of each
    part that is decoded: a box, and whether it is mirrored."""

    samples: list[int]
    contents: Sequence[bytes] = ()
    squares: Sequence[tuple[list[int], bool]] = ()


class DaliBatches(StreamedBatches):
    """:class:`StreamedBatches` by DALI; arguments as there.

    On a CPU, DALI decodes no more than what is cut out, in ``num_workers`` threads (at least one),
    and PyTorch scales it: pixels are those of :class:`LoaderBatches`. On a GPU everything is done
    there; PNG, which the GPU cannot decode, is decoded by the CPU first. Files other than JPEG and
    PNG, and those that DALI cannot decode, are decoded by Pillow.

    Raises:
        ValueError: as for :class:`StreamedBatches`; DALI is not installed.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        if not has_dali():
            raise ValueError(
                "data.loader dali needs NVIDIA DALI, which is not installed: "
                f"{install_command('dali')} (Linux), or --data.loader dataloader"
            )
        _, height, width = self.image_shape
        make: Callable[..., Any] = partial(array_pipeline, (height, width))
        if isinstance(self.framing, Framing):
            make = partial(image_pipeline, self.framing)
        build = partial(make, num_threads=max(self.num_workers, 1), device=self.device)
        self._alone = partial(build, batch_size=1)
        self._by_pillow: set[int] = set()
        self._stream = DaliStream(partial(build, batch_size=self.plan.largest_share), self.device)

    def close(self) -> None:
        """Give up DALI's threads and memory; the next epoch takes others."""
        self._stream.close()

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """As :meth:`Batches.epoch`."""
        on_gpu = self.device.type == "cuda"
        with ThreadPoolExecutor(max(self.num_workers, 1)) as readers:
            for batch, outputs in self._decoded(readers, epoch, start_batch):
                whole = on_gpu or isinstance(self.framing, Shift)
                pixels = as_tensor(outputs) if whole else self.finish(batch, outputs)
                x = to_unit_range(pixels, self.max_value, self._buffers)
                labels = self.samples.labels[torch.tensor(batch.samples)]
                # A copy from other memory than this can wait for the steps before it.
                labels = labels.pin_memory() if on_gpu else labels
                yield Batch(
                    x.contiguous(memory_format=self.memory_format),
                    labels.to(self.device, non_blocking=True),
                )

    def _decoded(
        self, readers: ThreadPoolExecutor, epoch: int, number: int
    ) -> Iterator[tuple[_Fed, Any]]:
        """The batches from ``number`` on, begun again where DALI cannot decode a file that Pillow
        can: it is given Pillow's pixels then."""
        feed = partial(self._feed, readers, epoch)
        while number < len(self):
            with closing(read_ahead(feed, range(number, len(self)))) as fed:
                for batch, outputs in self._stream.run(fed):
                    if isinstance(outputs, RuntimeError):
                        self._by_pillow.update(self._refused(batch, outputs))
                        break
                    yield batch, outputs
                    number += 1

    def _feed(self, readers: ThreadPoolExecutor, epoch: int, number: int) -> tuple[_Fed, Inputs]:
        """One batch, and what its pipeline is fed for it."""
        chosen = self.plan.samples(epoch, number)
        index = chosen.tolist()
        if not isinstance(self.samples, EncodedImages):
            offsets = self.framing.offsets(self.plan, epoch, number).numpy()
            return _Fed(index), {
                "images": np.ascontiguousarray(self.samples.rows[chosen.numpy()]),
                "start": offsets[:, :2] - np.int32(self.framing.padding),
                "mirror": offsets[:, 2].copy(),
            }
        assert isinstance(self.framing, Framing)
        contents, *sizes = zip(*readers.map(self._read, index), strict=True)
        heights, widths = np.array(sizes)
        draws = self.framing.draw(self.plan, epoch, number)
        boxes, mirror = self.framing.place(heights, widths, draws)
        regions = inside(boxes, heights, widths)
        boxes[:, :2] -= regions[:, :2]
        return _Fed(index, contents, list(zip(boxes.tolist(), mirror.tolist(), strict=True))), {
            "encoded": [np.frombuffer(content, np.uint8) for content in contents],
            "region": list(regions.astype(np.int32)),
            "shift": list(boxes[:, :2].astype(np.int32)),
            "mirror": list(mirror.astype(np.int32)),
        }

    def _read(self, index: int) -> tuple[bytes, int, int]:
        """A file as DALI decodes it, and the height and width of its image."""
        assert isinstance(self.samples, EncodedImages)
        content, name = self.samples.read(index), self.samples.name(index)
        if index not in self._by_pillow:
            return for_dali(content, name)
        pixels = decode_image(content, name)
        return as_ppm(pixels), pixels.shape[0], pixels.shape[1]

    def finish(self, batch: _Fed, outputs: Any) -> Tensor:
        """The images of a batch, cut out of what DALI has decoded."""
        images = self._buffers.empty((len(batch.samples), *self.image_shape), torch.uint8)
        for place, (box, mirror) in enumerate(batch.squares):
            cut_out(np.asarray(outputs[0][place]), box, mirror, images[place])
        return images

    def _refused(self, batch: _Fed, error: RuntimeError) -> list[int]:
        """The files of a batch that DALI cannot decode.

        Raises:
            ValueError: one is no readable image.
            RuntimeError: it is none of the files: memory is short, or the device fails.
        """
        source = self.samples
        refused: list[int] = []
        if isinstance(source, EncodedImages):
            files = [
                (index, content, decode_image(content, source.name(index)).shape[:2])
                for index, content in zip(batch.samples, batch.contents, strict=True)
            ]
            if self._decodes(as_ppm(np.zeros((1, 1, 3), np.uint8)), (1, 1)):
                refused = [i for i, content, size in files if not self._decodes(content, size)]
        if not refused:
            kind = torch.OutOfMemoryError if "out of memory" in str(error) else RuntimeError
            number = len(batch.samples)
            raise kind(f"DALI cannot make a batch of {number} images: {told(error)}") from error
        return refused

    def _decodes(self, content: bytes, size: tuple[int, ...]) -> bool:
        """Whether DALI can decode a file of that height and width alone."""
        inputs: Inputs = {
            "encoded": [np.frombuffer(content, np.uint8)],
            "region": [np.array([0, 0, *size], np.int32)],
            "shift": [np.zeros(2, np.int32)],
            "mirror": [np.int32(0)],
        }
        ((_, outputs),) = DaliStream(self._alone, self.device).run([(None, inputs)])
        return not isinstance(outputs, RuntimeError)


def told(error: RuntimeError) -> str:
    """What DALI says of an error, in one line, without where it was in which file of whose."""
    text = str(error).partition("encountered:")[2] or str(error)
    lines = map(str.strip, text.partition("Stacktrace")[0].splitlines())
    said = (line for line in lines if not line.startswith(("Critical error", "Current pipeline")))
    return " ".join(filter(None, said))[:300]


def inside(boxes: Boxes, heights: Boxes, widths: Boxes) -> Boxes:
    """The part of each box (N, 4) that lies in its image, at least one pixel of the image."""
    h, w = heights, widths
    top, left = np.clip(boxes[:, 0], 0, h - 1), np.clip(boxes[:, 1], 0, w - 1)
    bottom = np.clip(boxes[:, 0] + boxes[:, 2], top + 1, h)
    right = np.clip(boxes[:, 1] + boxes[:, 3], left + 1, w)
    return np.stack([top, left, bottom - top, right - left], 1)


def image_pipeline(
    framing: Framing,
    *,
    batch_size: int,
    num_threads: int,
    device: torch.device,
    whole: bool | None = None,
) -> Any:
    """A DALI pipeline with the inputs "encoded" (bytes of a file), "region" (first row and column,
    height and width to decode), "shift" (first row and column of the square in the region) and
    "mirror" (0 or 1).

    Args:
        framing: size and kind of the squares.
        batch_size: the largest batch.
        num_threads: of the CPU, >= 1.
        device: which decodes. Nothing is found out: without a GPU this is the CPU.
        whole: also scale, mirror and transpose to (3, size, size), otherwise regions come out,
            (height, width, 3); default on a GPU only.
    """
    from nvidia.dali import fn, types

    on_gpu = device.type == "cuda"
    with _pipeline(batch_size, num_threads, device) as pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        region = fn.external_source(name="region", dtype=types.INT32, ndim=1)
        shift = fn.external_source(name="shift", dtype=types.INT32, ndim=1)
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
        images = fn.decoders.image_slice(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            axis_names="HW",
            start=region[:2],
            shape=region[2:],
            # As Pillow decodes: chroma interpolated, no rotation by the EXIF tag.
            jpeg_fancy_upsampling=True,
            adjust_orientation=False,
        )
        if on_gpu if whole is None else whole:
            size = (framing.size, framing.size)
            if framing.kind == "resized":
                images = fn.resize(
                    images, size=size, interp_type=types.INTERP_LINEAR, antialias=True
                )
            else:
                images = _cropped(images, shift, size)
            images = _turned(images, mirror)
        # An input that nothing depends on could not be fed.
        pipeline.set_outputs(images, shift, mirror)
    pipeline.build()
    return pipeline


def array_pipeline(
    size: tuple[int, int], *, batch_size: int, num_threads: int, device: torch.device
) -> Any:
    """A DALI pipeline with the inputs "images" (height, width, channels), "start" (first row and
    column of the crop, beyond the image there are zeros) and "mirror" (0 or 1); what comes out is
    (channels, height, width), uint8. Arguments as of :func:`image_pipeline`; ``size`` is the height
    and width of the images."""
    from nvidia.dali import fn, types

    with _pipeline(batch_size, num_threads, device) as pipeline:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
        images = images.gpu() if device.type == "cuda" else images
        pipeline.set_outputs(_turned(_cropped(images, start, size), mirror))
    pipeline.build()
    return pipeline


def _cropped(images: Any, start: Any, size: tuple[int, int]) -> Any:
    from nvidia.dali import fn

    return fn.slice(
        images,
        start=start,
        shape=size,
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=0,
    )


def _turned(images: Any, mirror: Any) -> Any:
    from nvidia.dali import fn

    return fn.transpose(fn.flip(images, horizontal=mirror), perm=[2, 0, 1])


def _pipeline(batch_size: int, num_threads: int, device: torch.device) -> Any:
    from nvidia.dali import Pipeline

    return Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        prefetch_queue_depth=QUEUE_DEPTH,
        exec_dynamic=True,
    )


def as_tensor(outputs: Any) -> Tensor:
    """A copy of the first output; DALI uses its memory again."""
    return torch.utils.dlpack.from_dlpack(outputs[0].as_tensor()).clone()


class DaliStream:
    """Batches through a pipeline, in order, several of them under way; made anew after an error.

    Args:
        make: builds the pipeline.
        device: where its outputs are used.
    """

    def __init__(self, make: Callable[[], Any], device: torch.device) -> None:
        self._make = make
        self._device = device
        self._pipeline: Any = None
        # Batches scheduled and not yet taken, and whether the last one taken is still in use.
        self._under_way = 0
        self._held = False
        self._failure: RuntimeError | None = None

    def run(self, batches: Iterable[tuple[Label, Inputs]]) -> Iterator[tuple[Label, Any]]:
        """Feed each batch and yield what comes out of it, valid until the next is asked for.

        Args:
            batches: a label of one's own, and the inputs of the pipeline by name.

        Yields:
            the label, and the outputs or the RuntimeError that DALI raised.
        """
        waiting: deque[tuple[Label, Inputs]] = deque()
        source, unread = iter(batches), None
        self._failure = None
        try:
            more = True
            while more or waiting:
                try:
                    label, inputs = next(source)
                except StopIteration:
                    more = False
                except ValueError as error:
                    # After the batches that are under way.
                    more, unread = False, error
                else:
                    waiting.append((label, inputs))
                    self._schedule(inputs)
                if waiting and (not more or len(waiting) == QUEUE_DEPTH):
                    yield waiting[0][0], self._outputs()
                    self._release()
                    waiting.popleft()
            if unread is not None:
                raise unread
        finally:
            # Where an epoch is left early: DALI reads the inputs until it has used them.
            self._release()
            while self._under_way:
                self._outputs()
                self._release()

    def close(self) -> None:
        """Give up the pipeline; the next batch makes another one."""
        self._pipeline = None

    def _schedule(self, inputs: Inputs) -> None:
        if self._failure is not None:
            return
        if self._pipeline is None:
            self._pipeline = self._make()
            # The first run of a pipeline takes as many batches as its queue is deep.
            first = {name: values[:1] for name, values in inputs.items()}
            for _ in range(QUEUE_DEPTH - 1):
                self._feed(first)
            self._feed(inputs)
            self._under_way = QUEUE_DEPTH
            self._pipeline.schedule_run()
            for _ in range(QUEUE_DEPTH - 1):
                self._outputs()
                self._release()
            return
        self._feed(inputs)
        self._pipeline.schedule_run()
        self._under_way += 1

    def _feed(self, inputs: Inputs) -> None:
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)

    def _outputs(self) -> Any:
        if self._failure is not None:
            return self._failure
        try:
            # On a GPU, DALI waits for PyTorch's stream before it uses their memory again.
            on_gpu = self._device.type == "cuda"
            stream = torch.cuda.current_stream(self._device) if on_gpu else None
            outputs = self._pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError as error:
            # DALI cannot go on with this pipeline.
            self._pipeline, self._under_way, self._failure = None, 0, error
            return error
        self._under_way -= 1
        self._held = True
        return outputs

    def _release(self) -> None:
        if self._held:
            self._pipeline.release_outputs()
            self._held = False
