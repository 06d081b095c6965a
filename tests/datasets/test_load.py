from __future__ import annotations

import hashlib
import pickle
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import add_member
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torch import Tensor
from torchvision import datasets
from torchvision.datasets import utils as torchvision_utils

from arat_fast.config import DataConfig
from arat_fast.data import Batches, DataSplits, ResidentBatches, dali, load_data
from arat_fast.datasets import tiny_imagenet
from arat_fast.datasets.published import unpack

CPU = torch.device("cpu")


def load(name: str, root: Path = Path("unused"), seed: int = 0, **options: Any) -> DataSplits:
    options = {"batch_size": 16, "num_workers": 0, **options}
    config = DataConfig(name=name, root=root, **options)  # type: ignore[arg-type]
    return load_data(config, device=CPU, seed=seed, eval_batch_size=7)


def collect(batches: Batches, epoch: int = 0) -> tuple[Tensor, Tensor]:
    parts = list(batches.epoch(epoch))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def rows(x: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.flatten(1).tolist()}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No download gets anywhere; the addresses asked for."""
    asked: list[str] = []

    def refuse(url: str, *_: object, **__: object) -> None:
        asked.append(url)
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(torchvision_utils, "_get_redirect_url", refuse)
    monkeypatch.setattr(torchvision_utils, "_urlretrieve", refuse)
    return asked


def test_digits_are_the_real_ones_split_once_and_for_all() -> None:
    splits = load("digits", padding=0, flip=False, batch_size=100)
    test_x, test_y = collect(splits.test)
    assert splits.val is None
    assert splits.train.num_samples == 1437 and len(test_y) == 360
    assert splits.train.image_shape == (1, 8, 8)
    assert torch.bincount(test_y).min() >= 34
    train_x, train_y = collect(splits.train)
    images, labels = sklearn_digits(return_X_y=True)
    expected = {(*row, label) for row, label in zip((images / 16).tolist(), labels, strict=True)}
    seen = [
        {(*row, label) for row, label in zip(x.flatten(1).tolist(), y.tolist(), strict=True)}
        for x, y in ((train_x, train_y), (test_x, test_y))
    ]
    assert seen[0] | seen[1] == expected
    again_x, again_y = collect(load("digits", seed=5).test)
    assert torch.equal(test_x, again_x) and torch.equal(test_y, again_y)


def test_only_train_and_probe_are_shuffled_and_augmented() -> None:
    splits = load("digits", padding=1, flip=True, num_val=287)
    assert splits.val is not None
    for batches, augmented in (
        (splits.train, True),
        (splits.probe, True),
        (splits.val, False),
        (splits.test, False),
    ):
        first, second = collect(batches), collect(batches, epoch=1)
        assert torch.equal(first[0], second[0]) is not augmented
    assert [len(y) for _, y in splits.val.epoch(0)] == [7] * 41
    assert [len(y) for _, y in splits.train.epoch(0)][:2] == [16, 16]


def test_seed_decides_the_draw_and_not_the_held_out_images() -> None:
    options: dict[str, Any] = {"num_val": 287, "padding": 1}
    a, again, b = (load("digits", seed=seed, **options) for seed in (0, 0, 1))
    assert a.val is not None and b.val is not None
    assert torch.equal(collect(a.train)[0], collect(again.train)[0])
    assert not torch.equal(collect(a.train)[0], collect(b.train)[0])
    assert torch.equal(collect(a.val)[0], collect(b.val)[0])


def test_held_out_images_are_disjoint_from_training_and_stratified() -> None:
    plain: dict[str, Any] = {"padding": 0, "flip": False, "batch_size": 50}
    whole = load("digits", **plain)
    splits = load("digits", num_val=287, **plain)
    assert splits.val is not None
    val_x, val_y = collect(splits.val)
    train_x, _ = collect(splits.train)
    assert len(val_y) == 287 and splits.train.num_samples == 1437 - 287
    assert not rows(val_x) & rows(train_x)
    assert rows(val_x) | rows(train_x) == rows(collect(whole.train)[0])
    assert torch.equal(collect(splits.test)[0], collect(whole.test)[0])
    share = torch.bincount(collect(whole.train)[1]) * 287 / 1437
    assert (torch.bincount(val_y) - share).abs().max() < 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_as_torchvision_reads_it(published: Any, name: str, tmp_path: Path) -> None:
    published.cifar(name)
    splits = load(name, tmp_path, padding=0, flip=False)
    x, y = collect(splits.test)
    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    expected = dataset(tmp_path, train=False)
    assert splits.test.num_classes == (10 if name == "cifar10" else 100)
    assert splits.test.classes[9] == "class 9"
    assert y.tolist() == expected.targets
    for i in range(12):
        image = torch.from_numpy(np.array(expected[i][0]).copy()).permute(2, 0, 1)
        assert torch.equal(x[i], image.float() / 255)
    train_x, train_y = collect(splits.train)
    assert train_x.shape == (60, 3, 32, 32)
    assert sorted(train_y.tolist()) == sorted(dataset(tmp_path, train=True).targets)


def test_official_augmentation_is_four_pixels_of_zeros(published: Any, tmp_path: Path) -> None:
    def white(content: dict[str, Any]) -> None:
        content["data"][:] = 255

    published.cifar(num_train=300, edit=white)
    x, _ = collect(load("cifar10", tmp_path).train)
    white_images = (x == 1).flatten(1).float().mean(1) > 0.7
    borders = (x[white_images] == 0).all(1)
    rows_out, columns_out = borders.all(2).sum(1), borders.all(1).sum(1)
    assert int(rows_out.max()) == 4 and int(columns_out.max()) == 4
    assert int(rows_out.min()) == 0


@pytest.mark.parametrize("damaged", ["data_batch_3", "test_batch", "batches.meta"])
def test_truncated_cifar_file_is_named_and_nothing_is_unpickled(
    published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    path = published.cifar() / damaged
    expected = hashlib.md5(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-7])
    found = hashlib.md5(path.read_bytes()).hexdigest()

    def unpickle(*_: object, **__: object) -> None:
        raise AssertionError("a file was unpickled")

    monkeypatch.setattr(pickle, "load", unpickle)
    with pytest.raises(ValueError) as error:
        load("cifar10", tmp_path)
    text = one_line(error)
    for part in (str(path), found, expected, "--data.download"):
        assert part in text


class _Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("replaced", ["data_batch_1", "batches.meta"])
def test_a_planted_pickle_never_runs(published: Any, tmp_path: Path, replaced: str) -> None:
    folder, mark = published.cifar(), tmp_path / "ran"
    (folder / replaced).write_bytes(pickle.dumps(_Planted(mark)))
    with pytest.raises(ValueError, match="md5"):
        load("cifar10", tmp_path)
    assert not mark.exists()
    pickle.loads((folder / replaced).read_bytes())
    assert mark.exists(), "the planted pickle is harmless, so the test shows nothing"


def test_published_checksums_are_demanded(published: Any, tmp_path: Path) -> None:
    published.cifar()
    published.monkeypatch.undo()
    with pytest.raises(ValueError, match="expected c99cafc152244af753f735de768cd75f"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("svhn", "train_32x32.mat"),
        ("imagenette", "imagenette2-160"),
        ("tiny-imagenet", "tiny-imagenet-200"),
    ],
)
def test_absent_dataset_names_the_path_and_the_way_out(
    tmp_path: Path, name: str, place: str
) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load(name, tmp_path / "nowhere")
    text = one_line(error)
    assert str(tmp_path / "nowhere" / place) in text
    assert "--data.download" in text and "--data.root" in text


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("cifar10", 24, "cifar-10-batches-py: expected cifar10 as published, got"),
        ("cifar10", 64, "cifar-10-batches-py: expected cifar10 as published, got"),
        ("cifar100", 64, r"\(60,\) labels .* 240 images"),
    ],
)
def test_cifar_image_of_another_size_is_an_error(
    published: Any, tmp_path: Path, name: str, size: int, message: str
) -> None:
    def wrong(content: dict[str, Any]) -> None:
        content["data"] = np.zeros((len(content["data"]), 3 * size * size), np.uint8)

    published.cifar(name, edit=wrong)
    with pytest.raises(ValueError, match=message) as error:
        load(name, tmp_path)
    one_line(error)


def test_svhn_digit_zero_is_label_zero(published: Any, tmp_path: Path) -> None:
    pixels = published.svhn()
    splits = load("svhn", tmp_path, padding=0, flip=False)
    x, y = collect(splits.test)
    assert y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    expected = torch.from_numpy(pixels["test"].transpose(3, 2, 0, 1).copy()).float() / 255
    assert torch.equal(x, expected)
    assert splits.train.num_samples == 40 and splits.train.image_shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [1, 2, 11]}, r"svhn: labels must lie in \[0, 9\], got values from 1 to 11"),
        ({"size": 28}, "images of 32x32x3, got 28x28x3"),
        ({"labels": [4]}, "at least 2 images to train on are expected, got 1"),
    ],
)
def test_bad_svhn_content_is_named(
    published: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    published.svhn(**options)
    with pytest.raises(ValueError, match=message) as error:
        load("svhn", tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("cifar10", datasets.CIFAR10.url),
        ("cifar100", datasets.CIFAR100.url),
        ("svhn", datasets.SVHN.split_list["train"][0]),
        ("imagenette", datasets.Imagenette._ARCHIVES["160px"][0]),
        ("tiny-imagenet", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
    ],
)
def test_failed_download_is_one_sentence(
    tmp_path: Path, no_network: list[str], name: str, address: str
) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load(name, tmp_path, download=True)
    text = one_line(error)
    assert no_network[0] == address and address in text
    assert "Name or service not known" in text and str(tmp_path) in text


def test_download_of_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision_utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(
        torchvision_utils,
        "_urlretrieve",
        lambda url, path: Path(path).write_bytes(b"an error page"),
    )
    with pytest.raises(FileNotFoundError, match="corrupted") as error:
        load("cifar10", tmp_path, download=True)
    one_line(error)
    assert not (tmp_path / "cifar-10-batches-py").exists()


def test_tiny_imagenet_as_published(published: Any, tmp_path: Path) -> None:
    folder = published.tiny_imagenet()
    splits = load("tiny-imagenet", tmp_path, padding=0, flip=False, num_val=4)
    assert isinstance(splits.train, ResidentBatches) and splits.val is not None
    assert splits.train.classes == ("goldfish", "Egyptian cat", "go-kart", "reel")
    assert splits.train.num_samples == 8 and splits.val.num_samples == 4
    x, y = collect(splits.test)
    assert y.tolist() == [1, 0, 3, 2] and x.shape == (4, 3, 64, 64)
    for index, image in enumerate(x):
        with Image.open(folder / "val" / "images" / f"val_{index}.JPEG") as file:
            expected = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(image, expected.float() / 255)
    train_x, train_y = (
        torch.cat(parts) for parts in zip(collect(splits.train), collect(splits.val), strict=True)
    )
    found = {
        (image_bytes(image), label) for image, label in zip(train_x, train_y.tolist(), strict=True)
    }
    for label, wnid in enumerate(sorted(path.name for path in (folder / "train").iterdir())):
        for path in (folder / "train" / wnid / "images").iterdir():
            with Image.open(path) as file:
                pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
            assert (image_bytes(pixels.float() / 255), label) in found


def image_bytes(image: Tensor) -> bytes:
    return image.contiguous().numpy().tobytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("class", "val_annotations.txt: line 1: expected a file name and a class of wnids.txt"),
        ("outside", "val_annotations.txt: line 1: expected a file name"),
        ("line", "expected each image of .*images once, got 3 lines for 4 images"),
        ("twice", "expected each image of .*images once, got 5 lines for 4 images"),
        ("empty", "n01443537/images: expected .JPEG images, got none"),
        ("words", "no dataset file at .*words.txt"),
        ("size", "val_2.JPEG: tiny-imagenet has images of 64 x 64 pixels, got 32 x 64"),
        ("image", "val_2.JPEG: expected an image file"),
    ],
)
def test_damaged_tiny_imagenet_is_named(
    published: Any, tmp_path: Path, damage: str, message: str
) -> None:
    folder = published.tiny_imagenet()
    annotations = folder / "val" / "val_annotations.txt"
    text = annotations.read_text()
    if damage == "class":
        annotations.write_text(text.replace("n02124075", "n02124076"))
    elif damage == "outside":
        annotations.write_text(text.replace("val_0.JPEG", "../val_0.JPEG"))
    elif damage == "line":
        annotations.write_text(text.partition("\n")[2])
    elif damage == "twice":
        annotations.write_text(text + text.partition("\n")[0] + "\n")
    elif damage == "empty":
        for file in (folder / "train" / "n01443537" / "images").iterdir():
            file.unlink()
    elif damage == "words":
        (folder / "words.txt").unlink()
    elif damage == "size":
        Image.new("RGB", (64, 32)).save(folder / "val" / "images" / "val_2.JPEG")
    else:
        (folder / "val" / "images" / "val_2.JPEG").write_bytes(b"")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load("tiny-imagenet", tmp_path)
    one_line(error)


def test_download_of_tiny_imagenet(
    published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published.tiny_imagenet()
    source = tmp_path / "mirror.zip"
    with zipfile.ZipFile(source, "w") as file:
        for path in sorted(folder.parent.rglob("*")):
            if folder in (path, *path.parents):
                file.write(path, path.relative_to(tmp_path))
    address, _ = tiny_imagenet.ARCHIVE
    md5 = hashlib.md5(source.read_bytes()).hexdigest()
    monkeypatch.setattr(tiny_imagenet, "ARCHIVE", (address, md5))
    folder.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(torchvision_utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(
        torchvision_utils,
        "_urlretrieve",
        lambda url, path: Path(path).write_bytes(source.read_bytes()),
    )
    assert load("tiny-imagenet", tmp_path, download=True).train.num_samples == 12
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def pack(folder: Path, archive: Path) -> str:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return hashlib.md5(archive.read_bytes()).hexdigest()


@pytest.mark.parametrize("before", ["absent", "truncated", "truncated meta", "file missing"])
def test_download_fetches_and_repairs_cifar(
    published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    folder = published.cifar()
    source = tmp_path / "mirror.tar.gz"
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", pack(folder, source))
    target = {"truncated meta": "batches.meta"}.get(before, "data_batch_2")
    if before == "absent":
        folder.rename(tmp_path / "elsewhere")
    elif before == "file missing":
        (folder / target).unlink()
    else:
        (folder / target).write_bytes(b"")
    asked = []

    def retrieve(url: str, path: str) -> None:
        asked.append(url)
        Path(path).write_bytes(source.read_bytes())

    monkeypatch.setattr(torchvision_utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(torchvision_utils, "_urlretrieve", retrieve)
    splits = load("cifar10", tmp_path, download=True)
    assert asked == [datasets.CIFAR10.url]
    assert splits.train.num_samples == 60
    load("cifar10", tmp_path, download=True)
    assert len(asked) == 1, "an intact dataset was downloaded again"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_download_of_svhn_and_imagenette(
    published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.svhn()
    folder = published.imagenette()
    archive = tmp_path / "mirror.tgz"
    url = datasets.Imagenette._ARCHIVES["160px"][0]
    archives = {"160px": (url, pack(folder, archive))}
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", archives)
    folder.rename(tmp_path / "elsewhere")
    files = {url: archive.read_bytes()}
    for split in ("train", "test"):
        address, name, _ = datasets.SVHN.split_list[split]
        files[address] = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"cut")
    monkeypatch.setattr(torchvision_utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(
        torchvision_utils, "_urlretrieve", lambda url, path: Path(path).write_bytes(files[url])
    )
    assert load("svhn", tmp_path, download=True).train.num_samples == 40
    assert load("imagenette", tmp_path, download=True, image_size=8).train.num_samples == 20


@pytest.mark.parametrize("kind", ["parent", "absolute", "sibling", "link", "hard link", "cut"])
@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_an_archive_writes_nothing_outside_its_folder(
    tmp_path: Path, kind: str, suffix: str
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
    with suppress(ValueError):
        unpack(archive, root / "data")
        assert (root / "data" / "good").read_bytes() == b"good"
        assert kind != "cut"
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert {path.name for path in root.iterdir()} <= {archive.name, "data"}
    assert not any(path.is_symlink() for path in root.rglob("*"))


def test_the_way_to_dali_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "has_dali", lambda: False)
    expected = r"pip install -e '\.\[dali\]' in the checkout .*, or --data.loader dataloader"
    with pytest.raises(ValueError, match=expected):
        dali.require_dali()


@pytest.mark.parametrize(("label", "found"), [(10, "0 to 10"), (-1, "-1 to 9")])
def test_label_out_of_range_is_named(
    published: Any, tmp_path: Path, label: int, found: str
) -> None:
    def wrong(content: dict[str, Any]) -> None:
        content["labels"][2] = label

    published.cifar(edit=wrong)
    with pytest.raises(ValueError, match=rf"cifar10: labels must lie in \[0, 9\], .* {found}") as e:
        load("cifar10", tmp_path, num_val=5)
    one_line(e)
