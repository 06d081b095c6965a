"""Datasets on disk, and what is wrong with them."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import CLASSES, add_member, encoded, image_folder, picture, tar_shard
from PIL import Image

from arat_fast.config import DataConfig
from arat_fast.data import DataSplits, MixedPlan, Shard, load_data
from arat_fast.data.bad_images import BadImages
from arat_fast.data.dali import has_dali
from arat_fast.data.holdout import stratified_split
from arat_fast.data.prepare import convert_npz, verify
from arat_fast.datasets.encoded import decode_image
from arat_fast.datasets.folder import class_folders
from arat_fast.datasets.rows import MappedRows
from arat_fast.datasets.webdataset import tar_shards

CPU = torch.device("cpu")
LOADERS = [
    "dataloader",
    pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="no DALI")),
]


def load(name: str, root: Path, **options: Any) -> DataSplits:
    defaults = {"batch_size": 6, "image_size": 24, "num_workers": 0, "loader": "dataloader"}
    found = options.pop("found", None)
    config = DataConfig(name=name, root=root, **{**defaults, **options})  # type: ignore[arg-type]
    return load_data(config, device=CPU, seed=0, eval_batch_size=7, bad_images=found)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Class folders


def test_folder_with_splits(tmp_path: Path) -> None:
    splits = load("folder", image_folder(tmp_path / "set"))
    assert splits.train.classes == CLASSES
    assert splits.train.num_samples == splits.test.num_samples == 15
    assert splits.train.image_shape == (3, 24, 24)


def test_folder_without_splits_holds_out_a_tenth(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", per_class=20, splits=(".",))
    splits = load("folder", root)
    assert splits.train.num_samples == 54 and splits.test.num_samples == 6
    labels = torch.cat([y for _, y in splits.test.epoch(0)])
    assert torch.bincount(labels).tolist() == [2, 2, 2]
    train = {x.numpy().tobytes() for b in splits.train.epoch(0) for x in b.x}
    assert not train & {x.numpy().tobytes() for b in splits.test.epoch(0) for x in b.x}


def emptied(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "val/dog").rename(root / "val/wolf"), "got wolf too"),
        (lambda root: (root / "val/dog").rename(root / "dog"), "val/dog: expected images"),
        (lambda root: (root / "train").rename(root / "learn"), "folder train beside val"),
        (lambda root: (root / "train").rename(root / "test"), "folder train beside test"),
        (lambda root: image_folder(root, splits=("training",)), "got train and training"),
        (lambda root: (root / "train").rename(root.parent / "gone" / "train"), "for each class"),
        (lambda root: root.rename(root.parent / "moved"), "no folder"),
        (lambda root: emptied(root / "train/dog"), "no image with label 1 can be read; .*dog"),
        (lambda root: emptied(root / "val"), "no image with label 0 can be read; .*val/cat"),
    ],
)
def test_folders_that_do_not_go_together_are_named(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    root = image_folder(tmp_path / "set")
    (tmp_path / "gone").mkdir()
    if "for each class" in message:
        (root / "val").rename(tmp_path / "gone" / "val")
    change(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load("folder", root, bad_images="skip")
    one_line(error)


def test_splits_in_other_words_are_the_same(tmp_path: Path) -> None:
    splits = load("folder", image_folder(tmp_path / "set", splits=("Train", "Validation")))
    assert splits.train.classes == CLASSES
    assert splits.val is None and splits.train.num_samples == splits.test.num_samples == 15


def test_a_class_can_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        for index in range(10):
            (tmp_path / name).mkdir(exist_ok=True)
            picture(index).save(tmp_path / name / f"{index}.png")
    assert class_folders(tmp_path).classes == ("bus", "train")


@pytest.mark.parametrize("loader", ["dataloader", "resident"])
def test_val_and_test_are_both_used(tmp_path: Path, loader: str) -> None:
    for split, number in (("train", 4), ("val", 3), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(number):
                path = tmp_path / split / name / f"{index}.png"
                Image.new("RGB", (24, 24), (number, label, index)).save(path)
    options: dict[str, Any] = {"crop": "pad", "loader": loader}
    splits = load("folder", tmp_path, **options)
    assert splits.val is not None
    for part, number in ((splits.train, 4), (splits.val, 3), (splits.test, 2)):
        assert part.num_samples == 3 * number
        red = {round(float(255 * x[0].max())) for batch in part.epoch(0) for x in batch.x}
        assert red == {number}
    with pytest.raises(ValueError, match="validation images of its own, .* data.num_val 0, got 2"):
        load("folder", tmp_path, num_val=2, **options)


@pytest.mark.parametrize("loader", LOADERS)
def test_bad_files_stop_the_run_or_are_skipped_and_counted(tmp_path: Path, loader: str) -> None:
    root = image_folder(tmp_path / "set", suffix=".jpg")
    bad = [root / "train" / "cat" / "0_0.jpg", root / "val" / "owl" / "2_3.jpg"]
    bad[0].write_bytes(bad[0].read_bytes()[:-300])
    bad[1].write_text("<html>not found</html>")
    splits = load("folder", root, loader=loader)
    with pytest.raises(ValueError, match="0_0.jpg: expected an image file") as error:
        list(splits.train.epoch(0))
    one_line(error)
    splits = load("folder", root, loader=loader, bad_images="skip")
    assert len(splits.skipped) == 2
    assert str(bad[0]) in splits.skipped[0] and str(bad[1]) in splits.skipped[1]
    assert splits.train.num_samples == splits.test.num_samples == 14
    assert sum(len(y) for _, y in splits.test.epoch(0)) == 14
    number, reasons = verify(root)
    assert number == 30 and reasons == list(splits.skipped)


class OneOfTwo:
    """A process of two; what rank 0 has told is handed to the other."""

    def __init__(self, is_main: bool, told: list[bytes]) -> None:
        self.is_main, self.told, self.meetings = is_main, told, 0

    def meet(self) -> None:
        self.meetings += 1

    def broadcast_bytes(self, content: bytes | None) -> bytes:
        assert (content is not None) == self.is_main
        if content is not None:
            self.told.append(content)
            return content
        return self.told.pop(0)


def test_one_process_decides_which_files_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(tmp_path / "set")
    bad = root / "train" / "cat" / "0_0.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:-300])
    told: list[bytes] = []
    seen: list[tuple[str, int, int]] = []
    ranks: list[Any] = [OneOfTwo(True, told), OneOfTwo(False, told)]

    def decide(ranks: Any) -> DataSplits:
        config = DataConfig("folder", root, loader="dataloader", image_size=24, bad_images="skip")
        found = BadImages(None, ranks, lambda *progress: seen.append(progress))
        splits = load_data(config, device=CPU, seed=0, eval_batch_size=7, bad_images=found)
        (tmp_path / "bad_images.json").write_text(json.dumps(found.found))
        return splits

    first = decide(ranks[0])
    assert seen[:15] == [("checking files", done, 15) for done in range(1, 16)]
    assert len(seen) == 30 and ranks[0].meetings == 2
    known = BadImages(tmp_path)
    # The file can be read by now: rank 1 and whoever goes on must not look again.
    bad.write_bytes(content)
    second = decide(ranks[1])
    monkeypatch.setattr("arat_fast.data.bad_images.unreadable", None)
    moved = root.rename(tmp_path / "moved")
    third = load("folder", moved, bad_images="skip", found=known)
    assert first.train.num_samples == second.train.num_samples == third.train.num_samples == 14
    assert first.fingerprint == second.fingerprint == third.fingerprint
    assert first.skipped == second.skipped == third.skipped


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("loader", LOADERS)
def test_images_of_every_mode_become_rgb(tmp_path: Path, mode: str, loader: str) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for index in range(2):
            image = picture(index)
            if mode == "I;16":
                grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
                image, expected = Image.fromarray(grey), image.convert("L").convert("RGB")
            else:
                image = image.convert(mode)
                expected = image.convert("RGB")
            suffix = ".jpg" if mode == "CMYK" else ".png"
            content = encoded(image, suffix)
            if mode == "CMYK":
                expected = Image.open(io.BytesIO(content)).convert("RGB")
            (tmp_path / split / "a" / f"{index}{suffix}").write_bytes(content)
            pixels = decode_image(content, "name")
            assert np.abs(pixels.astype(int) - np.asarray(expected)).max() <= 1
    options: dict[str, Any] = {"crop": "pad", "image_size": 40}
    a = load("folder", tmp_path, **options).test
    b = load("folder", tmp_path, loader=loader, **options).test
    for p, q in zip(a.epoch(0), b.epoch(0), strict=True):
        assert float((p.x - q.x).abs().max()) <= 1 / 255


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("crop", ["pad", "resized"])
@pytest.mark.parametrize("loader", LOADERS)
def test_one_pixel_and_a_hundred_million(tmp_path: Path, loader: str, crop: str) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / split / "a" / "small.png")
    large = Image.new("L", (10_000, 10_000), 77)
    large.save(tmp_path / "train" / "a" / "large.png", compress_level=1)
    splits = load("folder", tmp_path, loader=loader, crop=crop)
    ((x, y),) = splits.train.epoch(0)
    assert x.shape == (2, 3, 24, 24) and len(y) == 2
    values = sorted(float(v) for v in (255 * x[:, 0]).amax((1, 2)).round())
    assert values == [9, 77]
    ((x, _),) = splits.test.epoch(0)
    assert float((255 * x).amax()) == pytest.approx(9)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_too_large_to_decode_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (14_000, 12_000)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="name: an image of 12000 x 14000 pixels, .*at most"):
        decode_image(buffer.getvalue(), "name")


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (3, False), (4, True)])
def test_files_of_one_size_can_be_resident(tmp_path: Path, padding: int, flip: bool) -> None:
    for split, first in (("train", 0), ("val", 20)):
        for label, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                image = picture(first + 3 * label + index, 24, 24)
                image.save(tmp_path / split / name / f"{index}.png")
    options: dict[str, Any] = {"crop": "pad", "padding": padding, "flip": flip, "num_val": 3}
    a = load("folder", tmp_path, **options)
    b = load("folder", tmp_path, loader="resident", **options)
    assert a.fingerprint == b.fingerprint
    for split in ("train", "probe", "val", "test"):
        for p, q in zip(getattr(a, split).epoch(1), getattr(b, split).epoch(1), strict=True):
            assert torch.equal(p.x, q.x) and torch.equal(p.y, q.y)
    with pytest.raises(ValueError, match="--data.crop pad"):
        load("folder", tmp_path, loader="resident")
    with pytest.raises(ValueError, match="needs images of 20 x 20 .* got 24 x 24"):
        load("folder", tmp_path, loader="resident", crop="pad", image_size=20)


# Tar shards


def shards(root: Path) -> Path:
    tar_shard(root / "train-0.tar", 0, 6)
    tar_shard(root / "train-1.tar", 6, 5)
    tar_shard(root / "val-0.tar", 11, 4)
    return root


def test_shards_of_both_splits_and_their_class_names(tmp_path: Path) -> None:
    splits = load("webdataset", shards(tmp_path))
    assert splits.train.num_samples == 11 and splits.test.num_samples == 4
    assert splits.train.classes == ("0", "1", "2")
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    assert load("webdataset", tmp_path).train.classes == CLASSES
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="got 2 names"):
        load("webdataset", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, last: content[: last - 1000], "train-1.tar"),
        (lambda content, last: content[: last - 412], "train-1.tar"),
        (lambda content, last: content[: last - 512], "end of the archive"),
        (lambda content, last: content[: last + 512], "end of the archive"),
        (lambda content, last: content + content, "nothing after the end"),
        (lambda content, last: content[:3072] + b"\xff" * 512 + content[3584:], "train-1.tar"),
        (lambda content, last: gzip.compress(content), "uncompressed"),
    ],
)
def test_a_damaged_tar_is_named(
    tmp_path: Path, change: Callable[[bytes, int], bytes], message: str
) -> None:
    path = shards(tmp_path) / "train-1.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1].offset_data
    content = path.read_bytes()
    path.write_bytes(change(content, last))
    with pytest.raises(ValueError, match=message) as error:
        load("webdataset", tmp_path)
    assert str(path) in one_line(error)
    path.write_bytes(content + bytes(5 * 10240))
    assert load("webdataset", tmp_path).train.num_samples == 11


@pytest.mark.parametrize("loader", LOADERS)
def test_a_tar_cut_after_it_was_listed_is_named(tmp_path: Path, loader: str) -> None:
    splits = load("webdataset", shards(tmp_path), loader=loader)
    path = tmp_path / "train-1.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="train-1.tar: sample/000.*: expected .* bytes") as error:
        list(splits.train.epoch(0))
    one_line(error)


def test_thousands_of_shards_are_not_all_kept_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arat_fast.datasets.encoded.OPEN_SHARDS", 3)
    for number in range(12):
        tar_shard(tmp_path / f"{number:02}.tar", 4 * number, 4, ".png")
    images = tar_shards(tmp_path).train
    expected = [encoded(picture(index), ".png") for index in range(48)]
    order = torch.randperm(480, generator=torch.Generator().manual_seed(3)) % 48
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(images.read, order.tolist()))
    assert read == [expected[index] for index in order.tolist()]
    assert num_open(tmp_path) <= 3
    again = pickle.loads(pickle.dumps(images))
    assert [again.read(index) for index in range(48)] == expected
    del images, again
    assert num_open(tmp_path) == 0


def test_shards_are_read_without_pread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.delattr("os.pread")
    images = tar_shards(tar_shard(tmp_path / "a.tar", 0, 5)).train
    assert [images.read(index) for index in (4, 0, 2)] == [
        encoded(picture(index), ".jpg") for index in (4, 0, 2)
    ]


def num_open(folder: Path) -> int:
    """Files in a folder that this process has open; 0 where the system does not tell."""
    number = 0
    for link in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):
            number += link.readlink().parent == folder
    return number


def archive(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            add_member(tar, name, content)
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "expected images with labels, got none"),
        ({"1.cls": b"0"}, "1.cls has no image, expected one of .jpg"),
        ({"1.png": b"image", "1.cls": b"0", "2.cls": b"0"}, "2.cls has no image"),
        (
            {"1.png": b"image", "1.jpg": b"image", "1.cls": b"0"},
            "expected one image for the key 1, got 1.png and 1.jpg",
        ),
        ({"1.png": b"image", "1.cls": b"0", "1.CLS": b"1"}, "1.CLS once, got it twice"),
        ({"1.png": b"image", "1.cls": b"1"}, "train.tar: 1.png: got label 1, expected at most 0"),
        ({"1.png": b"image", "1.cls": b"9" * 30}, "expected a label in .0, 9223372036854775807"),
        ({"1.png": b"image"}, "1.png has no label, expected 1.cls"),
        ({"1.png": b"image", "1.cls": b"cat"}, "1.cls holds b'cat', expected a label"),
        ({"1.png": b"image", "1.cls": b"-1"}, "1.cls holds b'-1', expected a label"),
        (
            {
                f"{i}.{suffix}": b"012"[i % 2 * 2 :][:1]
                for i in range(4)
                for suffix in ("png", "cls")
            },
            "every label from 0 to 2, got none with label 1",
        ),
    ],
)
def test_labels_that_disagree_with_the_images_of_a_shard(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    archive(tmp_path / "train.tar", members)
    with pytest.raises(ValueError, match=message) as error:
        load("webdataset", tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    "names",
    [
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar", None),
        ("training/00.tar", "VAL_set.tar", "my.test.00.tar"),
        ("trainset0.tar", None, "test/a.tar"),
        ("pets-00.tar", None, None),
        ("attestation-0.tar", None, None),
    ],
)
def test_the_split_is_a_word_of_a_shards_name(
    tmp_path: Path, names: tuple[str, str | None, str | None]
) -> None:
    for number, name in enumerate(names):
        if name is not None:
            tar_shard(tmp_path / name, 30 * number, 30 + number)
    found = tar_shards(tmp_path)
    assert len(found.train) == 30
    sizes = [None if part is None else len(part) for part in (found.val, found.test)]
    if names[1] is not None and names[2] is not None:
        assert sizes == [31, 32]
    else:
        assert sizes == [None, 31 if names[1] else 32 if names[2] else None]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no .tar archive"),
        (("train-0.tar", "more.tar"), "more.tar: expected the word train, val or test"),
        (("val-0.tar", "test-0.tar"), "none to train on is there"),
        (("train-0.tar", "train/pets-test-0.tar"), "one split at most, got test and train"),
    ],
)
def test_shards_without_a_clear_split_are_refused(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    for number, name in enumerate(names):
        tar_shard(tmp_path / name, 10 * number, 10)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load("webdataset", tmp_path)
    one_line(error)


def test_labels_of_shards_that_are_not_trained_on_are_named(tmp_path: Path) -> None:
    archive(shards(tmp_path) / "val-0.tar", {"1.png": b"image", "1.cls": b"3"})
    with pytest.raises(ValueError, match="val-0.tar: 1.png: got label 3, which no training image"):
        load("webdataset", tmp_path)


# Arrays


def npz(path: Path, number: int = 50, **changes: Any) -> Path:
    rng = np.random.default_rng(4)
    arrays = {
        "image": rng.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8),
        "label": np.arange(number) % 10,
        **changes,
    }
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_npz_becomes_arrays_that_are_mapped(tmp_path: Path) -> None:
    source = npz(tmp_path / "edm.npz")
    folder = tmp_path / "sub" / "edm"
    assert convert_npz(source, folder) == 50
    assert sorted(p.name for p in folder.iterdir()) == ["images.npy", "labels.npy"]
    with np.load(source) as arrays:
        assert np.array_equal(np.load(folder / "images.npy"), arrays["image"])
        assert np.array_equal(np.load(folder / "labels.npy"), arrays["label"])
    with pytest.raises(FileExistsError, match="there already"):
        convert_npz(source, folder)
    splits = load("arrays", folder)
    assert splits.train.num_samples == 45 and splits.test.num_samples == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "expected the arrays image and label, got image"),
        ({"label": np.arange(49)}, "expected 50 integer labels, .* got int64 of shape .49,."),
        ({"label": np.arange(50) / 2}, "integer labels, .* got float64"),
        ({"label": np.arange(50) - 1}, "labels in \\[0, 2.63\\), got -1"),
        ({"image": np.zeros((50, 3, 4, 4), np.uint8)}, "1 or 3 channels"),
        ({"image": np.zeros((50, 4, 4, 3))}, "float64"),
        (
            {"image": np.zeros((0, 4, 4, 3), np.uint8), "label": np.zeros(0, int)},
            "at least one image",
        ),
    ],
)
def test_npz_that_holds_something_else(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = npz(tmp_path / "edm.npz", **changes)
    with pytest.raises(ValueError, match=message) as error:
        convert_npz(source, tmp_path / "out")
    one_line(error)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edm.npz"]


class Planted:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["image", "label"])
def test_a_pickle_inside_an_npz_never_runs(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    planted = np.array([Planted(mark)] * 50, dtype=object)
    source = npz(tmp_path / "edm.npz", **{name: planted})
    with pytest.raises(ValueError):
        convert_npz(source, tmp_path / "out")
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "images.npy", np.zeros((50, 4, 4, 3), np.uint8))
    np.save(folder / "labels.npy", planted, allow_pickle=True)
    with pytest.raises(ValueError, match="labels.npy"):
        load("arrays", folder)
    assert not mark.exists()


def test_a_memory_map_goes_to_the_device_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "edm"
    convert_npz(npz(tmp_path / "edm.npz"), folder)
    expected = load("arrays", folder)
    taken: list[int] = []
    take = MappedRows.take

    def counted(self: MappedRows, index: Any) -> Any:
        taken.append(len(index))
        return take(self, index)

    monkeypatch.setattr(MappedRows, "take", counted)
    monkeypatch.setattr("arat_fast.data.load._PART", 4 * 32 * 32 * 3)
    splits = load("arrays", folder, loader="resident")
    assert sum(taken) == 50 and max(taken) == 4
    for split in ("train", "test"):
        pairs = zip(getattr(expected, split).epoch(1), getattr(splits, split).epoch(1), strict=True)
        for p, q in pairs:
            assert torch.equal(p.x, q.x) and torch.equal(p.y, q.y)


def test_arrays_that_disagree(tmp_path: Path) -> None:
    folder = tmp_path / "edm"
    convert_npz(npz(tmp_path / "edm.npz"), folder)
    np.save(folder / "labels.npy", np.arange(49))
    with pytest.raises(ValueError, match="expected 50 integer labels, .* got int64 of shape .49,."):
        load("arrays", folder)
    np.save(folder / "labels.npy", np.arange(50) % 3)
    images = folder / "images.npy"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match="images.npy: expected .* bytes"):
        load("arrays", folder)
    np.save(images, np.zeros((50, 4, 4, 3), np.uint8))
    content = (folder / "labels.npy").read_bytes()
    (folder / "labels.npy").write_bytes(content.replace(b"'descr': '", b"'descr': ("))
    with pytest.raises(ValueError, match="labels.npy: expected an .npy array") as error:
        load("arrays", folder)
    one_line(error)
    images.unlink()
    with pytest.raises(FileNotFoundError, match="images.npy|train"):
        load("arrays", folder)


# CIFAR's binary version


def test_cifar_binary_is_the_python_version(published: Any, tmp_path: Path) -> None:
    for name, record in (("cifar10", 1), ("cifar100", 2)):
        published.cifar(name)
        expected = load(name, tmp_path, padding=0, flip=False, loader="resident")
        binary(published, name, record, tmp_path / "binary")
        splits = load(name, tmp_path / "binary", padding=0, flip=False, loader="resident")
        assert splits.train.classes == expected.train.classes
        for split in ("train", "test"):
            a, b = getattr(expected, split).epoch(0), getattr(splits, split).epoch(0)
            for p, q in zip(a, b, strict=True):
                assert torch.equal(p.x, q.x) and torch.equal(p.y, q.y)


def binary(published: Any, name: str, num_labels: int, root: Path) -> Path:
    """Write the binary version of the Python files that are there."""
    from torchvision import datasets

    from arat_fast.datasets.cifar import BINARY as CIFAR_BINARY

    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder_name, train, test, meta, _ = CIFAR_BINARY[name]
    folder = root / folder_name
    folder.mkdir(parents=True)
    pickles = [file for file, _ in [*dataset.train_list, *dataset.test_list]]
    source = published.root / dataset.base_folder
    for file, target in zip(pickles, [*train, *test], strict=True):
        content = pickle.loads((source / file).read_bytes())
        fine = content.get("labels", content.get("fine_labels"))
        columns = [np.array(fine, np.uint8)[:, None], content["data"]]
        if num_labels == 2:
            columns.insert(0, np.array(content["coarse_labels"], np.uint8)[:, None])
        (folder / target).write_bytes(np.concatenate(columns, 1).tobytes())
    classes = [f"class {i}" for i in range(10 if name == "cifar10" else 100)]
    (folder / meta).write_text("\n".join(classes) + "\n\n")
    return folder


def test_damaged_cifar_binary_is_named(published: Any, tmp_path: Path) -> None:
    published.cifar()
    folder = binary(published, "cifar10", 1, tmp_path / "binary")
    path = folder / "data_batch_2.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="data_batch_2.bin: expected records of 3073 bytes"):
        load("cifar10", tmp_path / "binary", loader="resident")
    path.write_bytes(b"\xff" + content[1:])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\], got values from 0 to 255"):
        load("cifar10", tmp_path / "binary", loader="resident")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_2.bin"):
        load("cifar10", tmp_path / "binary", loader="resident")


# Generated images


def test_mixed_batches_hold_their_share_of_generated_images() -> None:
    plan = MixedPlan(21, 28, 10, 0.7, seed=3)
    ranks = [MixedPlan(21, 28, 10, 0.7, seed=3, shard=Shard(rank, 3)) for rank in range(3)]
    originals, generated = [], []
    for epoch in range(9):
        assert len(plan) == 2
        for number in range(2):
            batch = plan.samples(epoch, number).tolist()
            parts = [rank.samples(epoch, number).tolist() for rank in ranks]
            assert sum(parts, []) == batch
            originals += [sample for sample in batch if sample < 21]
            generated += [sample - 21 for sample in batch if sample >= 21]
            assert len(originals) == 3 * (2 * epoch + number + 1)
            assert len(generated) == 7 * (2 * epoch + number + 1)
    # Each once, before any comes again.
    assert sorted(originals[:21]) == sorted(originals[21:42]) == list(range(21))
    assert sorted(generated[:28]) == sorted(generated[28:56]) == list(range(28))
    assert originals[:21] != originals[21:42]
    again = MixedPlan(21, 28, 10, 0.7, seed=3)
    assert torch.equal(again.samples(7, 1), plan.samples(7, 1))
    assert not torch.equal(MixedPlan(21, 28, 10, 0.7, seed=4).order(0), plan.order(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((20, 0, 10, 0.5), "no generated image"),
        ((20, 9, 10, 0.01), "holds 0 generated images, expected some of either kind"),
        ((20, 9, 10, 0.99), "holds 10 generated images, expected some of either kind"),
    ],
)
def test_batches_of_one_kind_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedPlan(*arguments)


@pytest.mark.parametrize("loader", ["resident", *LOADERS])
def test_generated_images_are_mixed_in_with_their_pseudo_labels(
    published: Any, tmp_path: Path, loader: str
) -> None:
    published.cifar(num_train=60)
    marked = np.full((36, 32, 32, 3), 255, np.uint8)
    source = npz(tmp_path / "edm.npz", number=36, image=marked)
    convert_npz(source, tmp_path / "edm")
    options: dict[str, Any] = {
        "unsup": tmp_path / "edm",
        "unsup_fraction": 0.6,
        "batch_size": 20,
        "padding": 0,
        "loader": loader,
    }
    splits = load("cifar10", tmp_path, **options)
    assert len(splits.train) == 3 and splits.train.num_samples == 60
    labels = []
    for epoch in range(2):
        for x, y in splits.train.epoch(epoch):
            generated = (x == 1).flatten(1).all(1)
            assert len(x) == 20 and int(generated.sum()) == 12
            labels += y[generated].tolist()
    assert sorted(labels[:36]) == sorted(labels[36:]) == sorted(i % 10 for i in range(36))
    assert splits.test.num_samples == 12
    other = load("cifar10", tmp_path, **{**options, "loader": "resident"})
    for p, q in zip(splits.train.epoch(1), other.train.epoch(1), strict=True):
        assert torch.equal(p.x, q.x) and torch.equal(p.y, q.y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": np.arange(50)}, r"pseudo-labels must lie in \[0, 9\], got 49"),
        ({"image": np.zeros((50, 28, 28, 3), np.uint8)}, "32x32x3 and of 28x28x3 cannot be mixed"),
    ],
)
def test_generated_images_that_do_not_fit(
    published: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    published.cifar()
    convert_npz(npz(tmp_path / "a.npz", **changes), tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        load("cifar10", tmp_path, unsup=tmp_path / "a")
    image_folder(tmp_path / "set")
    with pytest.raises(ValueError, match="data.unsup is mixed with images in arrays"):
        load("folder", tmp_path / "set", unsup=tmp_path / "a")


MEASURED = """
import itertools, json, multiprocessing, pathlib, sys, torch
from arat_fast.config import DataConfig
from arat_fast.data import StreamedBatches, load_data

