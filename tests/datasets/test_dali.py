"""What goes wrong with DALI where one does not look."""

from __future__ import annotations

import io
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import encoded, image_folder, picture
from torch import Tensor

from arat_fast.config import DataConfig
from arat_fast.data import BatchPlan, DaliBatches, LoaderBatches, StreamedBatches, load_data
from arat_fast.data.dali import (
    DaliStream,
    as_tensor,
    has_dali,
    image_pipeline,
)
from arat_fast.data.framing import Framing
from arat_fast.datasets.encoded import FileImages
from arat_fast.datasets.rows import ArrayRows

pytestmark = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
CPU = torch.device("cpu")


def files(folder: Path, number: int, suffix: str = ".jpg") -> FileImages:
    samples = []
    for index in range(number):
        path = folder / f"{index:03}{suffix}"
        path.write_bytes(encoded(picture(index), suffix))
        samples.append((path, index % 2))
    return FileImages(samples)


def make(source: FileImages, **options: Any) -> DaliBatches:
    framing = options.pop("framing", Framing(24, "resized", random=True, flip=True))
    defaults: dict[str, Any] = {"batch_size": 6, "device": CPU, "num_workers": 2}
    return DaliBatches(source, ("a", "b"), framing, **{**defaults, **options})


def test_every_epoch_has_the_same_length_and_every_image_once(tmp_path: Path) -> None:
    """DALI's readers wrap around or pad where the size does not divide."""
    source = files(tmp_path, 20, ".png")
    framing = Framing(24, "pad")
    test, train = make(source, framing=framing), make(source, framing=framing, shuffle=True)
    seen = {x.numpy().tobytes() for batch, _ in test.pixels(0) for x in batch}
    assert len(seen) == 20
    for epoch in range(4):
        partial_sizes = [len(y) for _, y in test.pixels(epoch)]
        assert partial_sizes == [6, 6, 6, 2] and len(test) == 4
        batches = list(train.pixels(epoch))
        assert [len(y) for _, y in batches] == [6, 6, 6, 2]
        assert {x.numpy().tobytes() for batch, _ in batches for x in batch} == seen
    dropped = make(FileImages(source.samples[:19]), shuffle=True)
    assert [[len(y) for _, y in dropped.pixels(e)] for e in range(3)] == [[6, 6, 6]] * 3


