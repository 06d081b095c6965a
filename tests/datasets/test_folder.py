from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from arat_fast.config import DataConfig
from arat_fast.data import Batch, DataSplits, LoaderBatches, load_data
from arat_fast.data.framing import Framing
from arat_fast.datasets.encoded import FileImages
from arat_fast.datasets.imagenette import CLASSES as IMAGENETTE_CLASSES

CPU = torch.device("cpu")


def load(root: Path, seed: int = 0, **options: Any) -> DataSplits:
    defaults = {"batch_size": 6, "image_size": 16, "num_workers": 0, "loader": "dataloader"}
    options = {**defaults, **options}
    config = DataConfig(name="imagenette", root=root, **options)
    return load_data(config, device=CPU, seed=seed, eval_batch_size=7)


def files(split: Any) -> list[Path]:
    assert isinstance(split, LoaderBatches) and isinstance(split.source, FileImages)
    return [path for path, _ in split.source.samples]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p.x, q.x) and torch.equal(p.y, q.y) for p, q in zip(a, b, strict=True)
    )


def crops(path: Path, size: int, num_epochs: int, **options: Any) -> list[Tensor]:
    framing = Framing(size, random=True, **options)
    batches = LoaderBatches(FileImages([(path, 0)]), ("a",), framing, batch_size=1, device=CPU)
    return [next(batches.epoch(epoch)).x[0] for epoch in range(num_epochs)]


def test_test_images_are_centre_crops(published: Any, tmp_path: Path) -> None:
    folder = published.imagenette()
    splits = load(tmp_path)
    batches = list(splits.test.epoch(0))
    x, y = torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])
    paths = files(splits.test)
    assert sorted(paths) == sorted((folder / "val").rglob("*.JPEG"))
    assert [list(IMAGENETTE_CLASSES)[label] for label in y.tolist()] == [
        p.parent.name for p in paths
    ]
    assert len(paths) == len(x) == splits.test.num_samples == 20
    for image, path in zip(x, paths, strict=True):
        with Image.open(path) as file:
            expected = F.center_crop(F.pil_to_tensor(file.convert("RGB")), [16, 16])
        assert torch.equal(image, expected.float() / 255)
    assert splits.test.image_shape == (3, 16, 16)
    assert splits.test.classes == tuple(IMAGENETTE_CLASSES.values())
    assert same(batches, list(splits.test.epoch(3)))


def test_first_images_to_evaluate_are_of_all_classes(published: Any, tmp_path: Path) -> None:
    published.imagenette(per_class=12)
    splits = load(tmp_path, num_val=60)
    again = load(tmp_path, num_val=60, seed=9)
    for part, other, first in ((splits.test, again.test, 40), (splits.val, again.val, 30)):
        assert files(part) == files(other)
        assert isinstance(part, LoaderBatches)
        assert set(part.source.labels[:first].tolist()) == set(range(10))
        assert len(set(part.source.labels[:16].tolist())) > 5


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), size=st.integers(1, 14))
def test_centre_crop_of_any_size_is_torchvisions(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, size: int
) -> None:
    path = tmp_path_factory.mktemp("images") / "image.png"
    pixels = np.random.default_rng(4).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    batches = LoaderBatches(
        FileImages([(path, 0)]), ("a",), Framing(size), batch_size=1, device=CPU
    )
    expected = F.center_crop(torch.from_numpy(pixels).permute(2, 0, 1), [size, size])
    assert torch.equal(next(batches.pixels(0))[0][0], expected)


def positions(length: int, size: int, padding: int) -> set[int]:
    """Where a random crop may start, counted from the image: torchvision's RandomCrop with
    pad_if_needed adds what is missing on both sides."""
    missing = max(size - length - 2 * padding, 0)
    padding += missing
    return {start - padding for start in range(length + 2 * padding - size + 1)}


