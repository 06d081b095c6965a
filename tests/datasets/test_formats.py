"""Images of one's own on disk, and what is wrong with them."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import LOADERS, collect, load, refused, same
from pictures import CLASSES, Planted, add_member, encoded, image_folder, picture, tar_shard
from PIL import Image

from arat_fast.data import DataSplits, stratified_split
from arat_fast.data.bad_images import BadImages
from arat_fast.data.inspect import inspect
from arat_fast.data.prepare import convert_npz, verify
from arat_fast.datasets.encoded import EncodedImages
from arat_fast.datasets.folder import class_folders
from arat_fast.datasets.rows import MappedRows
from arat_fast.datasets.webdataset import tar_shards

Change = Callable[[Path], object]


def sizes(splits: DataSplits) -> list[int]:
    """Images to train on, to validate with where there are some, and to test."""
    parts = (splits.train, splits.val, splits.test)
    return [part.num_samples for part in parts if part is not None]


# Class folders


def test_folder_with_splits_in_any_words(tmp_path: Path) -> None:
    for number, words in enumerate(
        (("train", "val"), ("Train", "Validation"), ("training", "test"))
    ):
        splits = load("folder", image_folder(tmp_path / str(number), splits=words))
        assert splits.train.classes == CLASSES and splits.train.image_shape == (3, 24, 24)
        assert sizes(splits) == [15, 15]


def test_folder_without_splits_holds_out_a_tenth(tmp_path: Path) -> None:
    splits = load("folder", image_folder(tmp_path / "set", per_class=20, splits=(".",)))
    assert sizes(splits) == [54, 6]
    x, labels = collect(splits.test)
    assert torch.bincount(labels).tolist() == [2, 2, 2]
    train: Any = splits.train
    test: Any = splits.test
    assert not set(train.samples.files) & set(test.samples.files)


def emptied(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "val/dog").rename(root / "val/wolf"), "got wolf too"),
        (lambda root: (root / "train").rename(root / "learn"), "train beside val"),
        (lambda root: (root / "train").rename(root / "test"), "train beside test"),
        (lambda root: image_folder(root, splits=("training",)), "train and training"),
        (lambda root: [(root / s).rename(root.parent / s) for s in ("train", "val")], "each class"),
        (lambda root: root.rename(root.parent / "moved"), "no folder"),
        (lambda root: emptied(root / "train/dog"), "label 1 .*dog"),
        (lambda root: emptied(root / "val"), "label 0 .*val/cat"),
    ],
)
def test_folders_that_do_not_go_together_are_named(
    tmp_path: Path, change: Change, message: str
) -> None:
    root = image_folder(tmp_path / "set")
    change(root)
    with refused(message):
        load("folder", root, bad_images="skip")


def test_a_class_can_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "a.png")
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
    assert splits.val is not None and sizes(splits) == [12, 9, 6]
    for part, number in ((splits.train, 4), (splits.val, 3), (splits.test, 2)):
        red = {round(float(255 * x[0].max())) for x in collect(part)[0]}
        assert red == {number}
    with refused("data.num_val 0, got 2"):
        load("folder", tmp_path, num_val=2, **options)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_files_stop_the_run_or_are_skipped_and_counted(
    tmp_path: Path, loader: str, num_workers: int
) -> None:
    root = image_folder(tmp_path / "set", suffix=".jpg")
    options: dict[str, Any] = {"loader": loader, "num_workers": num_workers}
    bad = [root / "train" / "cat" / "0_0.jpg", root / "val" / "owl" / "2_3.jpg"]
    bad[0].write_bytes(bad[0].read_bytes()[:-300])
    bad[1].write_text("<html>not found</html>")
    splits = load("folder", root, **options)
    for part, path in zip((splits.train, splits.test), bad, strict=True):
        with refused(f"{path}.*image file"):
            list(part.epoch(0))
    splits = load("folder", root, bad_images="skip", **options)
    assert len(splits.skipped) == 2 and sizes(splits) == [14, 14]
    assert str(bad[0]) in splits.skipped[0] and str(bad[1]) in splits.skipped[1]
    assert len(collect(splits.test)[1]) == 14
    assert verify(root) == (30, list(splits.skipped))
    with refused("gone"):
        EncodedImages([tmp_path / "gone.JPEG"], torch.tensor([0])).read(0)


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
        found = BadImages(None, ranks, lambda *progress: seen.append(progress))
        splits = load("folder", root, bad_images="skip", bad_images_found=found)
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
    third = load("folder", moved, bad_images="skip", bad_images_found=known)
    assert sizes(first) == sizes(second) == sizes(third) == [14, 15]
    assert first.fingerprint == second.fingerprint == third.fingerprint
    assert first.skipped == second.skipped == third.skipped


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
        assert same(getattr(a, split).epoch(1), getattr(b, split).epoch(1))
    with refused("--data.crop pad"):
        load("folder", tmp_path, loader="resident")
    with refused("20 x 20 .* got 24 x 24"):
        load("folder", tmp_path, loader="resident", crop="pad", image_size=20)


def test_links_are_followed_to_files_alone(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    cat = root / "train" / "cat"
    (cat / "0_0.png").rename(tmp_path / "moved.png")
    (cat / "0_0.png").symlink_to(tmp_path / "moved.png")
    (root / "val" / "dog" / "sub").mkdir()
    (root / "val" / "dog" / "sub" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "val" / "owl" / "more").symlink_to(cat)
    found = class_folders(root)
    assert len(found.train) == 15 and len(found.bad) == 2
    for name, reason in zip(("gone", "more"), found.bad, strict=True):
        assert name in reason and "link" in reason
    with refused("gone.png: .*1 files more"):
        load("folder", root)
    splits = load("folder", root, bad_images="skip")
    assert splits.skipped == found.bad and sizes(splits) == [15, 15]


@pytest.mark.parametrize("place", ["train/owl", "val/dog"])
def test_class_folders_that_are_links_are_followed_only_with_a_switch(
    tmp_path: Path, place: str
) -> None:
    root = image_folder(tmp_path / "set")
    expected = sizes(load("folder", root))
    (root / place).rename(tmp_path / "elsewhere")
    (root / place).symlink_to(tmp_path / "elsewhere")
    for read in (inspect, verify, lambda root: load("folder", root)):
        with refused(f"{place} is a link to .*elsewhere.*--data.follow-links"):
            read(root)
    assert sizes(load("folder", root, follow_links=True)) == expected
    assert verify(root, follow_links=True) == (sum(expected), [])
    assert inspect(root, follow_links=True).use.endswith("--data.follow-links --data.image-size 44")


# Tar shards


def shards(root: Path) -> Path:
    for name, first, number in (("train-0", 0, 6), ("train-1", 6, 5), ("val-0", 11, 4)):
        tar_shard(root / f"{name}.tar", first, number)
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, last: content[: last - 1000], ""),
        (lambda content, last: content[: last - 412], ""),
        (lambda content, last: content[: last - 512], "end of the archive"),
        (lambda content, last: content[: last + 512], "end of the archive"),
        (lambda content, last: content + content, "nothing after the end"),
        (lambda content, last: content[:3072] + b"\xff" * 512 + content[3584:], ""),
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
    with refused(f"train-1.tar.*{message}"):
        load("webdataset", tmp_path)
    path.write_bytes(content + bytes(5 * 10240))
    splits = load("webdataset", tmp_path)
    assert sizes(splits) == [11, 4] and splits.train.classes == ("0", "1", "2")


@pytest.mark.parametrize("loader", LOADERS)
def test_a_tar_cut_after_it_was_listed_is_named(tmp_path: Path, loader: str) -> None:
    splits = load("webdataset", shards(tmp_path), loader=loader)
    path = tmp_path / "train-1.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with refused("train-1.tar: sample/000.*bytes"):
        list(splits.train.epoch(0))


def test_thousands_of_shards_are_not_all_kept_open(tmp_path: Path) -> None:
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


def num_open(folder: Path) -> int:
    """Files in a folder that this process has open; 0 where the system does not tell."""
    number = 0
    for link in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):
            number += link.readlink().parent == folder
    return number


def archive(path: Path, members: dict[str, str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if name.endswith("/link"):
                link = tarfile.TarInfo(name)
                link.type, link.linkname = tarfile.LNKTYPE, content
                tar.addfile(link)
            else:
                add_member(tar, name, content.encode())


ONE = {"1.png": "image", "1.cls": "0"}
TWO = {**ONE, "2.png": "more", "2.cls": "1"}


@pytest.mark.parametrize(
    ("archives", "message"),
    [
        ({}, "no .tar"),
        ({"train": {}}, "got none"),
        ({"train": {"1.cls": "0"}}, "1.cls has no image"),
        ({"train": {**ONE, "2.cls": "0"}}, "2.cls has no image"),
        ({"train": {"1.png": "image"}}, "1.png has no label"),
        ({"train": {**ONE, "1.jpg": "image"}}, "1.png and 1.jpg"),
        ({"train": {**ONE, "1.CLS": "1"}}, "1.CLS once"),
        ({"train": {**ONE, "1.cls": "1"}}, "got label 1 for each"),
        ({"train": {**TWO, "1.cls": "7"}}, "1.png: got label 7, expected at most 1"),
        ({"train": {**ONE, "1.cls": "9" * 30}}, "9223372036854775807"),
        ({"train": {**ONE, "1.cls": "cat"}}, "b'cat'"),
        ({"train": {**ONE, "1.cls": "-1"}}, "b'-1'"),
        (
            {"train": {**ONE, "2.png": "", "2.cls": "2", "3.png": "", "3.cls": "0"}},
            "none with label 1",
        ),
        ({"train": TWO, "val": {"1.png": "image", "1.cls": "3"}}, "val.tar: 1.png: got label 3"),
        ({"train": TWO, "val": {"3.png": "other", "3.cls": "1"}}, "val images .* class 0"),
        ({"train": TWO, "val": TWO}, "val.tar: 2.png: .* same as .*train.tar: 2.png"),
        ({"train": ONE}, "label 0 for each of the 1"),
        ({"train": {**TWO, "a.b.png": "third"}}, "a.b.png has no label"),
        ({"train": {**TWO, "a.b.cls": "1"}}, "a.b.cls has no image"),
        ({"train": {**TWO, "1.npy": ""}}, "1.npy is neither"),
        ({"train": {**TWO, "3.json": ""}}, "3.json is neither"),
        ({"train": {**TWO, "inner.tar": ""}}, "inner.tar is neither"),
        ({"train": {**TWO, "1.png/link": "1.png"}}, "link is a link"),
        ({"train-0": ONE, "more": ONE}, "more.tar"),
        ({"val-0": ONE, "test-0": ONE}, "none to train on"),
        ({"train-0": ONE, "train/pets-test-0": ONE}, "test and train"),
    ],
)
def test_shards_that_do_not_fit_are_named(
    tmp_path: Path, archives: dict[str, dict[str, str]], message: str
) -> None:
    for name, members in archives.items():
        archive(tmp_path / f"{name}.tar", members)
    with refused(message):
        load("webdataset", tmp_path)


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
            tar_shard(tmp_path / name, 40 * number, 30 + number)
    found = tar_shards(tmp_path)
    assert len(found.train) == 30
    held_out = [None if part is None else len(part) for part in (found.val, found.test)]
    if names[1] is not None and names[2] is not None:
        assert held_out == [31, 32]
    else:
        assert held_out == [None, 31 if names[1] else 32 if names[2] else None]


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


def labelled(folder: Path, labels: Any, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 4, 4, 3), np.uint8)
    np.save(folder / "images.npy", pixels)
    np.save(folder / "labels.npy", np.asarray(labels), **options)
    return folder


def test_npz_becomes_arrays_that_are_mapped(tmp_path: Path) -> None:
    source, folder = npz(tmp_path / "edm.npz"), tmp_path / "sub" / "edm"
    assert convert_npz(source, folder) == (50, "")
    assert sorted(p.name for p in folder.iterdir()) == ["SHA256SUMS", "images.npy", "labels.npy"]
    with np.load(source) as arrays:
        assert np.array_equal(np.load(folder / "images.npy"), arrays["image"])
        assert np.array_equal(np.load(folder / "labels.npy"), arrays["label"])
    with pytest.raises(FileExistsError):
        convert_npz(source, folder)
    assert sizes(load("arrays", folder)) == [45, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "got image"),
        ({"label": np.arange(49)}, "got int64 of shape .49"),
        ({"label": np.arange(50) / 2}, "float64"),
        ({"label": np.arange(50) - 1}, "-1"),
        ({"image": np.zeros((50, 3, 4, 4), np.uint8)}, "channels"),
        ({"image": np.full((50, 4, 4, 3), -0.5)}, "float64"),
        ({"mask": np.zeros((50, 4, 4, 1))}, "got mask.npy"),
        ({"classes": np.array([["a", "b"]])}, "names of the classes"),
        ({"classes": np.array(["a", ""])}, "classes.txt: line 2|one line"),
        ({"image": np.zeros((0, 4, 4, 3), np.uint8), "label": np.zeros(0, int)}, "at least one"),
    ],
)
def test_npz_that_holds_something_else(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = npz(tmp_path / "edm.npz", **changes)
    with refused(message):
        convert_npz(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edm.npz"]


@pytest.mark.parametrize("name", ["image", "label"])
def test_a_pickle_inside_arrays_never_runs(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    planted = np.array([Planted(mark)] * 50, dtype=object)
    with refused("edm.npz"):
        convert_npz(npz(tmp_path / "edm.npz", **{name: planted}), tmp_path / "out")
    with refused("labels.npy"):
        load("arrays", labelled(tmp_path / "arrays", planted, allow_pickle=True))
    assert not mark.exists()


def test_a_memory_map_goes_to_the_device_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "edm"
    convert_npz(npz(tmp_path / "edm.npz"), folder)
    expected = load("arrays", folder)
    taken: list[int] = []
    take = MappedRows.__getitem__

    def counted(self: MappedRows, index: Any) -> Any:
        taken.append(len(index))
        return take(self, index)

    monkeypatch.setattr(MappedRows, "__getitem__", counted)
    monkeypatch.setattr("arat_fast.data.load.BYTES_PER_PART", 4 * 32 * 32 * 3)
    splits = load("arrays", folder, loader="resident")
    # Before, those held out are looked for among the others.
    assert taken[:2] == [45, 5] and sum(taken[2:]) == 50 and max(taken[2:]) == 4
    for a, b in ((expected.train, splits.train), (expected.test, splits.test)):
        assert same(a.epoch(1), b.epoch(1))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2_000_000_000_000], "image 2: got label 2000000000000"),
        (np.array([0, 2**63], np.uint64), "9223372036854775808"),
        ([0, 2, 2], "none with label 1"),
        ([], "at least one"),
        ([0, -1], "labels.npy: .*-1"),
    ],
)
def test_labels_that_are_no_numbers_of_classes(tmp_path: Path, labels: Any, message: str) -> None:
    with refused(message):
        load("arrays", labelled(tmp_path / "set", labels), loader="resident")


def changed(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "SHA256SUMS"])
@pytest.mark.parametrize("place", [-2, -9])
def test_prepared_arrays_are_compared_with_their_checksums(
    tmp_path: Path, name: str, place: int
) -> None:
    folder = tmp_path / "edm"
    convert_npz(npz(tmp_path / "edm.npz"), folder)
    content = bytearray((folder / name).read_bytes())
    # A pixel, a label of 256 more than there are, a letter of a name.
    content[place] ^= 1
    (folder / name).write_bytes(content)
    for read in (lambda: load("arrays", folder), lambda: inspect(folder)):
        with refused("npy"):
            read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: np.save(folder / "labels.npy", np.arange(49)), "int64 of shape .49"),
        (changed("images.npy", lambda content: content[:-1]), "images.npy: expected .* bytes"),
        (changed("labels.npy", lambda c: c.replace(b"'descr': '", b"'descr': (")), "labels.npy"),
        (lambda folder: (folder / "images.npy").unlink(), "images.npy|train"),
    ],
)
def test_arrays_that_disagree(tmp_path: Path, change: Change, message: str) -> None:
    folder = labelled(tmp_path / "edm", np.arange(50) % 3)
    change(folder)
    with refused(message):
        load("arrays", folder)


def test_arrays_with_three_splits(tmp_path: Path) -> None:
    for split, number in (("train", 6), ("val", 4), ("test", 2)):
        labelled(tmp_path / split, np.arange(number) % 2)
    assert sizes(load("arrays", tmp_path)) == [6, 4, 2]
    labelled(tmp_path / "test", [0, 2])
    with refused("test: image 1: got label 2"):
        load("arrays", tmp_path)


def test_the_tenth_leaves_an_image_of_every_class(tmp_path: Path) -> None:
    labels = torch.tensor([0, 1, 2, 3] + [4] * 20)
    for number in range(1, 20):
        chosen, held_out = stratified_split(labels, number)
        assert len(held_out) == number and len(chosen) == 24 - number
        assert torch.bincount(labels[chosen]).min() == 1
        assert len(set(chosen.tolist()) | set(held_out.tolist())) == 24
    with refused("at most 19 .* got 20"):
        stratified_split(labels, 20)
    splits = load("arrays", labelled(tmp_path / "set", labels.numpy()))
    assert sizes(splits) == [22, 2]
    few = load("folder", image_folder(tmp_path / "few", per_class=2, splits=(".",)))
    assert few.test.num_samples == 1
    with refused("too few"):
        load("folder", image_folder(tmp_path / "one", per_class=1, splits=(".",)))


def test_an_npz_that_unpacks_to_more_than_images_do(tmp_path: Path) -> None:
    images = np.zeros((10_000, 64, 64, 3), np.uint8)
    np.savez_compressed(tmp_path / "edm.npz", image=images, label=np.arange(10_000) % 10)
    with refused("unpack to"):
        convert_npz(tmp_path / "edm.npz", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edm.npz"]


def test_space_is_looked_for_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = npz(tmp_path / "edm.npz", number=50)
    with zipfile.ZipFile(source) as archive:
        size = sum(member.file_size for member in archive.infolist())
    space = types.SimpleNamespace(free=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space)
    with pytest.raises(OSError, match="are free"):
        convert_npz(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edm.npz"]
    # Images that need no conversion are never there twice.
    space.free = size
    assert convert_npz(source, tmp_path / "out")[0] == 50


@pytest.mark.parametrize(
    "place", ["start", "header", "middle", "labels", "method", "encrypted", "cut"]
)
def test_a_damaged_compressed_npz_is_named(tmp_path: Path, place: str) -> None:
    """Whatever zlib, zipfile and numpy raise."""
    path = tmp_path / "edm.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 9, (50, 32, 32, 3), dtype=np.uint8) * 28
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
    with refused("edm.npz: "):
        convert_npz(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edm.npz"]


# Generated images


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
    assert same(splits.train.epoch(1), other.train.epoch(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": np.arange(50)}, "got 49"),
        ({"image": np.zeros((50, 28, 28, 3), np.uint8)}, "28x28x3"),
    ],
)
def test_generated_images_that_do_not_fit(
    published: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    published.cifar()
    convert_npz(npz(tmp_path / "a.npz", **changes), tmp_path / "a")
    with refused(message):
        load("cifar10", tmp_path, unsup=tmp_path / "a")
    with refused("data.unsup"):
        load("folder", image_folder(tmp_path / "set"), unsup=tmp_path / "a")


MEASURED = """
import itertools, json, multiprocessing, pathlib, sys, torch
from arat_fast.config import DataConfig
from arat_fast.data import LoaderBatches, load_data

