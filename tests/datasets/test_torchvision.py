"""Datasets in the files that torchvision lays out: small ones, with their checksums."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from loading import refused
from PIL import Image

from arat_fast.cli import main
from arat_fast.data.inspect import inspect
from arat_fast.datasets import DATASETS, Content
from arat_fast.datasets.idx import SOURCES
from arat_fast.datasets.stl10 import FOLDER as STL10_FOLDER

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def _idx(pixels: Pixels) -> bytes:
    sizes = np.array(pixels.shape, ">u4").tobytes()
    return bytes([0, 0, 8, pixels.ndim]) + sizes + pixels.tobytes()


def _write_idx(name: str, folder: Path, packed: bool) -> dict[str, Pixels]:
    """The four files; the pixels as they are seen, by split."""
    source, rng = SOURCES[name], np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    seen = {}
    for split, stem, number in (("train", "train", 70), ("test", source.test, 50)):
        seen[split] = rng.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        stored = seen[split].transpose(0, 2, 1) if name == "emnist" else seen[split]
        labels = (np.arange(number) % source.num_classes).astype(np.uint8)
        for kind, content in (("images-idx3", stored), ("labels-idx1", labels)):
            path = folder / f"{source.prefix}{stem}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(_idx(content)) if packed else _idx(content))
    return seen


def _pixels(content: Content, split: str) -> Pixels:
    part: Any = content.parts[split]
    pixels: Pixels = part.rows[np.arange(len(part))]
    return pixels


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "fashion-mnist"),
        ("kmnist", ""),
        ("emnist", "EMNIST/raw/gzip"),
    ],
)
def test_idx_files_are_read_where_they_lie(
    tmp_path: Path, name: str, folder: str, packed: bool
) -> None:
    seen = _write_idx(name, tmp_path / folder, packed)
    content = DATASETS[name].load(tmp_path)
    for split in ("train", "test"):
        assert np.array_equal(_pixels(content, split)[..., 0], seen[split])
    assert content.train.labels.tolist() == [i % SOURCES[name].num_classes for i in range(70)]
    assert len(content.classes) == SOURCES[name].num_classes == DATASETS[name].num_classes


def test_a_folder_of_idx_files_is_known(tmp_path: Path) -> None:
    _write_idx("fashion-mnist", tmp_path / "fashion-mnist", packed=True)
    for path in (tmp_path, tmp_path / "fashion-mnist"):
        found = inspect(path)
        assert found.kind == "Fashion-MNIST" and found.classes[0] == "T-shirt/top"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "packed"), [("FashionMNIST/raw", False), ("fashion-mnist", True)]
)
def test_fashion_mnist_trains_by_recipe(tmp_path: Path, folder: str, packed: bool) -> None:
    """In torchvision's layout and in Debian's; the record of the evaluation says the trial."""
    _write_idx("fashion-mnist", tmp_path / folder, packed)
    run = tmp_path / "run"
    few = "--data.limit 30 --data.batch-size 15 --train.max-steps 1 --eval.max-samples 10"
    short = f"{few} --attack.num-steps 1 --eval.num-steps 1 --eval.no-autoattack"
    options = ["--data.root", str(tmp_path), "--train.device", "cpu", "--out", str(run)]
    assert main(["train", "fashion-mnist-resnet8", *options, *short.split()]) == 0
    evaluation = "--attacks pgd --num-steps 1 --max-samples 10 --device cpu"
    assert main(["eval", str(run), *evaluation.split()]) == 0
    summary, record = (
        json.loads((run / f"{name}.json").read_text()) for name in ("summary", "evaluation")
    )
    assert (summary["train_samples"], summary["limit"], summary["steps"]) == (30, 30, 1)
    assert (record["dataset"], record["num_samples"]) == ("fashion-mnist", 10)
    assert record["train_limit"] == 30 and record["eps"] == 0.1
    assert record["accuracy"]["clean"]["correct"] == summary["accuracy"]["clean"]["correct"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"\x89PNG", "IDX"),
        ("train-images-idx3-ubyte", _idx(np.zeros((3, 28, 28), np.uint8))[:-5], "2,352 bytes"),
        ("t10k-labels-idx1-ubyte", _idx(np.zeros(49, np.uint8)), r"\(49,\)"),
        ("t10k-images-idx3-ubyte", _idx(np.zeros(50, np.uint8)), r"\(50,\)"),
    ],
)
def test_a_damaged_idx_file_is_refused(
    tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    _write_idx("mnist", tmp_path, packed=False)
    (tmp_path / file).write_bytes(content)
    with refused(message):
        DATASETS["mnist"].load(tmp_path)


def test_a_damaged_gzip_file_and_none_are_refused(tmp_path: Path) -> None:
    with refused("--data.root"):
        DATASETS["kmnist"].load(tmp_path)
    _write_idx("kmnist", tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with refused("gzip"):
        DATASETS["kmnist"].load(tmp_path)


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / STL10_FOLDER
    folder.mkdir()
    rng, seen, checksums = np.random.default_rng(0), {}, {}
    for split, number in (("train", 20), ("test", 10)):
        seen[split] = rng.integers(0, 256, (number, 96, 96, 3), dtype=np.uint8)
        labels = (1 + np.arange(number) % 10).astype(np.uint8)
        for name, stored in (("X", seen[split].transpose(0, 3, 2, 1)), ("y", labels)):
            file = folder / f"{split}_{name}.bin"
            file.write_bytes(stored.tobytes())
            checksums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    monkeypatch.setattr(torchvision.datasets.STL10, "train_list", list(checksums.items()))
    monkeypatch.setattr(torchvision.datasets.STL10, "test_list", [])
    content = DATASETS["stl10"].load(tmp_path)
    assert np.array_equal(_pixels(content, "train"), seen["train"])
    assert content.parts["test"].labels.tolist() == list(range(10))
    (folder / "test_y.bin").write_bytes(bytes(10))
    with refused("md5"):
        DATASETS["stl10"].load(tmp_path)


def _photos(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for index, name in enumerate(names):
        Image.new("RGB", (30 + index, 20), (index, 0, 0)).save(folder / name, quality=95)


def test_flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dataset = tmp_path / "flowers-102", torchvision.datasets.Flowers102
    _photos(folder / "jpg", [f"image_{i:05d}.jpg" for i in range(1, 10)])
    split = {"trnid": [1, 4, 7], "valid": [2, 5, 8], "tstid": [3, 6, 9]}
    scipy.io.savemat(folder / "setid.mat", split)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": [1, 1, 1, 2, 2, 2, 3, 3, 3]})
    files = {
        key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(dataset, "_file_dict", {**dataset._file_dict, **files})
    content = DATASETS["flowers"].load(tmp_path)
    assert set(content.parts) == {"train", "val", "test"} and len(content.classes) == 102
    for part in content.parts.values():
        assert part.labels.tolist() == [0, 1, 2]
    assert content.parts["val"].name(1).endswith("image_00005.jpg")
    (folder / "jpg" / "image_00006.jpg").unlink()
    with refused("image_00006.jpg"):
        DATASETS["flowers"].load(tmp_path)


def test_pets(tmp_path: Path) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    names = [f"{pet}_{i}" for pet in ("Bengal", "great_dane") for i in range(4)]
    _photos(folder / "images", [f"{name}.jpg" for name in names])
    (folder / "annotations").mkdir()
    for split, kept in (("trainval", names[::2]), ("test", names[1::2])):
        lines = [f"{name} {1 + name.startswith('great')} 1 1\n" for name in kept]
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))
    content = DATASETS["pets"].load(tmp_path)
    assert content.classes == ("Bengal", "Great Dane")
    assert torch.equal(content.train.labels, torch.tensor([0, 0, 1, 1]))
    assert content.parts["test"].name(3).endswith("great_dane_3.jpg")
    (folder / "annotations" / "test.txt").write_text("no such line\n")
    with refused("pets as published"):
        DATASETS["pets"].load(tmp_path)
