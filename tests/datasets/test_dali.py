"""What goes wrong with DALI where one does not look."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import encoded, picture
from torch import Tensor

from arat_fast.data import DaliBatches, LoaderBatches
from arat_fast.data.dali import (
    DaliStream,
    as_tensor,
    has_dali,
    image_pipeline,
)
from arat_fast.data.framing import Framing
from arat_fast.datasets.encoded import FileImages

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
    with pytest.raises(torch.OutOfMemoryError, match="of 6 images: .*out of memory") as error:
        list(batches.pixels(0))
    text = str(error.value)
    assert ".jpg" not in text and "\n" not in text
