"""Random small datasets: whatever reads them agrees, or all of it refuses."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from loading import collect, load, same
from pictures import add_member
from PIL import Image
from torch import Tensor

from arat_fast.attacks.pgd import PGD
from arat_fast.data import Batch, DataSplits
from arat_fast.data.dali import has_dali
from arat_fast.data.inspect import inspect
from arat_fast.data.prepare import convert_npz, verify
from arat_fast.models.registry import MODELS, create_model
from arat_fast.objectives.arat import ARAT
from arat_fast.training.step import TrainStep

SIZE = 6
SPLITS = ("train", "val", "train")
LOADERS = ["dataloader", "resident", *(["dali"] if has_dali() else [])]
NAMES = ["cat", "café", "cafe\u0301", "train", "IMG.2024"]
NAMES += ["0", ".hid", "@eaDir", "Thumbs.db", "ü b"]
MODES = ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"]
ODD = ["I;16", "F", "I", "LAB"]
KINDS = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "bmp": "BMP", "webp": "WEBP", "gif": "GIF"}
Members = list[tuple[str, int, bytes, str]]


def image(seed: int, mode: str, kind: str) -> bytes:
    """A file of that mode where the format has it, else RGB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    grey = np.asarray(picture.convert("L"))
    deep: dict[str, Any] = {
        "I;16": (grey.astype(np.uint16) * (257 if seed % 2 else 16)),
        "I": grey.astype(np.int32),
        "F": (grey / 255).astype(np.float32),
    }
    if mode in deep:
        kind = "PNG" if mode == "I;16" and kind != "TIFF" else "TIFF"
        picture = Image.fromarray(deep[mode])
    else:
        picture = Image.fromarray(pixels, "LAB") if mode == "LAB" else picture.convert(mode)
    buffer = io.BytesIO()
    try:
        picture.save(buffer, kind)
    except (OSError, ValueError):
        Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@st.composite