def orders(option: str, seed: int, number: int = 16) -> list[list[int]]:
    """The labels of three epochs of DALI's own file reader."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(batch_size=number, num_threads=1, device_id=None, seed=seed)
    with pipeline:
        _, labels = fn.readers.file(
            files=[__file__] * number, labels=list(range(number)), **{option: True}
        )
        pipeline.set_outputs(labels)
    pipeline.build()
    return [
        [int(np.asarray(pipeline_labels)[0]) for pipeline_labels in outputs]
        for (outputs,) in (pipeline.run() for _ in range(3))
    ]


def test_dalis_own_shuffle_ignores_the_seed_and_ours_does_not(tmp_path: Path) -> None:
    assert orders("shuffle_after_epoch", 1) == orders("shuffle_after_epoch", 2)
    source = files(tmp_path, 20)
    batches = [make(source, shuffle=True, seed=seed) for seed in (1, 1, 2)]
    labels = [[y.tolist() for _, y in one.pixels(2)] for one in batches]
    assert labels[0] == labels[1] != labels[2]


def test_a_pipeline_is_left_and_begun_again_at_any_batch(tmp_path: Path) -> None:
    """DALI ignores a reset before the end of an epoch, and has prepared batches ahead."""
    source = files(tmp_path, 26)
    expected = [list(make(source, shuffle=True).pixels(epoch)) for epoch in range(3)]
    train = make(source, shuffle=True)
    for epoch, start, taken in ((0, 0, 1), (0, 0, 2), (1, 1, 3), (2, 3, 1), (1, 0, 0), (0, 4, 1)):
        batches = train.pixels(epoch, start)
        for number in range(start, start + taken):
            x, y = next(batches)
            assert torch.equal(x, expected[epoch][number][0])
            assert torch.equal(y, expected[epoch][number][1])
        batches.close()  # type: ignore[attr-defined]
    whole = list(train.pixels(1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole, expected[1], strict=True))


def test_the_cpu_pipeline_is_chosen_and_asks_for_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvidia import dali

    made: list[dict[str, Any]] = []
    devices: list[str] = []
    build, decode = dali.Pipeline.__init__, dali.fn.decoders.image_slice

    def initialise(self: Any, *args: Any, **keywords: Any) -> None:
        made.append(keywords)
        build(self, *args, **keywords)

    def image_slice(*args: Any, **keywords: Any) -> Any:
        devices.append(keywords["device"])
        return decode(*args, **keywords)

    monkeypatch.setattr(dali.Pipeline, "__init__", initialise)
    monkeypatch.setattr(dali.fn.decoders, "image_slice", image_slice)
    list(make(files(tmp_path, 4)).pixels(0))
    assert [keywords["device_id"] for keywords in made] == [None] and devices == ["cpu"]


@pytest.mark.parametrize("kind", ["pad", "resized"])
def test_the_pipeline_of_a_gpu_computed_by_the_cpu(tmp_path: Path, kind: Any) -> None:
    """It scales, mirrors and transposes too; its scaling rounds once, PyTorch's twice."""
    source = files(tmp_path, 14)
    framing = Framing(48, kind, random=True, padding=5, flip=True)
    expected = LoaderBatches(source, ("a", "b"), framing, batch_size=6, device=CPU, shuffle=True)
    batches = make(source, framing=framing, shuffle=True)
    stream = DaliStream(
        partial(image_pipeline, framing, batch_size=6, num_threads=1, device=CPU, whole=True),
        CPU,
    )
    fed = [batches.feed(1, number) for number in range(len(batches))]
    for (_, outputs), (x, _) in zip(stream.run(fed), expected.pixels(1), strict=True):
        difference = (as_tensor(outputs).int() - x.int()).abs()
        assert int(difference.max()) <= (0 if kind == "pad" else 3)
        assert float((difference > 1).float().mean()) < 1e-3


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image " * 40}[kind]
    )


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_a_file_that_is_no_image_is_named_and_the_loader_goes_on(tmp_path: Path, kind: str) -> None:
    source = files(tmp_path, 20)
    path = source.samples[8][0]
    content = path.read_bytes()
    damage(path, kind)
    test = make(source)
    for _ in range(2):
        batches = test.pixels(0)
        assert len(next(batches)[1]) == 6
        with pytest.raises(ValueError) as error:
            list(batches)
        text = str(error.value)
        assert str(path) in text and "expected an image file" in text and "\n" not in text
    path.write_bytes(content)
    assert [len(y) for _, y in test.pixels(0)] == [6, 6, 6, 2]


class TopLeft(Framing):
    def place(self, heights: Any, widths: Any, draws: Tensor) -> Any:
        boxes, mirror = super().place(heights, widths, draws)
        return boxes * [0, 0, 1, 1], mirror


@pytest.mark.parametrize(("kind", "cut"), [("JPEG", 2), ("JPEG", 9000), ("TIFF", 9000)])
def test_a_file_cut_below_the_part_that_is_decoded_is_named(
    tmp_path: Path, kind: str, cut: int
) -> None:
    """The first rows are whole, and DALI looks no further."""
    content = io.BytesIO()
    picture(3, 600, 400).save(content, kind)
    path = tmp_path / "cut.jpg"
    path.write_bytes(content.getvalue()[:-cut])
    source = FileImages([(path, 0)])
    batches = make(source, framing=TopLeft(16, "pad"), batch_size=1)
    with pytest.raises(ValueError, match="cut.jpg: expected an image file.* truncated") as error:
        list(batches.pixels(0))
    assert "\n" not in str(error.value)
    path.write_bytes(content.getvalue())
    assert len(list(batches.pixels(0))) == 1
    path.write_bytes(content.getvalue() + bytes(100))
    assert len(list(batches.pixels(0))) == 1