@pytest.mark.parametrize(
    ("height", "width", "size", "padding"), [(7, 5, 4, 0), (5, 6, 4, 2), (3, 6, 5, 0), (3, 3, 6, 1)]
)
def test_random_crops_cover_every_place_and_nothing_else(
    tmp_path: Path, height: int, width: int, size: int, padding: int
) -> None:
    path = tmp_path / "image.png"
    pixels = np.random.default_rng(7).integers(1, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    canvas = np.zeros((height + 40, width + 40, 3), np.uint8)
    canvas[20 : 20 + height, 20 : 20 + width] = pixels
    possible = {
        canvas[20 + top : 20 + top + size, 20 + left : 20 + left + size]
        .transpose(2, 0, 1)
        .tobytes()
        for top in positions(height, size, padding)
        for left in positions(width, size, padding)
    }
    seen = crops(path, size, 600, padding=padding)
    assert {(255 * x).round().to(torch.uint8).numpy().tobytes() for x in seen} == possible


def test_flips_are_half_and_places_uniform(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    ramp = (
        np.tile(np.arange(1, 13, dtype=np.uint8), (12, 1))
        + 20 * np.arange(12, dtype=np.uint8)[:, None]
    )
    Image.fromarray(ramp).save(path)
    seen = torch.stack(crops(path, 9, 3000, flip=True))[:, 0] * 255
    mirrored = (seen[:, 0, 1] < seen[:, 0, 0]).long()
    corner = torch.minimum(seen[:, 0, 0], seen[:, 0, -1]).round().long() - 1
    outcomes = ((corner // 20) * 4 + corner % 20) * 2 + mirrored
    counts = torch.bincount(outcomes, minlength=32)
    assert len(counts) == 32
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_workers_change_nothing_and_leave_the_global_generator(
    published: Any, tmp_path: Path
) -> None:
    published.imagenette()
    here, there = load(tmp_path, num_workers=0), load(tmp_path, num_workers=2)
    state = torch.get_rng_state()
    assert same(list(here.train.epoch(2)), list(there.train.epoch(2)))
    assert same(list(here.train.epoch(2, 3)), list(there.train.epoch(2, 3)))
    assert torch.equal(state, torch.get_rng_state())


def test_interrupt_of_the_workers_loses_no_batch(published: Any, tmp_path: Path) -> None:
    published.imagenette()
    expected = list(load(tmp_path, batch_size=2).train.epoch(0))
    batches = load(tmp_path, batch_size=2, num_workers=2).train.epoch(0)
    first = [next(batches), next(batches)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
    assert same(expected, [*first, *batches])


def test_held_out_images(published: Any, tmp_path: Path) -> None:
    published.imagenette(per_class=3)
    splits = load(tmp_path, num_val=10, seed=4)
    assert isinstance(splits.val, LoaderBatches)
    train, val = (set(files(part)) for part in (splits.train, splits.val))
    assert not train & val and len(train) == 20 and len(val) == 10
    assert sorted(splits.val.source.labels.tolist()) == list(range(10))
    assert files(load(tmp_path, num_val=10, seed=5).val) == files(splits.val)
    assert [len(b.y) for b in splits.val.epoch(0)] == [7, 3]
    with pytest.raises(ValueError, match="at most 20 .* got 21"):
        load(tmp_path, num_val=21)


def test_last_training_batch_of_one_is_left_out(published: Any, tmp_path: Path) -> None:
    published.imagenette()
    splits = load(tmp_path, batch_size=19)
    assert [len(b.y) for b in splits.train.epoch(0)] == [19]
    assert [len(b.y) for b in load(tmp_path, batch_size=128).train.epoch(0)] == [20]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_image_is_named_in_one_line(
    published: Any, tmp_path: Path, damage: str, num_workers: int
) -> None:
    published.imagenette()
    test = load(tmp_path).test
    path = files(test)[9]
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) - 60], "empty": b""}.get(damage, b"text"))
    batches = load(tmp_path, num_workers=num_workers).test.epoch(0)
    assert len(next(batches).y) == 7
    with pytest.raises(ValueError) as error:
        next(batches)
    text = str(error.value)
    assert str(path) in text and "expected an image file" in text and "\n" not in text


def test_image_that_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone.JPEG"):
        FileImages([(tmp_path / "gone.JPEG", 0)]).read(0)


def test_missing_pieces_are_named(published: Any, tmp_path: Path) -> None:
    folder = published.imagenette()
    empty = folder / "train" / "n03000684"
    for file in empty.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="n03000684: expected .JPEG images .chain saw., got none"):
        load(tmp_path)
    empty.rmdir()
    with pytest.raises(ValueError, match="n03000684: expected .JPEG images"):
        load(tmp_path)


def test_unknown_class_folder_is_named(published: Any, tmp_path: Path) -> None:
    folder = published.imagenette()
    (folder / "val" / ".cache").mkdir()
    load(tmp_path)
    (folder / "val" / "n99999999").mkdir()
    with pytest.raises(ValueError, match="expected the class folders .*, got n99999999"):
        load(tmp_path)


def test_empty_folder_names_the_absent_split(tmp_path: Path) -> None:
    (tmp_path / "imagenette2-160").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path)
    text = str(error.value)
    assert str(tmp_path / "imagenette2-160" / "train") in text and "--data.download" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"samples": []}, "empty"),
        ({"samples": [(Path("a.JPEG"), 2)]}, r"\[0, 1\], got 2 for a.JPEG"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    arguments = {"samples": [(Path("a.JPEG"), 0)], "batch_size": 2, "image_size": 8, **options}
    source = FileImages(arguments["samples"])
    with pytest.raises(ValueError, match=message):
        LoaderBatches(
            source,
            ("a", "b"),
            Framing(arguments["image_size"]),
            batch_size=arguments["batch_size"],
            device=CPU,
        )