def memory(name, file="status"):
    children = [worker.pid for worker in multiprocessing.active_children()]
    lines = [l for p in ("self", *children) for l in open(f"/proc/{p}/{file}")]
    return 1024 * sum(int(l.split()[1]) for l in lines if l.startswith(name + ":"))

options = json.loads(sys.argv[1])
paths = {name: pathlib.Path(options.pop(name)) for name in ("root", "unsup") if name in options}
config = DataConfig(**options, **paths, loader="dataloader", batch_size=512)
splits = load_data(config, device=torch.device("cpu"), seed=0, eval_batch_size=50)
assert isinstance(splits.train, StreamedBatches)
batches = itertools.chain.from_iterable(splits.train.epoch(epoch) for epoch in range(2))
assert sum(len(y) for _, y in itertools.islice(batches, 10)) == 10 * 512
before = memory("RssFile") + memory("RssShmem")
assert sum(len(y) for _, y in itertools.islice(batches, 50)) == 50 * 512
growth = memory("RssFile") + memory("RssShmem") - before
print(json.dumps([splits.train.num_samples, growth, memory("Pss", "smaps_rollup")]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("mixed", "num_workers"), [(False, 0), (True, 2)])
def test_twenty_million_images_train_in_less_than_two_gigabytes(
    tmp_path: Path, mixed: bool, num_workers: int
) -> None:
    """61 GB of images, alone or mixed with CIFAR; the file is sparse. No process keeps the pages it
    has read: 50 batches touch about 180 MB of them."""
    number = 20_000_000
    for split, count in (("train", number), ("test", 100)):
        (tmp_path / split).mkdir()
        for name, shape in (("images", (count, 32, 32, 3)), ("labels", (count,))):
            array = np.lib.format.open_memmap(
                tmp_path / split / f"{name}.npy", "w+", np.uint8, shape
            )
            array[-1] = 255 if name == "images" else 1
            del array
    options: dict[str, Any] = {"name": "arrays", "root": str(tmp_path), "num_workers": num_workers}
    if mixed:
        folder = tmp_path / "cifar-10-batches-bin"
        folder.mkdir()
        (folder / "batches.meta.txt").write_text("\n".join(f"class {i}" for i in range(10)))
        for file in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
            (folder / file).write_bytes(bytes(4096 * 3073))
        options |= {"name": "cifar10", "unsup": str(tmp_path / "train")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    num_samples, growth, memory = json.loads(done.stdout)
    assert num_samples == (5 * 4096 if mixed else number)
    assert growth < 40e6
    assert memory < 2e9


def test_files_that_are_no_images_stop_the_run_or_are_counted(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    cat = root / "train" / "cat"
    for name in ("Thumbs.db", ".hidden.png", "LICENSE", "readme.md"):
        (cat / name).write_bytes(b"x")
    (cat / ".cache").mkdir()
    (cat / ".cache" / "a.png").write_bytes(b"x")
    found = class_folders(root)
    assert len(found.train) == 15 and not found.bad
    (cat / "notes.txt").write_text("hello")
    Image.new("RGB", (9, 9)).save(cat / "photo.gif")
    (root / "val" / "dog" / "sub").mkdir()
    (root / "val" / "dog" / "sub" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "val" / "owl" / "more").symlink_to(cat)
    found = class_folders(root)
    assert len(found.train) == 15 and len(found.bad) == 4
    for name, reason in zip(("notes.txt", "photo.gif"), found.bad, strict=False):
        assert name in reason and "got another kind of file" in reason
    for name, reason in zip(("gone.png", "more"), found.bad[2:], strict=True):
        assert name in reason and "a link that is not followed" in reason
    with pytest.raises(ValueError, match="notes.txt: .*and 3 files more.*bad-images skip") as error:
        load("folder", root)
    one_line(error)
    splits = load("folder", root, bad_images="skip")
    assert splits.skipped == found.bad and splits.train.num_samples == 15
    assert verify(root) == (34, list(found.bad))


def labelled(folder: Path, labels: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", np.zeros((len(labels), 4, 4, 3), np.uint8))
    np.save(folder / "labels.npy", np.asarray(labels))
    return folder


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2_000_000_000_000], "set: image 2: got label 2000000000000, expected at most 2"),
        (np.array([0, 2**63], np.uint64), "got 0 to 9223372036854775808"),
        ([0, 2, 2], "every label from 0 to 2, got none with label 1"),
        ([], "at least one image"),
        ([0, -1], "labels.npy: expected labels in \\[0, 2.63\\), got -1"),
    ],
)
def test_labels_that_are_no_numbers_of_classes(tmp_path: Path, labels: Any, message: str) -> None:
    labelled(tmp_path / "set", labels)
    with pytest.raises(ValueError, match=message) as error:
        load("arrays", tmp_path / "set", loader="resident")
    one_line(error)


