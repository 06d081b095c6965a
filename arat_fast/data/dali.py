"""Batches decoded by NVIDIA DALI: on the GPU where there is one, by its C++ threads on the CPU.

DALI's own readers are not used. Their order depends on the number of shards and on how far the
reader has come: ``shuffle_after_epoch`` draws from a fixed seed whatever seed the pipeline is
given, an epoch's length follows from the reader's name and padding, and a reset before the end of
an epoch does nothing. Here every batch is fed by number from the plan that all loaders share, so
that its samples are those of any other loader, a run goes on at any batch, and an epoch can be left
at any time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arat_fast.data.framing import Framing
from arat_fast.data.images import EncodedBatches, cut_out, read_ahead
from arat_fast.datasets.encoded import decode_image, image_size
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


def require_dali() -> None:
    """Raise a ValueError unless DALI can be imported."""
    if not has_dali():
        raise ValueError(
            "data.loader dali needs NVIDIA DALI, which is not installed: "
            f"{install_command('dali')} (Linux), or --data.loader dataloader"
        )


Label = TypeVar("Label")
Inputs = dict[str, Any]


class _Encoded(NamedTuple):
    """One batch on its way to the decoder: contents of the files, boxes (N, 4) and mirror (N,)."""

    samples: list[int]
    contents: list[bytes]
    boxes: npt.NDArray[np.int64]
    mirror: npt.NDArray[np.bool_]
    # (N, 4): the part of each image that is decoded.
    regions: npt.NDArray[np.int64]


class DaliBatches(EncodedBatches):
    """:class:`EncodedBatches` by DALI; arguments as there.

    On a CPU, DALI decodes no more than what is cut out, in ``num_workers`` threads (at least one),
    and PyTorch scales it: pixels are those of :class:`LoaderBatches`. On a GPU everything is done
    there; PNG and other files that the GPU cannot decode are decoded by the CPU first.

    Raises:
        ValueError: as for :class:`EncodedBatches`; DALI is not installed.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        require_dali()
        self._pipeline: DaliStream | None = None

    def close(self) -> None:
        """Give up DALI's threads and memory; the next epoch takes others."""
        if self._pipeline is not None:
            self._pipeline.close()

    def pixels(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches as (N, 3, size, size), uint8, and labels (N,), int64, on the device."""
        if self._pipeline is None:
            self._pipeline = DaliStream(
                partial(
                    image_pipeline,
                    self.framing,
                    batch_size=self.plan.largest_share,
                    num_threads=max(self.num_workers, 1),
                    device=self.device,
                ),
                self.device,
            )
        on_gpu = self.device.type == "cuda"
        with ThreadPoolExecutor(max(self.num_workers, 1)) as readers:
            feed = partial(self.feed, epoch, read=readers.map)
            with closing(read_ahead(feed, range(start_batch, len(self)))) as fed:
                for encoded, outputs in self._pipeline.run(fed):
                    if isinstance(outputs, RuntimeError):
                        raise self._explain(encoded, outputs) from outputs
                    images = as_tensor(outputs) if on_gpu else self._finish(encoded, outputs)
                    labels = self.source.labels[torch.tensor(encoded.samples)]
                    yield images, labels.to(self.device, non_blocking=True)

    def feed(
        self, epoch: int, number: int, *, read: Callable[..., Iterable[Any]] = map
    ) -> tuple[_Encoded, Inputs]:
        """One batch, and what :func:`image_pipeline` is fed for it.

        Args:
            epoch: >= 0.
            number: of the batch.
            read: applies a function to every sample, as :func:`map`; that of a pool of threads
                reads several files at a time.
        """
        index = self.plan.samples(epoch, number).tolist()
        contents, sizes = zip(*read(self._read, index), strict=True)
        heights, widths = np.array(sizes).T
        draws = self.framing.draw(self.plan, epoch, number)
        boxes, mirror = self.framing.place(heights, widths, draws)
        encoded = _Encoded(index, list(contents), boxes, mirror, inside(boxes, heights, widths))
        return encoded, {
            "encoded": [np.frombuffer(content, np.uint8) for content in contents],
            "region": list(encoded.regions.astype(np.int32)),
            "shift": list((boxes - encoded.regions)[:, :2].astype(np.int32)),
            "mirror": list(mirror.astype(np.int32)),
        }

    def _read(self, index: int) -> tuple[bytes, tuple[int, int]]:
        """A file, and the height and width of its image."""
        content, name = self.source.read(index), self.source.name(index)
        if may_be_cut(content):
            decode_image(content, name)
        return content, image_size(content, name)

    def _finish(self, encoded: _Encoded, outputs: Any) -> Tensor:
        size = self.framing.size
        images = self._buffers.empty((len(encoded.samples), 3, size, size), torch.uint8)
        boxes = encoded.boxes.copy()
        boxes[:, :2] -= encoded.regions[:, :2]
        for place, (box, mirror) in enumerate(zip(boxes.tolist(), encoded.mirror, strict=True)):
            cut_out(np.asarray(outputs[0][place]), box, bool(mirror), images[place])
        return images

    def _explain(self, encoded: _Encoded, error: RuntimeError) -> Exception:
        """Which file of a batch DALI could not decode, or what else is wrong."""
        for index, content in zip(encoded.samples, encoded.contents, strict=True):
            try:
                decode_image(content, self.source.name(index))
            except ValueError as found:
                return found
        reason = told(error)
        refused = next((i for i in encoded.samples if not self._decodes(i)), None)
        # Where no file can be decoded, it is not the file: memory is short, or the device fails.
        if refused is not None and any(map(self._decodes, encoded.samples)):
            return ValueError(
                f"{self.source.name(refused)}: DALI cannot decode it, though Pillow can; "
                f"--data.loader dataloader reads it; DALI says: {reason}"
            )
        kind = torch.OutOfMemoryError if "out of memory" in str(error) else RuntimeError
        return kind(f"DALI cannot make a batch of {len(encoded.samples)} images: {reason}")

    def _decodes(self, index: int) -> bool:
        """Whether DALI can decode a file alone."""
        content = self.source.read(index)
        height, width = image_size(content, self.source.name(index))
        pipeline = image_pipeline(self.framing, batch_size=1, num_threads=1, device=self.device)
        inputs: Inputs = {
            "encoded": [np.frombuffer(content, np.uint8)],
            "region": [np.array([0, 0, height, width], np.int32)],
            "shift": [np.zeros(2, np.int32)],
            "mirror": [np.int32(0)],
        }
        for _, outputs in DaliStream(lambda: pipeline, self.device).run([(None, inputs)]):
            if isinstance(outputs, RuntimeError):
                return False
        return True


def may_be_cut(content: bytes) -> bool:
    """Whether a file can lack its end without DALI noticing, which decodes no more than the part
    that is asked for: a TIFF, or a JPEG whose last scan has no end marker."""
    if content.startswith((b"II*\0", b"MM\0*")):
        return True
    if not content.startswith(b"\xff\xd8") or content.endswith(b"\xff\xd9"):
        return False
    return content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda")


def told(error: RuntimeError) -> str:
    """What DALI says of an error, in one line, without where it was in which file of whose."""
    text = str(error).partition("encountered:")[2] or str(error)
    lines = map(str.strip, text.partition("Stacktrace")[0].splitlines())
    said = (line for line in lines if not line.startswith(("Critical error", "Current pipeline")))
    return " ".join(filter(None, said))[:300]


def inside(
    boxes: npt.NDArray[np.int64], heights: npt.ArrayLike, widths: npt.ArrayLike
) -> npt.NDArray[np.int64]:
    """The part of each box (N, 4) that lies in its image, at least one pixel of the image."""
    h, w = np.asarray(heights), np.asarray(widths)
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
    pipeline = _pipeline(batch_size, num_threads, device)
    with pipeline:
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
            size = [framing.size, framing.size]
            if framing.kind == "resized":
                images = fn.resize(
                    images, size=size, interp_type=types.INTERP_LINEAR, antialias=True
                )
            else:
                images = fn.slice(
                    images,
                    start=shift,
                    shape=size,
                    axis_names="HW",
                    out_of_bounds_policy="pad",
                    fill_values=0,
                )
            images = fn.transpose(fn.flip(images, horizontal=mirror), perm=[2, 0, 1])
        # An input that nothing depends on could not be fed.
        pipeline.set_outputs(images, shift, mirror)
    pipeline.build()
    return pipeline


def array_pipeline(
    *, batch_size: int, num_threads: int, size: tuple[int, int], device: torch.device
) -> Any:
    """A DALI pipeline with the inputs "images" (height, width, channels), "start" (first row and
    column of the crop, beyond the image there are zeros) and "mirror" (0 or 1); what comes out is
    (channels, height, width), uint8.

    Args:
        batch_size: the largest batch.
        num_threads: of the CPU, >= 1.
        size: height and width of the images.
        device: which crops and mirrors.
    """
    from nvidia.dali import fn, types

    on_gpu = device.type == "cuda"
    pipeline = _pipeline(batch_size, num_threads, device)
    with pipeline:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
        cropped = fn.slice(
            images.gpu() if on_gpu else images,
            start=start,
            shape=list(size),
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=0,
        )
        flipped = fn.flip(fn.reinterpret(cropped, layout="HWC"), horizontal=mirror)
        pipeline.set_outputs(fn.transpose(flipped, perm=[2, 0, 1]))
    pipeline.build()
    return pipeline


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
