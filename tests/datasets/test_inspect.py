from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loading import load, refused
from pictures import CLASSES, encoded, image_folder, picture, tar_shard
from PIL import Image

from arat_fast.cli import main
from arat_fast.data.inspect import TILE, inspect
from arat_fast.data.prepare import convert_npz, verify


def npz(path: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    np.savez(path, **{"image": images, "label": np.arange(30) % 3, **changes})
    return path


def test_folder_of_classes(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    sheet = tmp_path / "sheet.png"
    radii = tmp_path / "radii.png"
    found = inspect(root, sheet, radii=(radii, (8 / 255, 0.5)))
    with Image.open(radii) as image:
        # Rows and columns are apart, and have labels.
        row = np.asarray(image.convert("L"))
        assert image.width > 3 * 2 * TILE and (row.min(axis=0) == 255).sum() >= 4 * 8
        assert (row[: 8 + 16] < 100).any() and (row[8 + 16 : 8 + 32] < 100).any()
    assert found.kind == "images in folders by class" and found.classes == CLASSES
    assert found.counts == {"train": 15, "test": 15}
    assert found.per_class["dog"] == {"train": 5, "test": 5}
    assert sum(found.sizes.values()) == found.looked_at == 30 and not found.bad
    pixels = []
    for path in sorted(root.rglob("*.png")):
        with Image.open(path) as file:
            pixels.append(np.asarray(file.convert("RGB")).reshape(-1, 3) / 255)
    whole = np.concatenate(pixels)
    assert np.allclose(found.mean, whole.mean(0)) and np.allclose(found.std, whole.std(0))
    with Image.open(sheet) as image:
        assert image.mode == "RGB" and image.width > 8 * TILE
        colours = np.asarray(image).reshape(-1, 3)
        assert len(np.unique(colours, axis=0)) > 1000


@pytest.mark.parametrize(
    ("name", "kind", "counts"),
    [
        ("cifar10", "CIFAR-10, Python version", [60, 12]),
        ("svhn", "SVHN", [40, 11]),
        ("imagenette", "Imagenette, 160 pixels", [20, 20]),
        ("tiny-imagenet", "Tiny-ImageNet", [12, 4]),
    ],
)
def test_published_datasets_are_known(
    published: Any, tmp_path: Path, name: str, kind: str, counts: list[int]
) -> None:
    folder = getattr(published, name.replace("-", "_").removesuffix("10"))()
    found = inspect(tmp_path)
    assert found.kind == kind and list(found.counts.values()) == counts
    assert found.use == f"arat-fast train {name}-resnet18 --data.root {tmp_path}"
    if name != "svhn":
        assert inspect(folder).kind == kind


def test_other_kinds(tmp_path: Path) -> None:
    source = npz(tmp_path / "edm.npz")
    found = inspect(source, tmp_path / "sheet.png")
    assert ".npz" in found.kind and found.sizes == {"16 x 16": 30}
    convert_npz(source, tmp_path / "edm")
    arrays = inspect(tmp_path / "edm")
    assert arrays.kind == "arrays" and arrays.counts == {"train": 27, "test": 3}
    assert "tenth" in arrays.note
    assert np.allclose(arrays.mean, found.mean)
    shard = tar_shard(tmp_path / "shards" / "train-0.tar", 0, 6)
    assert inspect(shard).counts == {"train": 5, "test": 1}
    use = inspect(shard.parent).use
    assert use.startswith("arat-fast train folder-resnet18 --data.name webdataset --data.root ")
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes(encoded(picture(1), ".png"))
    assert inspect(flat, tmp_path / "flat.png").kind == "images without classes"


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "nothing at"), ("notes.txt", "npz"), ("empty", "each class")],
)
def test_what_cannot_be_inspected_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    assert main(["data", "inspect", str(tmp_path / name)]) == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1


def test_command_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = npz(tmp_path / "edm.npz"), tmp_path / "edm"
    assert main(["data", "prepare", str(source), str(out)]) == 0
    assert f"--data.unsup {out}" in capsys.readouterr().out
    assert main(["data", "prepare", str(source), str(out)]) == 2
    assert main(["data", "prepare", str(source)]) == 2
    capsys.readouterr()
    root = image_folder(tmp_path / "set")
    assert main(["data", "prepare", str(root)]) == 0
    assert "30 of 30 files can be decoded" in capsys.readouterr().out
    (root / "val" / "cat" / "0_1.png").write_bytes(b"")
    assert main(["data", "prepare", str(root)]) == 2
    text = capsys.readouterr().out
    assert "29 of 30" in text and "--data.bad-images skip" in text
    assert main(["data"]) == 2 and main(["data", "--help"]) == 0