def test_arrays_with_three_splits(tmp_path: Path) -> None:
    for split, number in (("train", 6), ("val", 4), ("test", 2)):
        labelled(tmp_path / split, np.arange(number) % 2)
    splits = load("arrays", tmp_path)
    assert splits.val is not None
    parts = (splits.train, splits.val, splits.test)
    assert [part.num_samples for part in parts] == [6, 4, 2]
    labelled(tmp_path / "test", [0, 2])
    with pytest.raises(ValueError, match="test: image 1: got label 2, which no training image has"):
        load("arrays", tmp_path)
    with pytest.raises(ValueError, match="own, expected data.num_val 0"):
        labelled(tmp_path / "test", [0, 1])
        load("arrays", tmp_path, num_val=1)


def test_the_tenth_leaves_an_image_of_every_class(tmp_path: Path) -> None:
    labels = torch.tensor([0, 1, 2, 3] + [4] * 20)
    for number in range(1, 20):
        chosen, held_out = stratified_split(labels, number)
        assert len(held_out) == number and len(chosen) == 24 - number
        assert torch.bincount(labels[chosen]).min() == 1
        assert len(set(chosen.tolist()) | set(held_out.tolist())) == 24
    with pytest.raises(ValueError, match="data.num_val must be at most 19 .* got 20"):
        stratified_split(labels, 20)
    splits = load("arrays", labelled(tmp_path / "set", labels.numpy()))
    assert splits.test.num_samples == 2 and splits.train.num_samples == 22
    few = load("folder", image_folder(tmp_path / "few", per_class=2, splits=(".",)))
    assert few.test.num_samples == 1
    with pytest.raises(ValueError, match="3 images of 3 classes are too few") as error:
        load("folder", image_folder(tmp_path / "one", per_class=1, splits=(".",)))
    assert "num_val" not in one_line(error)