def test_a_file_that_only_pillow_reads_is_named(tmp_path: Path) -> None:
    source = files(tmp_path, 7)
    path = source.samples[5][0]
    picture(1).save(path, "GIF")
    with pytest.raises(ValueError, match="dataloader reads it; DALI says: .") as error:
        list(make(source).pixels(0))
    text = str(error.value)
    assert str(path) in text and "\n" not in text


def test_files_are_read_by_as_many_threads_as_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = files(tmp_path, 12)
    expected = [y.tolist() for _, y in make(source).pixels(0)]
    read, together = FileImages.read, threading.Barrier(3)

    def waiting(self: FileImages, index: int) -> bytes:
        together.wait(20)
        return read(self, index)

    monkeypatch.setattr(FileImages, "read", waiting)
    assert [y.tolist() for _, y in make(source, num_workers=3).pixels(0)] == expected


@pytest.mark.parametrize("decodable", [True, False])
def test_an_error_that_is_not_the_files_blames_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decodable: bool
) -> None:
    """Every file can be decoded alone, or none can."""
    run, alone = DaliStream.run, DaliBatches._decodes

    def failing(self: DaliStream, batches: Any) -> Any:
        for label, _ in run(self, batches):
            yield label, RuntimeError("Critical error in pipeline:\nCUDA error\nout of memory")

    batches = make(files(tmp_path, 7))
    with monkeypatch.context() as patch:
        patch.setattr(DaliStream, "run", failing)
        patch.setattr(DaliBatches, "_decodes", lambda *_: decodable)
        with pytest.raises(RuntimeError, match="of 6 images: .*CUDA error out of memory") as error:
            list(batches.pixels(0))
    text = str(error.value)
    assert ".jpg" not in text and "\n" not in text
    assert isinstance(error.value, torch.OutOfMemoryError)
    assert alone(batches, 0)


def test_arrays_are_read_ahead_in_a_thread() -> None:
    threads = []

    class Watched(ArrayRows):
        def take(self, index: Any) -> Any:
            threads.append(threading.current_thread())
            return super().take(index)

    rows = Watched(np.zeros((10, 4, 4, 3), np.uint8))
    plan = BatchPlan(10, 2)
    batches = StreamedBatches(
        rows, torch.arange(10), tuple("0123456789"), plan, device=CPU, loader="dali"
    )
    assert [y.tolist() for _, y in batches.epoch(0)] == [[i, i + 1] for i in range(0, 10, 2)]
    assert len(threads) == 5 and threading.current_thread() not in threads


def test_arrays_through_the_callback_source_resume_from_a_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 9, 7, 3), dtype=np.uint8)
    labels = torch.arange(40) % 4

    def batches(seed: int) -> StreamedBatches:
        plan = BatchPlan(40, 6, shuffle=True, seed=seed)
        return StreamedBatches(
            ArrayRows(pixels),
            labels,
            tuple("abcd"),
            plan,
            device=CPU,
            loader="dali",
            padding=2,
            flip=True,
        )

    def tensors(epoch: Any) -> list[Tensor]:
        return [torch.cat([x.flatten(), y.float()]) for x, y in epoch]

    whole = tensors(batches(3).epoch(2))
    assert [len(x) for x in whole] == [6 * 190] * 6 + [4 * 190]
    for start in range(8):
        resumed = tensors(batches(3).epoch(2, start))
        assert len(resumed) == 7 - start
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))
    assert not torch.equal(whole[0], tensors(batches(4).epoch(2))[0])


def test_without_dali_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "set")
    monkeypatch.setattr("arat_fast.data.dali.has_dali", lambda: False)
    monkeypatch.setattr("arat_fast.data.load.has_dali", lambda: False)
    options: dict[str, Any] = {"name": "folder", "root": root, "image_size": 16}
    with pytest.raises(ValueError, match=r"'\.\[dali\]'.*dataloader"):
        load_data(DataConfig(**options, loader="dali"), device=CPU, seed=0, eval_batch_size=4)
    splits = load_data(DataConfig(**options), device=CPU, seed=0, eval_batch_size=4)
    assert isinstance(splits.train, LoaderBatches)