def test_an_npz_is_counted_as_a_whole(tmp_path: Path) -> None:
    images = np.full((3000, 2, 2, 3), 102, np.uint8)
    path = npz(tmp_path / "many.npz", image=images, label=np.array([0] * 2050 + [7] * 950))
    found = inspect(path, tmp_path / "sheet.png")
    assert found.counts == {"images": 3000}
    assert found.per_class == {"0": {"images": 2050}, "7": {"images": 950}}
    assert (found.looked_at, found.out_of) == (2000, 2048)
    assert found.mean == pytest.approx([0.4] * 3) and found.std == pytest.approx([0] * 3)


def test_huge_labels_are_shown_not_counted_through(tmp_path: Path) -> None:
    labels = np.array([0, 1_440_764, 10**12])
    source = npz(tmp_path / "a.npz", image=np.zeros((3, 2, 2, 3), np.uint8), label=labels)
    convert_npz(source, tmp_path / "a")
    for path in (source, tmp_path / "a"):
        found = inspect(path, tmp_path / "sheet.png")
        assert found.classes == ("0", "1440764", "1000000000000")
        assert found.per_class["1440764"] == {"images": 1}


def test_a_shard_of_some_classes_can_be_looked_at(tmp_path: Path) -> None:
    shard = tar_shard(tmp_path / "val-0.tar", 2, 1)
    found = inspect(shard)
    assert found.classes == ("2",) and found.counts == {"images": 1} and not found.use
    assert main(["data", "prepare", str(shard)]) == 0


def test_class_folders_win_over_stray_archives_and_images(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    tar_shard(root / "backup.tar", 0, 3)
    (root / "a.png").write_bytes(encoded(picture(1), ".png"))
    assert inspect(root).kind == "images in folders by class"
    number, bad = verify(root)
    assert number == 32 and [
        name in text for name, text in zip(("a.png", "backup"), bad, strict=True)
    ]
    assert inspect(root).use.endswith(" --data.bad-images skip-strays")
    flat = image_folder(tmp_path / "flat", splits=(".",))
    tar_shard(flat / "backup" / "old.tar", 0, 3)
    with refused("backup: expected images"):
        inspect(flat)
    two = image_folder(tmp_path / "two", splits=("train", "training"))
    tar_shard(two / "backup.tar", 0, 3)
    for look in (inspect, verify):
        with refused("train and training"):
            look(two)


@pytest.mark.parametrize(
    "names",
    [
        ("train-000.tar", "val/000.tar"),
        ("train/000.tar", "training/001.tar", "val/000.tar"),
        ("train-0.tar", "train-1.tar", "val/a/000.tar"),
    ],
)
def test_shards_whose_split_folders_alone_would_be_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...]
) -> None:
    root = tmp_path / "set"
    for number, name in enumerate(names):
        tar_shard(root / name, 6 * number, 6)
    found = inspect(root)
    assert found.kind == "WebDataset shards"
    assert found.counts == {"train": 6 * (len(names) - 1), "test": 6}
    assert main(["data", "prepare", str(root)]) == 0
    number = 6 * len(names)
    assert f"{number} of {number} files can be decoded" in capsys.readouterr().out


def test_the_sheet_never_joins_the_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(tmp_path / "pets", splits=(".",))
    for folder in (root, root / "cat"):
        monkeypatch.chdir(folder)
        assert main(["data", "inspect", "." if folder == root else ".."]) == 0
        text = capsys.readouterr().out
        assert "train 14, test 1" in text and "15 images" in text and "owl  train 5" in text
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["pets-sheet.png"]
    assert len(list(root.rglob("*.png"))) == 15


def test_splits_are_those_of_training(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "my pets", per_class=10, splits=(".",))
    found = inspect(root)
    data = load("folder", root)
    number = {"train": data.train.num_samples, "test": data.test.num_samples}
    assert found.counts == number == {"train": 27, "test": 3}
    # The smaller side of its images, which the recipe would scale up.
    assert found.use == f"arat-fast train folder-resnet18 --data.root '{root}' --data.image-size 44"
    convert_npz(npz(tmp_path / "a.npz"), tmp_path / "arrays" / "train")
    arrays = inspect(tmp_path / "arrays")
    assert arrays.counts == {"train": 27, "test": 3} and found.note in arrays.note
    few = inspect(image_folder(tmp_path / "few", per_class=1, splits=(".",)))
    assert few.counts == {"train": 3} and not few.use and "too few" in few.note


@pytest.mark.slow
def test_memory_is_in_proportion(tmp_path: Path) -> None:
    """To the labels, and to the largest image: a byte a value, not sixteen."""
    number = 400_000
    images = np.zeros((number, 2, 1, 1), np.uint8)
    convert_npz(npz(tmp_path / "a.npz", image=images, label=np.arange(number) % 10), tmp_path / "a")
    (tmp_path / "large").mkdir()
    Image.new("RGB", (3000, 2000), (9, 8, 7)).save(tmp_path / "large" / "a.png")
    for path, limit in ((tmp_path / "a", 60 * number), (tmp_path / "large", 4 * 18_000_000)):
        tracemalloc.start()
        inspect(path, tmp_path / "sheet.png", max_samples=100)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit
