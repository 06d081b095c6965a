"""Published datasets: read as published, refused otherwise, fetched where they are absent."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import collect, levels, load, refused, same
from pictures import Planted, add_member
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torch import Tensor
from torchvision import datasets
from torchvision.datasets import utils as torchvision_utils
from torchvision.transforms.v2 import functional as F

from arat_fast.datasets import tiny_imagenet
from arat_fast.datasets.imagenette import CLASSES as IMAGENETTE_CLASSES
from arat_fast.datasets.published import unpack

PLAIN: dict[str, Any] = {"padding": 0, "flip": False}
TINY = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
PLACES = {
    "cifar10": ("cifar-10-batches-py", datasets.CIFAR10.url),
    "cifar100": ("cifar-100-python", datasets.CIFAR100.url),
    "svhn": ("train_32x32.mat", datasets.SVHN.split_list["train"][0]),
    "imagenette": ("imagenette2-160", datasets.Imagenette._ARCHIVES["160px"][0]),
    "tiny-imagenet": ("tiny-imagenet-200", TINY),
}


def rows(x: Tensor, *more: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in torch.cat([x.flatten(1), *more], 1).tolist()}


def test_digits_are_the_real_ones_split_once_and_for_all() -> None:
    splits = load("digits", batch_size=100, **PLAIN)
    (x, y), test = collect(splits.train), collect(splits.test)
    assert splits.val is None and splits.train.image_shape == (1, 8, 8)
    assert len(y) == splits.train.num_samples == 1437
    assert len(test[1]) == 360 and torch.bincount(test[1]).min() >= 34
    images, labels = sklearn_digits(return_X_y=True)
    real = rows(torch.tensor(images / 16).float(), torch.tensor(labels)[:, None])
    assert rows(x, y[:, None]) | rows(test[0], test[1][:, None]) == real
    assert same([test], [collect(load("digits", seed=5).test)])


def test_only_train_and_probe_are_shuffled_and_augmented() -> None:
    """By the seed, which the held-out images do not depend on."""
    options: dict[str, Any] = {"padding": 1, "num_val": 287}
    splits, again, other = (load("digits", seed=seed, **options) for seed in (0, 0, 1))
    for split, augmented in (("train", True), ("probe", True), ("val", False), ("test", False)):
        batches = getattr(splits, split)
        first = list(batches.epoch(0))
        assert same(first, batches.epoch(1)) is not augmented
        assert same(first, getattr(again, split).epoch(0))
        assert same(first, getattr(other, split).epoch(0)) is not augmented
    assert not same(splits.train.epoch(0), splits.probe.epoch(0))


def test_held_out_images_are_disjoint_from_training_and_stratified() -> None:
    whole = load("digits", batch_size=479, **PLAIN)
    splits = load("digits", num_val=287, batch_size=50, **PLAIN)
    assert splits.val is not None
    val_x, val_y = collect(splits.val)
    train_x, _ = collect(splits.train)
    x, y = collect(whole.train)
    assert len(val_y) == 287 and len(train_x) == splits.train.num_samples == 1437 - 287
    assert not rows(val_x) & rows(train_x) and rows(val_x) | rows(train_x) == rows(x)
    assert same([collect(splits.test)], [collect(whole.test)])
    assert (torch.bincount(val_y) - torch.bincount(y) * 287 / 1437).abs().max() < 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_both_versions(published: Any, tmp_path: Path, name: str) -> None:
    published.cifar(name)
    expected = load(name, tmp_path, **PLAIN)
    splits = load(name, published.cifar_binary(name).parent, **PLAIN)
    train = getattr(datasets, name.upper())(tmp_path)
    assert sorted(collect(expected.train)[1].tolist()) == sorted(train.targets)
    assert splits.train.classes == expected.train.classes == tuple(train.classes)
    for split in ("train", "test"):
        assert same(getattr(expected, split).epoch(0), getattr(splits, split).epoch(0))


def test_official_augmentation_is_four_pixels_of_zeros(published: Any, tmp_path: Path) -> None:
    published.cifar(num_train=300, edit=lambda content: content["data"].fill(255))
    x, _ = collect(load("cifar10", tmp_path, batch_size=100).train)
    white_images = (x == 1).flatten(1).float().mean(1) > 0.7
    borders = (x[white_images] == 0).all(1)
    rows_out, columns_out = borders.all(2).sum(1), borders.all(1).sum(1)
    assert int(rows_out.max()) == 4 and int(columns_out.max()) == 4
    assert int(rows_out.min()) == 0


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("planted", [False, True])
def test_nothing_but_the_published_files_is_unpickled(
    published: Any, tmp_path: Path, file: str, planted: bool
) -> None:
    path, mark = published.cifar() / file, tmp_path / "ran"
    expected = hashlib.md5(path.read_bytes()).hexdigest()
    content = pickle.dumps(Planted(mark)) if planted else path.read_bytes()[:-7]
    path.write_bytes(content)
    with refused(f"{path}.*{hashlib.md5(content).hexdigest()}.*{expected}"):
        load("cifar10", tmp_path)
    assert not mark.exists()
    if planted:
        pickle.loads(content)
        assert mark.exists(), "the planted pickle is harmless, so the test shows nothing"
    published.monkeypatch.undo()
    with refused("expected c99cafc152244af753f735de768cd75f"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("name", list(PLACES))
def test_absent_dataset_names_the_path_and_a_failed_download_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place, address = PLACES[name]
    with refused(f"{tmp_path}/nowhere/{place}.*--data.download.*--data.root"):
        load(name, tmp_path / "nowhere")
    asked: list[str] = []

    def refuse(url: str, *_: object, **__: object) -> None:
        asked.append(url)
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(torchvision_utils, "_get_redirect_url", refuse)
    monkeypatch.setattr(torchvision_utils, "_urlretrieve", refuse)
    with refused("Name or service not known"):
        load(name, tmp_path, download=True)
    assert asked[0] == address


def labelled(label: int) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["labels"].__setitem__(2, label)


def sized(size: int) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        content["data"] = np.zeros((len(content["data"]), 3 * size * size), np.uint8)

    return edit


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar10", {"edit": sized(24)}, "cifar10 as published"),
        ("cifar10", {"edit": sized(64)}, "cifar10 as published"),
        ("cifar100", {"name": "cifar100", "edit": sized(64)}, "240 images"),
        ("cifar10", {"edit": labelled(10)}, "image 2: .* got 10"),
        ("cifar10", {"edit": labelled(-1)}, "image 2: .* got -1"),
        ("svhn", {"labels": [1, 2, 11]}, "image 2: .* got 11"),
        ("svhn", {"size": 28}, "28x28x3"),
        ("svhn", {"labels": [4]}, "at least 2"),
    ],
)
def test_content_that_does_not_fit_is_named(
    published: Any, tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    (published.svhn if name == "svhn" else published.cifar)(**options)
    with refused(message):
        load(name, tmp_path, num_val=5 if "edit" in options else 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "records of 3073"),
        (lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]), "got 255"),
        (lambda path: path.unlink(), "data_batch_2.bin"),
    ],
)
def test_damaged_cifar_binary_is_named(
    published: Any, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    published.cifar()
    folder = published.cifar_binary("cifar10")
    change(folder / "data_batch_2.bin")
    with refused(message):
        load("cifar10", folder.parent)


def test_svhn_digit_zero_is_label_zero(published: Any, tmp_path: Path) -> None:
    pixels = published.svhn()
    splits = load("svhn", tmp_path, **PLAIN)
    x, y = collect(splits.test)
    assert y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert torch.equal(x, torch.tensor(pixels["test"].transpose(3, 2, 0, 1)).float() / 255)
    assert splits.train.num_samples == 40 and splits.train.image_shape == (3, 32, 32)


def decoded(path: Path) -> Tensor:
    with Image.open(path) as file:
        return F.pil_to_tensor(file.convert("RGB"))


def test_imagenette_as_published(published: Any, tmp_path: Path) -> None:
    folder = published.imagenette(per_class=6)
    (folder / "val" / ".cache").mkdir()
    splits = load("imagenette", tmp_path, image_size=16, num_val=10, seed=4)
    parts: dict[str, Any] = {name: getattr(splits, name) for name in ("train", "val", "test")}
    paths = {name: list(part.samples.files) for name, part in parts.items()}
    assert sorted(paths["test"]) == sorted((folder / "val").rglob("*.JPEG"))
    assert sorted(paths["train"] + paths["val"]) == sorted((folder / "train").rglob("*.JPEG"))
    x, y = collect(splits.test)
    for image, label, path in zip(x, y.tolist(), paths["test"], strict=True):
        assert torch.equal(levels(image), F.center_crop(decoded(path), [16, 16]))
        assert list(IMAGENETTE_CLASSES)[label] == path.parent.name
    assert splits.test.classes == tuple(IMAGENETTE_CLASSES.values())
    # The first images to evaluate are of all classes, and the same for every seed.
    assert len(set(y[:16].tolist())) > 5
    assert sorted(parts["val"].samples.labels.tolist()) == list(range(10))
    again: Any = load("imagenette", tmp_path, image_size=16, num_val=10, seed=5).val
    assert list(again.samples.files) == paths["val"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda root: None, {"num_val": 11}, "at most 10 .* got 11"),
        (lambda root: (root / "train").rename(root / "t"), {}, "train.*--data.download"),
        (lambda root: (root / "train/n03000684").rename(root / "t"), {}, "n03000684.*got none"),
        (lambda root: (root / "val/n03000684").rename(root / "val/n9"), {}, "n03000684.*got none"),
        (lambda root: shutil.copytree(root / "val", root / "val/n9"), {}, "n9: .*20 files"),
        (lambda root: None, {"image_size": 0}, "image_size"),
    ],
)
def test_imagenette_that_is_not_as_published_is_named(
    published: Any,
    tmp_path: Path,
    change: Callable[[Path], object],
    options: dict[str, Any],
    message: str,
) -> None:
    change(published.imagenette())
    with refused(message):
        load("imagenette", tmp_path, **options)


def test_tiny_imagenet_as_published(published: Any, tmp_path: Path) -> None:
    folder = published.tiny_imagenet()
    splits = load("tiny-imagenet", tmp_path, num_val=4, **PLAIN)
    assert splits.val is not None
    assert splits.train.classes == ("goldfish", "Egyptian cat", "go-kart", "reel")
    assert splits.train.num_samples == 8 and splits.val.num_samples == 4
    x, y = collect(splits.test)
    assert y.tolist() == [1, 0, 3, 2] and x.shape == (4, 3, 64, 64)
    for index, image in enumerate(x):
        expected = decoded(folder / "val" / "images" / f"val_{index}.JPEG")
        assert torch.equal(levels(image), expected)
    found = [
        (levels(image).numpy().tobytes(), int(label))
        for part in (splits.train, splits.val)
        for image, label in zip(*collect(part), strict=True)
    ]
    there = sorted((folder / "train").iterdir())
    assert len(found) == 12 and set(found) == {
        (decoded(path).numpy().tobytes(), label)
        for label, wnid in enumerate(there)
        for path in (wnid / "images").iterdir()
    }


def edited(old: str, new: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "val" / "val_annotations.txt"
        path.write_text(path.read_text().replace(old, new, 1))

    return edit


FIRST = "val_0.JPEG\tn02124075\t0\t32\t44\t62\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited("n02124075", "n02124076"), "line 1"),
        (edited("val_0.JPEG", "../val_0.JPEG"), "line 1"),
        (edited(FIRST, ""), "3 lines for 4"),
        (edited(FIRST, 2 * FIRST), "5 lines for 4"),
        (lambda root: (root / "train/n01443537/images").rename(root / "i"), "n01443537/images"),
        (lambda root: (root / "words.txt").unlink(), "words.txt"),
        (lambda root: Image.new("RGB", (64, 32)).save(root / "val/images/val_2.JPEG"), "32 x 64"),
        (lambda root: (root / "val/images/val_2.JPEG").write_bytes(b""), "val_2.JPEG"),
    ],
)
def test_damaged_tiny_imagenet_is_named(
    published: Any, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(published.tiny_imagenet())
    with refused(message):
        load("tiny-imagenet", tmp_path)


def pack(folder: Path, archive: Path) -> str:
    """Its MD5."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in (folder, *sorted(folder.rglob("*"))):
                file.write(path, path.relative_to(folder.parent))
    else:
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, folder.name)
    return hashlib.md5(archive.read_bytes()).hexdigest()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, bytes], list[str]]:
    """What can be downloaded, by address, and the addresses asked for."""
    files: dict[str, bytes] = {}
    asked: list[str] = []

    def retrieve(url: str, path: str) -> None:
        asked.append(url)
        Path(path).write_bytes(files.get(url, b"an error page"))

    monkeypatch.setattr(torchvision_utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(torchvision_utils, "_urlretrieve", retrieve)
    return files, asked


CHANGES: dict[str, Callable[[Path], object]] = {
    "absent": lambda path: path.parent.rename(path.parent.parent / "elsewhere"),
    "truncated": lambda path: path.write_bytes(b""),
    "file missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize(
    ("name", "file", "before", "number"),
    [
        *(("cifar10", "data_batch_2", before, 60) for before in CHANGES),
        ("cifar10", "batches.meta", "truncated", 60),
        ("imagenette", "val", "absent", 20),
        ("tiny-imagenet", "words.txt", "absent", 12),
        ("svhn", "", "truncated", 40),
    ],
)
def test_download_fetches_and_repairs(
    published: Any, tmp_path: Path, mirror: Any, name: str, file: str, before: str, number: int
) -> None:
    files, asked = mirror
    folder = getattr(published, name.replace("-", "_").removesuffix("10"))()
    place, address = PLACES[name]
    if name == "svhn":
        for url, part, _ in map(datasets.SVHN.split_list.get, ("train", "test")):
            files[url] = (tmp_path / part).read_bytes()
            CHANGES[before](tmp_path / part)
    else:
        archive = tmp_path / ("mirror.zip" if name == "tiny-imagenet" else "mirror.tar.gz")
        md5 = pack(folder, archive)
        patch = published.monkeypatch.setattr
        patch(datasets.CIFAR10, "tgz_md5", md5)
        patch(datasets.Imagenette, "_ARCHIVES", {"160px": (address, md5)})
        patch(tiny_imagenet, "ARCHIVE", (TINY, md5))
        files[address] = archive.read_bytes()
        CHANGES[before](folder / file)
    assert load(name, tmp_path, download=True).train.num_samples == number
    assert asked[0] == address and (tmp_path / place).exists()
    asked.clear()
    load(name, tmp_path, download=True)
    assert not asked, "an intact dataset was downloaded again"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_download_of_another_file_is_refused(tmp_path: Path, mirror: Any) -> None:
    with refused("corrupted"):
        load("cifar10", tmp_path, download=True)
    assert not (tmp_path / "cifar-10-batches-py").exists()


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        *((suffix, k) for suffix in (".tar.gz", ".zip") for k in ("parent", "absolute", "sibling")),
        *((".tar.gz", kind) for kind in ("link", "hard link", "cut")),
        (".zip", "cut"),
    ],
)
def test_an_archive_writes_nothing_outside_its_folder(
    tmp_path: Path, suffix: str, kind: str
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    archive = root / f"a{suffix}"
    names = {"parent": "data/../../../outside", "absolute": str(outside), "sibling": "other/file"}
    name = names.get(kind, "data/more")
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("data/good", b"good")
            file.writestr(name, b"bad")
    else:
        with tarfile.open(archive, "w:gz") as tar:
            add_member(tar, "data/good", b"good")
            member = tarfile.TarInfo(name)
            if "link" in kind:
                member.type = tarfile.SYMTYPE if kind == "link" else tarfile.LNKTYPE
                member.linkname = str(outside)
            tar.addfile(member)
    if kind == "cut":
        archive.write_bytes(archive.read_bytes()[:-30])
    with refused("outside|alone|link|absolute|reading it fails"):
        unpack(archive, root / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert [path.name for path in root.iterdir()] == [archive.name]
