"""No silent wrong number, no silently lost data: what is not right is refused by its name."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import LOADERS, collect, levels, load, refused, same
from pictures import CLASSES, add_member, encoded, image_folder, picture, tar_shard
from PIL import Image, ImageCms

from arat_fast.data.inspect import inspect
from arat_fast.data.prepare import convert_npz, verify
from arat_fast.datasets.decoding import decode_image
from arat_fast.datasets.folder import class_folders
from arat_fast.files import read_lines

Change = Callable[[Path], object]
RNG = np.random.default_rng(8)
BASE = picture(4, 21, 25)
GREY = np.asarray(BASE.convert("L"))
DEEP = np.linspace(0, 65535, 21 * 25).reshape(21, 25).astype(np.uint16)


# Pixels


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def deep_png(values: Any) -> bytes:
    """A PNG of three channels of 16 bits, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.fromarray(RNG.integers(0, 256, (21, 25), dtype=np.uint8)))
    return image


TURNED = Image.Exif()
TURNED[274] = 6
TWO_FRAMES: dict[str, Any] = {"save_all": True, "append_images": [picture(5, 21, 25)]}
RGB = np.asarray(BASE)
READ: dict[str, tuple[bytes, Any]] = {
    "gif": (saved(BASE, "GIF"), None),
    "webp": (saved(BASE, "WEBP", lossless=True), RGB),
    "bmp": (saved(BASE, "BMP"), RGB),
    "tiff": (saved(BASE, "TIFF"), RGB),
    "jpeg 2000": (saved(BASE, "JPEG2000"), RGB),
    "progressive": (saved(BASE, "JPEG", progressive=True), None),
    "cmyk jpeg": (saved(BASE.convert("CMYK"), "JPEG"), None),
    "cmyk tiff": (saved(BASE.convert("CMYK"), "TIFF"), RGB),
    "grey jpeg": (saved(BASE.convert("L"), "JPEG"), None),
    "turned": (saved(BASE, "PNG", exif=TURNED), RGB),
    "alpha": (saved(with_alpha(BASE.convert("RGBA")), "PNG"), RGB),
    "grey alpha": (saved(with_alpha(BASE.convert("LA")), "PNG"), GREY[..., None].repeat(3, 2)),
    "palette": (
        saved(BASE.quantize(9), "PNG", transparency=2),
        np.asarray(BASE.quantize(9).convert("RGB")),
    ),
    "one bit": (saved(BASE.convert("1"), "TIFF"), np.asarray(BASE.convert("1").convert("RGB"))),
    "16 bits": (saved(Image.fromarray(DEEP), "PNG"), np.round(DEEP / 257)[..., None].repeat(3, 2)),
    "16 bits tiff": (
        saved(Image.fromarray(DEEP), "TIFF"),
        np.round(DEEP / 257)[..., None].repeat(3, 2),
    ),
    "pgm of 12 bits": (
        b"P5 25 21 4095\n" + (DEEP // 16).astype(">u2").tobytes(),
        np.round((DEEP // 16) / 4095 * 255)[..., None].repeat(3, 2),
    ),
    "16 bits of colour": (deep_png(RGB.astype(int) * 257), RGB),
}
REFUSED: dict[str, tuple[bytes, str]] = {
    "float": (saved(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"), "float"),
    "32 bits": (saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), "32-bit"),
    "12 of 16 bits": (saved(Image.fromarray(DEEP // 16), "PNG"), "none is above 4,095"),
    "10 of 16 bits": (saved(Image.fromarray(DEEP // 64), "TIFF"), "none is above 1,023"),
    "12 of 16 bits of colour": (deep_png(RGB.astype(int) * 16), "of its 16 bits"),
    "lab": (saved(Image.fromarray(RGB, "LAB"), "TIFF"), "LAB"),
    "animated gif": (saved(BASE, "GIF", **TWO_FRAMES), "2 images"),
    "animated png": (saved(BASE, "PNG", **TWO_FRAMES), "2 images"),
    "pages": (saved(BASE, "TIFF", **TWO_FRAMES), "2 images"),
    "postscript": (saved(BASE, "EPS"), "none of"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(200), "none of"),
    "cut": (saved(BASE, "JPEG")[:-200], "truncated"),
    "cut png": (saved(BASE, "PNG")[:-200], ""),
    "empty": (b"", "empty"),
}  # fmt: skip


def photo_folder(root: Path, content: bytes) -> Path:
    """Two classes; one image of each split is the file that is looked at, called .jpg."""
    for split, first in (("train", 30), ("val", 40)):
        for label, name in enumerate(("a", "b")):
            (root / split / name).mkdir(parents=True)
            for index in range(2):
                image = encoded(picture(first + 2 * label + index, 21, 25), ".png")
                (root / split / name / f"{index}.png").write_bytes(image)
    (root / "val" / "a" / "photo.jpg").write_bytes(content)
    return root


@pytest.mark.parametrize("kind", READ)
def test_every_loader_reads_what_is_checked(tmp_path: Path, kind: str) -> None:
    content, expected = READ[kind]
    pixels = decode_image(content, "photo")
    with Image.open(io.BytesIO(content)) as image:
        whole = np.asarray(image.convert("RGB")) if expected is None else expected
    assert np.abs(pixels.astype(int) - whole).max() <= (1 if kind == "pgm of 12 bits" else 0)
    root = photo_folder(tmp_path, content)
    assert verify(root) == (9, []) and not inspect(root).bad
    for crop in ("pad", "resized"):
        options: dict[str, Any] = {"crop": crop, "image_size": 25, "padding": 0, "flip": False}
        a, *others = (load("folder", root, loader=one, **options) for one in ("dataloader", "dali"))
        for b in others:
            for split in ("train", "test"):
                assert same(getattr(a, split).epoch(0), getattr(b, split).epoch(0))
        if crop == "pad":
            x = levels(collect(a.test)[0])[:, :, 2:23].permute(0, 2, 3, 1).numpy()
            assert any(np.array_equal(one, pixels) for one in x)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("loader", LOADERS)
def test_what_has_no_certain_pixels_is_refused_by_all(
    tmp_path: Path, kind: str, loader: str
) -> None:
    content, message = REFUSED[kind]
    root = photo_folder(tmp_path, content)
    with refused(f"photo.jpg.*image file.*{message}"):
        collect(load("folder", root, loader=loader).test)
    splits = load("folder", root, loader=loader, bad_images="skip")
    assert verify(root) == (9, list(splits.skipped)) and len(splits.skipped) == 1
    assert len(collect(splits.test)[1]) == 4
    found = inspect(root)
    assert found.bad == list(splits.skipped) and found.use.endswith("--data.bad-images skip")


def test_a_profile_is_not_applied(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain, tagged = saved(BASE, "PNG"), saved(BASE, "PNG", icc_profile=profile)
    assert np.array_equal(decode_image(plain, ""), decode_image(tagged, ""))


@pytest.fixture(scope="module")
def large() -> bytes:
    return saved(Image.new("L", (10_000, 10_000), 77), "PNG", compress_level=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_one_pixel_and_a_hundred_million(
    tmp_path: Path, loader: str, crop: str, large: bytes
) -> None:
    for split, level in (("train", 9), ("val", 8)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (1, 1), (level, 7, 0)).save(tmp_path / split / name / "small.png")
    (tmp_path / "train" / "a" / "large.png").write_bytes(large)
    splits = load("folder", tmp_path, loader=loader, crop=crop)
    ((x, _),) = splits.train.epoch(0)
    assert sorted((255 * x[:, 0]).amax((1, 2)).round().tolist()) == [9, 9, 77]
    assert float((255 * collect(splits.test)[0]).amax()) == pytest.approx(8)
    with refused("12000 x 14000"):
        decode_image(saved(Image.new("1", (14_000, 12_000)), "PNG"), "name")


# Members


def put(name: str, content: bytes = b"x") -> Change:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return change


IMAGE = encoded(picture(99), ".png")
HARMLESS = [
    *("README.md", "labels.csv", "val/classes.txt", ".hidden/a.png", "train/cat/._1.png"),
    *("train/cat/@eaDir/a.png", "__MACOSX/cat/a.png", "train/.ipynb_checkpoints/a.png"),
    *("train/cat/Thumbs.db", "train/cat/LICENSE", "$RECYCLE.BIN/a.png", "notes/about.txt"),
    *("ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz", "meta.bin", "SHA256SUMS"),
]
STRAY = [
    *("a.png", "backup.tar", "pets.zip", "train/a.JPG", "unlabelled/a.png", "model.pt"),
    *("train/cat/notes.txt", "train/cat/photo.gif", "train/cat/deep/a", "train/cat/a.png.part"),
]


@pytest.mark.parametrize("name", HARMLESS)
def test_what_systems_and_authors_leave_is_no_image_and_no_class(tmp_path: Path, name: str) -> None:
    root = image_folder(tmp_path / "set")
    put(name, IMAGE)(root)
    found = class_folders(root)
    assert found.classes == CLASSES and len(found.train) == 15 and not found.bad


@pytest.mark.parametrize("name", STRAY)
def test_what_no_rule_matches_is_counted(tmp_path: Path, name: str) -> None:
    root = image_folder(tmp_path / "set")
    put(name)(root)
    with refused(f"{name.partition('/')[0]}.*skip"):
        load("folder", root)
    splits = load("folder", root, bad_images="skip")
    assert len(splits.skipped) == 1 and splits.train.num_samples == 15
    assert verify(root) == (31, list(splits.skipped)) and inspect(root).bad == list(splits.skipped)


@pytest.mark.parametrize("key", ["IMG.2024.{}", "a/b.c/{}", "./{}", "{}.v1"])
@pytest.mark.parametrize("suffix", [".png", ".JPG", ".webp"])
def test_keys_of_any_dots(tmp_path: Path, key: str, suffix: str) -> None:
    names = [f"{key.format(index)}{suffix}" for index in range(12)]
    shard = tar_shard(tmp_path / "train.TAR", 0, 12, suffix.lower(), names)
    found = inspect(tmp_path)
    assert sum(found.counts.values()) == 12 and not found.bad
    assert inspect(shard).counts == found.counts


@pytest.mark.parametrize(
    "name", ["train-1.tar.gz", "train-1.tgz", "a.png", "labels.parquet", "b.idx", "val/classes.txt"]
)
def test_what_lies_beside_shards_is_counted(tmp_path: Path, name: str) -> None:
    tar_shard(tmp_path / "train-0.tar", 0, 12)
    put("__MACOSX/._train-0.tar")(tmp_path)
    put("sizes.json")(tmp_path)
    put("train-0.idx")(tmp_path)
    put(name)(tmp_path)
    with refused(name):
        load("webdataset", tmp_path)
    assert len(load("webdataset", tmp_path, bad_images="skip").skipped) == 1


# Degenerate data


def one_level_too_high(root: Path) -> None:
    for name in ("train", "val"):
        (root / "archive/data").mkdir(parents=True, exist_ok=True)
        (root / name).rename(root / "archive/data" / name)


def only(root: Path, *folders: str) -> None:
    """As a dataset of these folders, which all hold images."""
    for split in ("train", "val"):
        for name in CLASSES:
            (root / split / name).rename(root / f"{split}{name}")
    (root / "train").rmdir()
    (root / "val").rmdir()
    for index, folder in enumerate(folders):
        (root / folder).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{('train', 'val')[index % 2]}{CLASSES[index // 2]}").rename(root / folder)
    for left in root.glob("[tv]*[tlg]"):
        if left.name not in folders and left.name not in ("train", "val"):
            left.rename(root.parent / left.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_level_too_high, "archive alone.*set/archive/data: pass that"),
        (lambda root: only(root, "images"), "images alone"),
        (lambda root: [only(root, "images"), put("labels.csv")(root)], "read from labels.csv"),
        (lambda root: only(root, "images", "masks"), "images and masks"),
        (lambda root: only(root, "pets/cat", "pets/dog"), "classes seem to be in .*pets: pass"),
        (lambda root: only(root, "train/x/cat", "train/x/dog"), "train/x: move"),
        (lambda root: only(root, "a/train", "b/train"), "a holds train; pass"),
        (lambda root: [file.unlink() for file in (root / "val/dog").iterdir()], "val/dog"),
        (lambda root: (root / "val/dog").rename(root / "dog"), "val/dog"),
        (lambda root: (root / "val/dog").rename(root / "val/Dog"), "got Dog too"),
    ],
)
def test_folders_that_train_on_nothing_are_refused(
    tmp_path: Path, change: Change, message: str
) -> None:
    root = image_folder(tmp_path / "set")
    change(root)
    for read in (inspect, verify, lambda root: load("folder", root, bad_images="skip")):
        with refused(message):
            read(root)


def copied(root: Path) -> None:
    (root / "val/cat/z.png").write_bytes((root / "train/dog/1_0.png").read_bytes())


def shared_link(root: Path) -> None:
    for file in (root / "val/cat").iterdir():
        file.unlink()
    for file in sorted((root / "train/cat").iterdir())[:3]:
        (root / "val/cat" / file.name).symlink_to(file)
    put("val/cat/z.png", IMAGE)(root)


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (copied, 1),
        (lambda root: os.link(root / "train/owl/2_1.png", root / "val/owl/same.png"), 1),
        (shared_link, 3),
    ],
)  # fmt: skip
def test_files_in_two_splits_are_refused_or_left_out(
    tmp_path: Path, change: Change, number: int
) -> None:
    root = image_folder(tmp_path / "set")
    change(root)
    with refused("val.*same as.*train"):
        load("folder", root)
    splits = load("folder", root, bad_images="skip")
    assert len(splits.skipped) == number and splits.train.num_samples == 15
    (root / "val").rename(tmp_path / "val")
    (root / "val").symlink_to(root / "train")
    with refused("no val image is left"):
        load("folder", root, bad_images="skip")


def copies_in_classes(root: Path) -> Path:
    for index in range(20):
        put(f"{'ab'[index % 2]}/{index}.png", encoded(picture(index % 15), ".png"))(root)
    return root


def copies_in_shards(root: Path) -> Path:
    tar_shard(root / "0.tar", 0, 30)
    tar_shard(root / "1.tar", 0, 9)
    return root


def copies_in_arrays(root: Path) -> Path:
    return arrays(root, np.concatenate([PIXELS, PIXELS[:5]]), np.concatenate([LABELS, LABELS[:5]]))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("folder", copies_in_classes),
        ("webdataset", copies_in_shards),
        ("arrays", copies_in_arrays),
    ],
)
def test_what_is_held_out_is_no_copy_of_what_is_trained_on(
    tmp_path: Path, name: str, make: Callable[[Path], Path]
) -> None:
    splits = load(name, make(tmp_path / "set"), num_val=4)
    train, *held = (part.samples for part in (splits.train, splits.val, splits.test) if part)
    seen = {train.image(index).tobytes() for index in range(len(train))}
    assert "copies" in " ".join(splits.notes) and len(held) == 2
    for part in held:
        assert len(part)
        assert not seen & {part.image(index).tobytes() for index in range(len(part))}


def test_files_in_two_classes_are_said(tmp_path: Path) -> None:
    root = copies_in_classes(tmp_path / "set")
    for notes in (load("folder", root).notes, inspect(root).notes):
        (said,) = [note for note in notes if "in two classes" in note]
        assert ": 5, the first" in said and "a/0.png" in said and "b/15.png" in said


def test_a_dataset_of_copies_is_refused(tmp_path: Path) -> None:
    arrays(tmp_path, np.concatenate([PIXELS, PIXELS]), np.concatenate([LABELS, LABELS]))
    with refused("image .* take the copies out"):
        load("arrays", tmp_path)


def test_strays_are_left_out_without_a_look_at_the_images(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    put("notes.bin")(root)
    assert len(load("folder", root, bad_images="skip-strays").skipped) == 1
    assert inspect(root).use.endswith(" skip-strays")
    put("train/cat/a.png", b"")(root)
    with refused("a.png: .*empty"):
        collect(load("folder", root, bad_images="skip-strays").train)
    assert inspect(root).use.endswith(" skip")


def shard_of(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add_member(tar, name, content)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("x.cls", b"0" * 80 + b"1"), ("x.png", None)], "x.cls holds"),
        ([("x.cls", b"1.0"), ("x.png", None)], "x.cls holds"),
        ([("x.cls", "١".encode()), ("x.png", None)], "x.cls holds"),
        ([], "more.tar: expected images"),
        ([("x.cls", b"\xef\xbb\xbf1\r\n"), ("x.png", None)], ""),
        ([("e\u0301.cls", b"1"), ("\u00e9.png", None)], ""),
    ],
)
def test_labels_of_shards(tmp_path: Path, members: Any, message: str) -> None:
    tar_shard(tmp_path / "0.tar", 0, 12)
    shard_of(tmp_path / "more.tar", *((name, content or IMAGE) for name, content in members))
    if message:
        with refused(message):
            load("webdataset", tmp_path)
        return
    assert sum(inspect(tmp_path).per_class["1"].values()) == 5


# Names


def test_a_class_has_a_name_that_can_be_written(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    put("train/\udcff/a.png", IMAGE)(root)
    with refused("udcff.*UTF-8"):
        class_folders(root)


def test_unicode_forms_of_a_name_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = image_folder(tmp_path / "set")
    for split, name in (("train", composed), ("val", decomposed)):
        (root / split / "dog").rename(root / split / name)
    put(f"train/{decomposed}/more.png", IMAGE)(root)
    found = class_folders(root)
    assert found.classes == (composed, "cat", "owl") or found.classes == ("café", "cat", "owl")
    assert torch.bincount(found.train.labels).tolist() == [6, 5, 5]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("käse\nöl\n".encode(), ["käse", "öl", ""]),
        ("käse\r\nöl".encode("utf-8-sig"), ["käse", "öl"]),
        ("käse\nöl\n".encode("latin-1"), "line 1"),
        ("a\nöl\n".encode("latin-1"), "line 2"),
        ("käse\nöl\n".encode("utf-16"), "line 1"),
        ("a\nb".encode("utf-16-le"), "line 1"),
        (b"a\rb", ["a", "b"]),
    ],
)
def test_texts_are_utf8(tmp_path: Path, content: bytes, expected: Any) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    if isinstance(expected, list):
        assert read_lines(path) == expected
        return
    with refused(f"classes.txt: {expected}"):
        read_lines(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("cat\ndog\nowl\n\n", CLASSES), ("cat\n\nowl", "line 2"), ("cat\ndog\ncat", "cat again"),
     ("cat\ndog", "got 2 names"), ("a\nb\nc\nd", "got 4 names")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["webdataset", "arrays"])
def test_names_of_classes(tmp_path: Path, name: str, text: str, expected: Any) -> None:
    if name == "arrays":
        arrays(tmp_path, PIXELS, LABELS)
    else:
        tar_shard(tmp_path / "train.tar", 0, 12)
    put("classes.txt", text.encode())(tmp_path)
    if isinstance(expected, tuple):
        assert load(name, tmp_path).train.classes == inspect(tmp_path).classes == expected
        return
    with refused(expected):
        load(name, tmp_path)


# Arrays

PIXELS = RNG.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
OPAQUE = np.concatenate([PIXELS, np.full((12, 6, 5, 1), 255, np.uint8)], 3)
GREYS = PIXELS[..., :1]


def arrays(folder: Path, images: Any, labels: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    return folder


@pytest.mark.parametrize(
    ("images", "labels", "plain"),
    [
        (PIXELS, LABELS, PIXELS),
        (GREYS, LABELS.astype(np.int8), GREYS),
        (PIXELS.transpose(0, 3, 1, 2), LABELS.astype(">u2"), PIXELS),
        (GREYS.transpose(0, 3, 1, 2).copy(), LABELS[:, None], GREYS),
        (GREYS[..., 0], np.eye(3)[LABELS], GREYS),
        (np.asfortranarray(PIXELS), LABELS.astype(np.float32), PIXELS),
        (np.asfortranarray(PIXELS.transpose(0, 3, 1, 2)), np.eye(3, dtype=bool)[LABELS], PIXELS),
        (np.asfortranarray(GREYS[..., 0]), LABELS.astype(np.uint64), GREYS),
        (PIXELS / 255, LABELS, PIXELS),
        ((PIXELS / 255).astype(np.float16), LABELS, PIXELS),
        ((PIXELS / np.float32(255)).astype(">f4").transpose(0, 3, 1, 2), LABELS + 1, PIXELS),
        (PIXELS.astype(np.float64), LABELS, PIXELS),
        (PIXELS.astype(np.int16), (LABELS + 1).astype(np.int32)[:, None], PIXELS),
        (PIXELS.astype(">u8"), LABELS, PIXELS),
        (OPAQUE, LABELS, PIXELS),
        (OPAQUE.transpose(0, 3, 1, 2) / 255, LABELS, PIXELS),
    ],
)
def test_arrays_whose_meaning_is_certain_are_read(
    tmp_path: Path, images: Any, labels: Any, plain: Any
) -> None:
    root = arrays(tmp_path / "set", images, labels)
    np.savez(tmp_path / "set.npz", image=images, label=labels, classes=np.array(list("abc")))
    _, notes = convert_npz(tmp_path / "set.npz", tmp_path / "made")
    assert np.array_equal(np.load(tmp_path / "made" / "images.npy"), plain)
    expected = load("arrays", arrays(tmp_path / "plain", plain, LABELS))
    for folder in (root, tmp_path / "made"):
        for loader in ("resident", "dataloader", "dali"):
            splits = load("arrays", folder, loader=loader)
            for split in ("train", "test"):
                assert same(getattr(splits, split).epoch(0), getattr(expected, split).epoch(0))
        found = inspect(folder, max_samples=12)
        assert found.use and found.counts == {"train": 11, "test": 1}
        assert found.notes == list(splits.notes)
    assert splits.train.classes == ("a", "b", "c")
    converted = images.dtype != np.uint8 or images.shape != plain.shape or images.flags.fnc
    assert bool(notes) == converted


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (PIXELS[:, :3, :3], LABELS, r"\(12, 3, 3, 3\) uint8: which axis"),
        (PIXELS.reshape(12, -1), LABELS, r"\(12, 90\) uint8: which axis"),
        (PIXELS[..., :2], LABELS, "which axis"),
        (np.concatenate([PIXELS, GREYS], 3), LABELS, "opaque"),
        (PIXELS.astype(np.int8), LABELS, "int8"),
        (PIXELS > 9, LABELS, "bool"),
        (PIXELS.astype(np.uint16) * 257, LABELS, "to 65535"),
        (PIXELS.astype(np.int64) - 1, LABELS, "from -1"),
        (PIXELS / 127.5 - 1, LABELS, "from -1"),
        (PIXELS / 100, LABELS, "from 0 to 2.55"),
        (PIXELS // 128, LABELS, "from 0 to 1"),
        (PIXELS // 16 + 1.0, LABELS, "from 1 to 16, of which 255"),
        (PIXELS // 8, LABELS, "from 0 to 31, of which 255"),
        (PIXELS / 255**2, LABELS, "to 0.0039.*, of which 1 would"),
        (np.where(PIXELS.max() == PIXELS, np.nan, PIXELS / 255), LABELS, "not finite"),
        (PIXELS.astype(np.complex64), LABELS, "complex64"),
        (PIXELS, LABELS * 0, "label 0 for each"),
        (PIXELS, LABELS * 0 + 4, "label 4 for each"),
        (PIXELS, LABELS + 2, "none with label 0"),
        (PIXELS, LABELS / 2, "float64"),
        (PIXELS, np.eye(3)[LABELS] * 0.9, "one-hot"),
        (PIXELS, np.stack([LABELS, LABELS], 1), "one-hot"),
        (PIXELS, np.eye(4)[LABELS], "none of class 3"),
        (PIXELS, LABELS.astype(object), "never unpickled"),
        (PIXELS / 255 * (1 + 1e-7), LABELS, "to 1.0000001"),
        (PIXELS, LABELS[:, None, None], "shape"),
        (PIXELS, np.where(LABELS == 1, np.nan, LABELS), "float64"),
        (PIXELS, LABELS.astype("U"), "<U"),
        (PIXELS, np.arange(12), "too few"),
    ],
)
def test_arrays_whose_meaning_is_not_certain_are_refused(
    tmp_path: Path, images: Any, labels: Any, message: str
) -> None:
    root = arrays(tmp_path / "set", images, labels)
    with refused(message):
        load("arrays", root)
    try:
        found = inspect(root)
    except ValueError as error:
        with refused(message):
            raise error
    else:
        assert not found.use and found.note


@pytest.mark.parametrize(("names", "fits"), [("cat\ndog\nowl", True), ("dog\ncat\nowl", False)])
def test_labels_mean_the_same_in_all_arrays(tmp_path: Path, names: str, fits: bool) -> None:
    """Names lie beside the arrays of a split, as they are prepared, and beside generated images."""
    root = tmp_path / "set"
    for folder, pixels in ((root / "train", PIXELS), (root / "val", PIXELS ^ 1)):
        arrays(folder, pixels, LABELS)
    generated = arrays(tmp_path / "more", PIXELS ^ 2, LABELS)
    options = {"unsup": generated, "unsup_fraction": 0.5, "batch_size": 4}
    put("train/classes.txt", b"cat\ndog\nowl")(root)
    for place in (generated, root / "val"):
        put("classes.txt", names.encode())(place)
        if fits:
            assert load("arrays", root, **options).train.classes == CLASSES
            continue
        with refused(f"{place.name}/classes.txt.* cat for label 0, got dog"):
            load("arrays", root, **options)


def test_generated_images_that_are_evaluated_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split, pixels in (("train", PIXELS), ("test", PIXELS ^ 1)):
        arrays(root / split, pixels, LABELS)
    generated = arrays(tmp_path / "more", np.concatenate([PIXELS ^ 2, PIXELS[5:7] ^ 1]), [0, 1] * 7)
    with refused("more: image 12: .* one of the test images; 2 are"):
        load("arrays", root, unsup=generated, unsup_fraction=0.5, batch_size=4)
    grey = arrays(tmp_path / "grey", RNG.integers(0, 256, (20, 8, 8, 1), np.uint8), [0, 1] * 10)
    for loader in ("resident", "dataloader"):
        with refused("white is 255 in generated images, expected 16"):
            load("digits", root, unsup=grey, unsup_fraction=0.5, batch_size=4, loader=loader)
    alike = arrays(tmp_path / "alike", PIXELS, LABELS)
    load("arrays", root, unsup=alike, unsup_fraction=0.5, batch_size=4)


def test_blank_images_can_be_in_every_split(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        arrays(tmp_path / split, PIXELS * 0, LABELS)
    assert load("arrays", tmp_path).test.num_samples == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: put("train/images_old.npy")(root), "images_old.npy"),
        (lambda root: arrays(root / "extra", PIXELS, LABELS), "extra.* 2 files"),
        (
            lambda root: arrays(root / "val", PIXELS[:4], LABELS[:4]),
            "val: image .*same as .*train",
        ),
        (lambda root: arrays(root / "val", PIXELS[:2] ^ 1, [0, 1]), "val images .* class 2"),
        (lambda root: arrays(root / "val", PIXELS[:3] ^ 1, [0, 1, 3]), "image 2: got label 3"),
        (lambda root: arrays(root / "val", PIXELS[:, 1:], LABELS), r"val images of \(6, 5, 3\)"),
        (lambda root: arrays(root / "val", GREYS, LABELS), r"val images of .*got \(6, 5, 1\)"),
        (lambda root: (root / "train/images.npy").rename(root / "x_train.npy"), "no file .*images"),
    ],
)
def test_arrays_by_split_are_looked_at_together(
    tmp_path: Path, change: Change, message: str
) -> None:
    arrays(tmp_path / "train", PIXELS, LABELS)
    change(tmp_path)
    with refused(message):
        load("arrays", tmp_path)