def members(draw: st.DrawFn) -> Members:
    """Names, labels and contents of images, and a split."""
    chosen = []
    odd = draw(st.sampled_from([*[False] * 3, True]))
    num_classes = draw(st.sampled_from([1, 2, 2, 3, 3]))
    for index in range(draw(st.integers(7, 12))):
        mode, suffix = (
            draw(st.sampled_from([*MODES, *ODD] if odd else MODES)),
            draw(st.sampled_from(sorted(KINDS if odd else KINDS.keys() - {"gif"}))),
        )
        kind = KINDS[draw(st.sampled_from(sorted(KINDS)))] if draw(st.booleans()) else KINDS[suffix]
        named = f"{draw(st.sampled_from(['a', 'IMG.1.', '.', 'x y']))}{index}.{suffix}"
        # Most datasets have each class in each split.
        split = draw(
            st.sampled_from(["train", "val"] if odd else [SPLITS[index // num_classes % 3]])
        )
        content = image(draw(st.sampled_from([index] * 7 + [0])) if odd else index, mode, kind)
        chosen.append((named, index % num_classes, content, split))
    return chosen


def outcome(root: Path, name: str, **options: Any) -> DataSplits | str:
    """What a loader makes of a dataset: its splits, all of which can be read, or why not."""
    try:
        splits = load(name, root, image_size=SIZE, crop="pad", padding=1, **options)
        for part in (splits.train, splits.test):
            collect(part)
    except ValueError as error:
        return str(error)
    return splits


def agree(root: Path, name: str, bad_images: str = "stop") -> DataSplits | None:
    """What all loaders, ``inspect``, ``prepare`` and a training step agree on; None where they
    refuse."""
    found = [outcome(root, name, loader=loader, bad_images=bad_images) for loader in LOADERS]
    try:
        inspected: Any = inspect(root)
        number, bad = verify(root)
    except ValueError as error:
        inspected, bad = None, [str(error)]
    splits = [one for one in found if not isinstance(one, str)]
    if len(splits) < len(found):
        assert not splits, found
        event(f"{name}, {bad_images}: refused")
        assert inspected is None or bad or not inspected.use
        return None if bad_images == "skip" else agree_on_the_rest(root, name, inspected)
    event(f"{name}, {bad_images}: read")
    first, *others = splits
    copies = sum(int(note.split()[1]) for note in first.notes if "copies" in note)
    if bad_images == "stop":
        assert inspected is not None and not bad and inspected.use
        assert inspected.counts["train"] == first.train.num_samples
        assert inspected.classes == first.train.classes
        assert sum(inspected.counts.values()) == number - copies
    assert first.train.num_samples + first.test.num_samples + len(bad) == number - copies
    trained = [step(next(first.train.epoch(0)), len(first.train.classes))]
    for other in others:
        assert other.train.classes == first.train.classes
        for split in ("train", "test"):
            assert same(getattr(other, split).epoch(1), getattr(first, split).epoch(1))
        trained.append(step(next(other.train.epoch(0)), len(first.train.classes)))
    assert all(torch.equal(trained[0], weights) for weights in trained)
    return first


def agree_on_the_rest(root: Path, name: str, inspected: Any) -> DataSplits | None:
    rest = agree(root, name, "skip")
    # The command that inspect prints is not refused.
    assert rest is not None or inspected is None or not inspected.use
    return rest


def step(batch: Batch, num_classes: int) -> Tensor:
    """The weights after a step of the method."""
    torch.manual_seed(0)
    model = create_model("resnet8", num_classes, batch.x.shape[1])
    objective = ARAT(model, MODELS["resnet8"].regularized_layers, tuple(batch.x.shape[1:]))
    objective.start_epoch(0.5)
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], 0.1)
    train = TrainStep(
        model, objective, PGD(num_steps=1), optimizer, generator=torch.Generator().manual_seed(0)
    )
    train(batch.x, batch.y)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(files=members(), layout=st.sampled_from(["splits", "classes"]), data=st.data())
def test_class_folders(
    tmp_path_factory: pytest.TempPathFactory, files: Members, layout: str, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("set")
    weights = NAMES[:5] * 4 + NAMES[5:]
    names = data.draw(st.lists(st.sampled_from(weights), min_size=3, max_size=3, unique=True))
    for name, label, content, split in files:
        folder = root / (split if layout == "splits" else "") / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    agree(root, "folder")


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(files=members(), first=st.integers(0, 2), splits=st.booleans(), lost=st.booleans())
def test_shards(
    tmp_path_factory: pytest.TempPathFactory,
    files: Members,
    first: int,
    splits: bool,
    lost: bool,
) -> None:
    root = tmp_path_factory.mktemp("set")
    for split in ("train", "val") if splits else ("train",):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for number, (name, label, content, own) in enumerate(files):
                if splits and own != split:
                    continue
                add_member(tar, name, content)
                if not (lost and number == 1):
                    add_member(tar, f"{name.rpartition('.')[0]}.cls", b"%d" % (label + first))
    agree(root, "webdataset")


LAYOUTS = {
    "NHWC": lambda x: x,
    "NCHW": lambda x: x.transpose(0, 3, 1, 2),
    "F": np.asfortranarray,
    "NHW": lambda x: x[..., 0],
    "RGBA": lambda x: np.concatenate([x, np.full_like(x[..., :1], x.max())], 3),
    "flat": lambda x: x.reshape(len(x), -1),
}
LABELS = {
    "plain": lambda y: y,
    "from one": lambda y: y + 1,
    "column": lambda y: y[:, None],
    "one-hot": lambda y: np.eye(y.max() + 1)[y],
    "gap": lambda y: y + (y > 0),
    "one class": lambda y: y * 0,
}


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    labels=st.sampled_from(sorted(LABELS)),
    dtype=st.sampled_from(["u1", "u1", "i1", "<i2", ">u4", "i8", "f2", "f4", ">f8", "?"]),
    label_dtype=st.sampled_from(["u1", "i1", ">i4", "u8", "f8"]),
    unit=st.booleans(),
    channels=st.sampled_from([1, 3, 3, 3, 2]),
    number=st.integers(8, 15),
    seed=st.integers(0, 99),
)
def test_arrays(
    tmp_path_factory: pytest.TempPathFactory,
    layout: str,
    labels: str,
    dtype: str,
    label_dtype: str,
    unit: bool,
    channels: int,
    number: int,
    seed: int,
) -> None:
    root = tmp_path_factory.mktemp("set") / "arrays"
    root.mkdir()
    shape = (number, SIZE, SIZE + 1, channels)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    y = np.arange(number) % 3
    images = LAYOUTS[layout]((pixels / 255 if unit else pixels).astype(dtype))
    np.save(root / "images.npy", images)
    np.save(root / "labels.npy", LABELS[labels](y).astype(label_dtype))
    splits = agree(root, "arrays")
    if splits is None:
        return
    # What is accepted is what was meant: every image with its label.
    meant = {(pixels[i, ..., :3].tobytes(), int(y[i])) for i in range(number)}
    data: Any = [splits.train.samples, splits.test.samples]
    read = {
        (part.rows[np.array([i])][0].tobytes(), int(part.labels[i]))
        for part in data
        for i in range(len(part))
    }
    # "NHW" keeps one channel of several, and with an opaque one two are three.
    assert (
        read == meant or (layout == "NHW" and channels > 1) or (layout == "RGBA" and channels == 2)
    )
    np.savez(root.parent / "a.npz", image=images, label=np.load(root / "labels.npy"))
    convert_npz(root.parent / "a.npz", root.parent / "made")
    made = agree(root.parent / "made", "arrays")
    assert made is not None and same(made.train.epoch(0), splits.train.epoch(0))
    shutil.rmtree(root.parent)