@pytest.mark.parametrize(
    "place", ["start", "header", "middle", "labels", "method", "encrypted", "cut"]
)
def test_a_damaged_compressed_npz_is_named(tmp_path: Path, place: str) -> None:
    """Whatever zlib, zipfile and numpy raise."""
    path = tmp_path / "edm.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 9, (50, 32, 32, 3), dtype=np.uint8)
    np.savez_compressed(path, image=images, label=np.arange(50) % 10)
    with zipfile.ZipFile(path) as file:
        members = {info.filename: info for info in file.infolist()}
        start = members["image.npy"].header_offset + 30 + len("image.npy")
        labels = members["label.npy"].header_offset + 30 + len("label.npy")
        directory = file.start_dir
    content = bytearray(path.read_bytes())
    if place == "method":
        content[directory + 10] = 99
    elif place == "cut":
        del content[9000:]
    elif place == "encrypted":
        content[directory + 8] |= 1
        content[6] |= 1
    else:
        first = {"start": start + 20, "header": start + 60, "middle": start + 20_000}
        position = first.get(place, labels + 40)
        damaged = slice(position, position + 30)
        content[damaged] = bytes(byte ^ 255 for byte in content[damaged])
    path.write_bytes(content)
    with pytest.raises(ValueError, match="edm.npz: ") as error:
        convert_npz(path, tmp_path / "out")
    one_line(error)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edm.npz"]