def memory(name, file="status"):
    children = [worker.pid for worker in multiprocessing.active_children()]
    lines = [l for p in ("self", *children) for l in open(f"/proc/{p}/{file}")]
    return 1024 * sum(int(l.split()[1]) for l in lines if l.startswith(name + ":"))

options = json.loads(sys.argv[1])
paths = {name: pathlib.Path(options.pop(name)) for name in ("root", "unsup") if name in options}
config = DataConfig(**options, **paths, loader="dataloader", batch_size=512)
splits = load_data(config, device=torch.device("cpu"), seed=0, eval_batch_size=50)
assert isinstance(splits.train, LoaderBatches)
batches = itertools.chain.from_iterable(splits.train.epoch(epoch) for epoch in range(2))
assert sum(len(y) for _, y in itertools.islice(batches, 10)) == 10 * 512
before = memory("RssFile") + memory("RssShmem")
assert sum(len(y) for _, y in itertools.islice(batches, 50)) == 50 * 512
growth = memory("RssFile") + memory("RssShmem") - before
print(json.dumps([splits.train.num_samples, growth, memory("Pss", "smaps_rollup")]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("mixed", "num_workers", "number"), [(False, 0, 1_000_000), (True, 2, 20_000_000)]
)
def test_twenty_million_images_train_in_less_than_two_gigabytes(
    tmp_path: Path, mixed: bool, num_workers: int, number: int
) -> None:
    """61 GB of images mixed with CIFAR, or 3 GB alone; the file is sparse. No process keeps the
    pages it has read: 50 batches touch about 180 MB of them."""
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
