"""What goes wrong with DALI where one does not look."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import CPU, collect, levels, needs_dali, refused, same
from pictures import encoded, picture
from torch import Tensor

from arat_fast.data import BatchPlan, DaliBatches, Framing, LoaderBatches
from arat_fast.data.dali import (
    DaliStream,
    as_tensor,
    image_pipeline,
)
from arat_fast.datasets.decoding import decode_image
from arat_fast.datasets.encoded import EncodedImages

pytestmark = needs_dali


def files(folder: Path, number: int, suffix: str = ".jpg") -> EncodedImages:
    paths = [folder / f"{index:03}{suffix}" for index in range(number)]
    for index, path in enumerate(paths):
        path.write_bytes(encoded(picture(index), suffix))
    return EncodedImages(paths, torch.arange(number) % 2)


RESIZED = Framing(24, "resized", random=True, flip=True)


def make(
    source: EncodedImages, framing: Framing = RESIZED, batch_size: int = 6, shuffle: bool = False
) -> Any:
    plan = BatchPlan(len(source), batch_size, shuffle=shuffle)
    return DaliBatches(source, ("a", "b"), plan, framing, device=CPU, num_workers=2)


def test_every_epoch_has_the_same_length_and_every_image_once(tmp_path: Path) -> None:
    """DALI's readers wrap around or pad where the size does not divide."""
    source = files(tmp_path, 20, ".png")
    seen = set()
    for shuffle in (False, True):
        batches = make(source, Framing(24, "pad"), shuffle=shuffle)
        for epoch in range(4):
            assert [len(y) for _, y in batches.epoch(epoch)] == [6, 6, 6, 2] and len(batches) == 4
            seen.add(frozenset(x.numpy().tobytes() for x in collect(batches, epoch)[0]))
    assert len(seen) == 1 and len(*seen) == 20
    dropped = make(source.subset(torch.arange(19)), shuffle=True)
    assert [[len(y) for _, y in dropped.epoch(e)] for e in range(3)] == [[6, 6, 6]] * 3


def test_a_pipeline_is_left_and_begun_again_at_any_batch(tmp_path: Path) -> None:
    """DALI ignores a reset before the end of an epoch, and has prepared batches ahead."""
    source = files(tmp_path, 26)
    expected = [list(make(source, shuffle=True).epoch(epoch)) for epoch in range(3)]
    train = make(source, shuffle=True)
    for epoch, start, taken in ((0, 0, 1), (0, 0, 2), (1, 1, 3), (2, 3, 1), (1, 0, 0), (0, 4, 1)):
        batches = train.epoch(epoch, start)
        some = [next(batches) for _ in range(taken)]
        assert same(some, expected[epoch][start : start + taken])
        batches.close()
    assert same(train.epoch(1), expected[1])


@pytest.mark.parametrize("kind", ["pad", "resized"])
def test_the_pipeline_of_a_gpu_computed_by_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """It scales, mirrors and transposes too; its scaling rounds once, PyTorch's twice."""
    source = files(tmp_path, 14)
    framing = Framing(48, kind, random=True, padding=5, flip=True)
    plan = BatchPlan(14, 6, shuffle=True)
    expected = LoaderBatches(source, ("a", "b"), plan, framing, device=CPU)
    whole = partial(image_pipeline, whole=True)
    monkeypatch.setattr("arat_fast.data.dali.image_pipeline", whole)
    batches = make(source, framing, shuffle=True)
    monkeypatch.setattr(batches, "finish", lambda batch, outputs: as_tensor(outputs))
    difference = (levels(collect(batches)[0]).int() - levels(collect(expected)[0]).int()).abs()
    assert int(difference.max()) <= (0 if kind == "pad" else 3)
    assert float((difference > 1).float().mean()) < 1e-3


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_a_file_that_is_no_image_is_named_and_the_loader_goes_on(tmp_path: Path, kind: str) -> None:
    source = files(tmp_path, 20)
    path = source.files[8]
    content = path.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image " * 40}
    path.write_bytes(damaged[kind])
    test = make(source)
    for _ in range(2):
        batches = test.epoch(0)
        assert len(next(batches).y) == 6
        with refused(f"{path}.*image file"):
            list(batches)
    path.write_bytes(content)
    assert [len(y) for _, y in test.epoch(0)] == [6, 6, 6, 2]


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
    batches = make(EncodedImages([path], torch.tensor([0])), TopLeft(16, "pad"), batch_size=1)
    with refused("cut.jpg.* truncated"):
        list(batches.epoch(0))
    for more in (b"", bytes(100)):
        path.write_bytes(content.getvalue() + more)
        assert len(list(batches.epoch(0))) == 1


def test_what_dali_refuses_is_decoded_by_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GIF stands for files whose headers promise what DALI can decode."""
    source = files(tmp_path, 20, ".png")
    for index in (3, 8, 9):
        picture(1).save(source.files[index], "GIF")
    plan = BatchPlan(20, 6, shuffle=True)
    expected = LoaderBatches(source, ("a", "b"), plan, RESIZED, device=CPU)
    unseen: list[str] = []

    def for_dali(content: bytes, name: str) -> tuple[bytes, int, int]:
        unseen.append(name)
        height, width, _ = decode_image(content, name).shape
        return content, height, width

    monkeypatch.setattr("arat_fast.data.dali.for_dali", for_dali)
    batches = make(source, shuffle=True)
    for epoch in (0, 0, 1):
        assert same(batches.epoch(epoch), expected.epoch(epoch))
    assert unseen[-17:] and not {str(source.files[i]) for i in (3, 8, 9)} & set(unseen[-17:])


def test_an_error_that_is_not_the_files_blames_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = DaliStream.run

    def failing(self: DaliStream, batches: Any) -> Any:
        for label, outputs in run(self, batches):
            # A file alone, by which its reader is found out, can be decoded.
            failed = RuntimeError("Critical error in pipeline:\nCUDA error\nout of memory")
            yield label, outputs if label is None else failed

    batches = make(files(tmp_path, 7))
    monkeypatch.setattr(DaliStream, "run", failing)
    with pytest.raises(torch.OutOfMemoryError) as error:
        list(batches.epoch(0))
    assert ".jpg" not in str(error.value) and "\n" not in str(error.value)
