"""Every loader gives the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from pictures import image_folder, tar_shard
from PIL import Image
from torch import Tensor
from torchvision import datasets

from arat_fast.config import DataConfig
from arat_fast.data import (
    Batch,
    Batches,
    BatchPlan,
    DaliBatches,
    DataSplits,
    LoaderBatches,
    ResidentBatches,
    Shard,
    StreamedBatches,
    load_data,
)
from arat_fast.data.dali import has_dali
from arat_fast.data.framing import AREA, RATIO, Framing
from arat_fast.datasets.encoded import FileImages
from arat_fast.datasets.rows import ArrayRows
from arat_fast.evaluation.evaluate import ImageSet

CPU = torch.device("cpu")
needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
ARRAY_LOADERS = [
    "resident",
    pytest.param("dali", marks=needs_dali),
    "dataloader",
]
FILE_LOADERS = ["dataloader", pytest.param("dali", marks=needs_dali)]


def load(name: str, root: Path, loader: str, seed: int = 0, **options: Any) -> DataSplits:
    shard = options.pop("shard", Shard())
    defaults = {"batch_size": 6, "image_size": 24, "num_workers": 0}
    config = DataConfig(
        name=name,  # type: ignore[arg-type]
        root=root,
        loader=loader,  # type: ignore[arg-type]
        **{**defaults, **options},
    )
    return load_data(config, device=CPU, seed=seed, eval_batch_size=7, shard=shard)


def pixels(batches: Batches, epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches as uint8 values and labels."""
    return [((255 * x).round().to(torch.uint8), y) for x, y in batches.epoch(epoch, start)]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("loader", ARRAY_LOADERS)
def test_cifar_is_torchvisions_by_every_loader(published: Any, tmp_path: Path, loader: str) -> None:
    published.cifar()
    splits = load("cifar10", tmp_path, loader, padding=0, flip=False)
    kind = {"resident": ResidentBatches}.get(loader, StreamedBatches)
    assert isinstance(splits.train, kind) and isinstance(splits.test, kind)
    for batches, train in ((splits.test, False), (splits.train, True)):
        expected = datasets.CIFAR10(tmp_path, train=train)
        order = torch.cat(
            [batches.plan.order(3)[batches.plan.places(number)] for number in range(len(batches))]
        )
        x = torch.cat([x for x, _ in pixels(batches, 3)])
        y = torch.cat([y for _, y in pixels(batches, 3)])
        for place, index in enumerate(order.tolist()):
            image, label = expected[index]
            assert torch.equal(x[place], torch.from_numpy(np.array(image)).permute(2, 0, 1))
            assert int(y[place]) == label


@pytest.mark.parametrize("loader", ARRAY_LOADERS[1:])
@pytest.mark.parametrize("split", ["train", "probe", "val", "test"])
def test_augmented_batches_of_arrays_are_those_of_the_resident_loader(
    published: Any, tmp_path: Path, loader: str, split: str
) -> None:
    published.svhn()
    options: dict[str, Any] = {"padding": 3, "num_val": 9}
    expected = getattr(load("svhn", tmp_path, "resident", **options), split)
    batches = getattr(load("svhn", tmp_path, loader, **options), split)
    for epoch in (0, 2):
        assert same(list(expected.epoch(epoch)), list(batches.epoch(epoch)))
    assert same(list(expected.epoch(1, 2)), list(batches.epoch(1, 2)))
    assert batches.num_samples == expected.num_samples
    assert batches.image_shape == expected.image_shape == (3, 32, 32)


def test_arrays_that_do_not_fit_a_cpu_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI is slower there."""
    monkeypatch.setattr("arat_fast.data.load._room", lambda device: 0)
    monkeypatch.setattr("arat_fast.data.load.has_dali", lambda: True)
    train = load("digits", Path(), "auto").train
    assert isinstance(train, StreamedBatches) and train.loader == "dataloader"


@pytest.mark.parametrize("loader", ARRAY_LOADERS)
def test_digits_have_their_own_largest_value(loader: str) -> None:
    expected = load("digits", Path(), "resident", padding=1, batch_size=200)
    batches = load("digits", Path(), loader, padding=1, batch_size=200)
    assert same(list(expected.train.epoch(0)), list(batches.train.epoch(0)))
    assert max(float(x.max()) for x, _ in batches.test.epoch(0)) == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("loader", ARRAY_LOADERS)
def test_memory_format(loader: str, memory_format: torch.memory_format) -> None:
    config = DataConfig("digits", loader=loader, padding=1, num_workers=0)  # type: ignore[arg-type]
    splits = load_data(config, device=CPU, seed=0, eval_batch_size=9, memory_format=memory_format)
    x, _ = next(splits.train.epoch(0))
    assert x.is_contiguous(memory_format=memory_format)


def crop_config(framing: str) -> dict[str, Any]:
    return {"crop": framing, "padding": 3}


@needs_dali
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("crop", ["pad", "resized"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_dali_decodes_files_as_the_dataloader_does(
    tmp_path: Path, suffix: str, crop: str, split: str
) -> None:
    """Identical, augmented or not: DALI decodes with the same arithmetic, PyTorch scales both."""
    root = image_folder(tmp_path / "set", suffix=suffix)
    options = {**crop_config(crop), "num_val": 3}
    expected = getattr(load("folder", root, "dataloader", **options), split)
    batches = getattr(load("folder", root, "dali", num_workers=2, **options), split)
    assert isinstance(expected, LoaderBatches) and isinstance(batches, DaliBatches)
    for epoch in (0, 1):
        assert same(list(expected.pixels(epoch)), list(batches.pixels(epoch)))


@pytest.mark.parametrize("loader", FILE_LOADERS)
@pytest.mark.parametrize(("suffix", "levels"), [(".png", 0), (".jpg", 1)])
def test_files_without_augmentation_are_the_images(
    tmp_path: Path, loader: str, suffix: str, levels: int
) -> None:
    root = image_folder(tmp_path / "set", suffix=suffix)
    batches = load("folder", root, loader, crop="pad", image_size=28).test
    assert isinstance(batches, (DaliBatches, LoaderBatches))
    assert isinstance(batches.source, FileImages)
    x = torch.cat([x for x, _ in batches.pixels(0)])
    for image, (path, _) in zip(x, batches.source.samples, strict=True):
        with Image.open(path) as file:
            whole = np.asarray(file.convert("RGB")).astype(int)
        top, left = (round((length - 28) / 2) for length in whole.shape[:2])
        expected = whole[top : top + 28, left : left + 28].transpose(2, 0, 1)
        assert np.abs(image.numpy().astype(int) - expected).max() <= levels


@pytest.mark.parametrize("loader", FILE_LOADERS)
def test_tar_shards_are_the_same_images_as_their_files(tmp_path: Path, loader: str) -> None:
    tar_shard(tmp_path / "shards" / "train-0.tar", 0, 7)
    tar_shard(tmp_path / "shards" / "train-1.tar", 7, 6)
    tar_shard(tmp_path / "shards" / "test-0.tar", 13, 5)
    splits = load("webdataset", tmp_path / "shards", loader, num_workers=2)
    from pictures import encoded, picture

    files = []
    for index in range(13):
        files.append((tmp_path / f"{index}.jpg", index % 3))
        files[-1][0].write_bytes(encoded(picture(index), ".jpg"))
    framing = Framing(24, "resized", random=True, padding=4, flip=True)
    expected = LoaderBatches(
        FileImages(files), ("0", "1", "2"), framing, batch_size=6, device=CPU, shuffle=True
    )
    for epoch in (0, 3):
        assert same(list(expected.epoch(epoch)), list(splits.train.epoch(epoch)))
    assert splits.train.classes == ("0", "1", "2")
    assert sum(len(y) for _, y in splits.test.epoch(0)) == splits.test.num_samples == 5


@pytest.fixture(params=["resident", "stream", "dali stream", "dataloader", "dali"])
def any_loader(
    request: pytest.FixtureRequest, tmp_path: Path, published: Any
) -> Iterator[tuple[str, Path, str, dict[str, Any]]]:
    """Dataset, root, loader and options of each way to train."""
    name, root, loader, options = {
        "resident": ("cifar10", tmp_path, "resident", {}),
        "stream": ("cifar10", tmp_path, "dataloader", {"num_workers": 2}),
        "dali stream": ("cifar10", tmp_path, "dali", {}),
        "dataloader": ("folder", tmp_path / "set", "dataloader", {"num_workers": 2}),
        "dali": ("folder", tmp_path / "set", "dali", {"num_workers": 2}),
    }[request.param]
    if loader == "dali" and not has_dali():
        pytest.skip("DALI is not installed")
    if name == "cifar10":
        published.cifar(num_train=35)
    else:
        image_folder(root, per_class=12)
    yield name, root, loader, options


def test_epochs_differ_seeds_repeat_and_any_batch_resumes(
    any_loader: tuple[str, Path, str, dict[str, Any]],
) -> None:
    name, root, loader, options = any_loader
    train = load(name, root, loader, seed=1, **options).train
    first = list(train.epoch(0))
    assert not same(first, list(train.epoch(1)))
    assert same(first, list(train.epoch(0)))
    again = load(name, root, loader, seed=1, **options).train
    assert not same(first, list(load(name, root, loader, seed=2, **options).train.epoch(0)))
    for start in range(len(train) + 1):
        assert same(first[start:], list(again.epoch(0, start)))
    labels = torch.cat([y for _, y in first])
    assert len(labels) == train.num_samples - train.num_samples % 6 * (train.num_samples % 6 == 1)


def test_an_epoch_left_early_does_not_show_in_the_next(
    any_loader: tuple[str, Path, str, dict[str, Any]],
) -> None:
    name, root, loader, options = any_loader
    train = load(name, root, loader, **options).train
    expected = [list(train.epoch(epoch)) for epoch in (0, 1)]
    for taken in (1, 2, 3):
        batches = train.epoch(0)
        some = [next(batches) for _ in range(taken)]
        assert same(some, expected[0][:taken])
        batches.close()  # type: ignore[attr-defined]
        assert same(list(train.epoch(1)), expected[1])


def test_three_ranks_with_an_indivisible_size(
    any_loader: tuple[str, Path, str, dict[str, Any]],
) -> None:
    """35 or 36 training images in batches of 8: 3 or 4 are too few for three ranks to train on."""
    name, root, loader, options = any_loader
    options = {**options, "batch_size": 8}
    alone = load(name, root, loader, **options)
    ranks = [load(name, root, loader, shard=Shard(rank, 3), **options) for rank in range(3)]
    whole = list(alone.train.epoch(1))
    parts = [list(splits.train.epoch(1)) for splits in ranks]
    assert len(whole) == 5 and {len(part) for part in parts} == {4}
    shared = [
        Batch(torch.cat([b.x for b in batch]), torch.cat([b.y for b in batch]))
        for batch in zip(*parts, strict=True)
    ]
    assert same(whole[:4], shared)
    # What is evaluated: each rank holds a part of it, in a row.
    held = [
        ImageSet.from_batches(splits.test, shard=Shard(rank, 3))
        for rank, splits in enumerate(ranks)
    ]
    tested = ImageSet.from_batches(alone.test)
    assert torch.equal(torch.cat([part.x for part in held]), tested.x)
    assert torch.equal(torch.cat([part.y for part in held]), tested.y)


def test_global_generator_is_neither_read_nor_moved(
    any_loader: tuple[str, Path, str, dict[str, Any]],
) -> None:
    name, root, loader, options = any_loader
    train = load(name, root, loader, **options).train
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = list(train.epoch(0))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert same(first, list(train.epoch(0)))


@pytest.mark.parametrize("loader", ARRAY_LOADERS)
def test_crops_and_flips_of_every_array_loader_are_uniform(loader: str) -> None:
    size, padding, number = 12, 2, 4000
    image = np.arange(1, size * size + 1, dtype=np.uint8).reshape(1, size, size, 1)
    rows = ArrayRows(np.repeat(image, number, 0))
    labels = torch.zeros(number, dtype=torch.int64)
    plan = BatchPlan(number, 500, shuffle=True, seed=6)
    options: dict[str, Any] = {"padding": padding, "flip": True}
    if loader == "resident":
        x = torch.from_numpy(rows.pixels).permute(0, 3, 1, 2)
        batches: Any = ResidentBatches(x, labels, ("a",), batch_size=500, plan=plan, **options)
    else:
        batches = StreamedBatches(rows, labels, ("a",), plan, device=CPU, loader=loader, **options)
    x = torch.cat([255 * x for x, _ in batches.epoch(0)]).round().long()
    here, right = x[:, 0, 6, 6] - 1, x[:, 0, 6, 7] - 1
    mirrored = (right < here).long()
    row = here // size - 6 + padding
    column = here % size - torch.where(mirrored == 1, 5, 6) + padding
    counts = torch.bincount((row * 5 + column) * 2 + mirrored, minlength=50)
    assert len(counts) == 50
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def resized_boxes(number: int, height: int = 300, width: int = 400) -> tuple[Any, Any]:
    framing = Framing(8, "resized", random=True, flip=True)
    plan = BatchPlan(number, number, shuffle=True, seed=4)
    return framing.place([height] * number, [width] * number, framing.draw(plan, 0, 0))


def test_random_resized_crops_have_the_published_sizes_shapes_and_places() -> None:
    height, width = 3000, 4000
    boxes, mirror = resized_boxes(20_000, height, width)
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    assert abs(mirror.mean() - 0.5) < 0.02
    area, ratio = h * w / (height * width), w / h
    assert area.min() > AREA[0] - 0.001 and area.max() <= AREA[1]
    assert ratio.min() > RATIO[0] - 0.01 and ratio.max() < RATIO[1] + 0.01
    # Small crops fit in any shape, so that nothing was rejected: uniform in the logarithm.
    small = area < 0.4
    u = np.log(ratio[small] / RATIO[0]) / np.log(RATIO[1] / RATIO[0])
    assert scipy.stats.chisquare(np.histogram(u, 20, (0, 1))[0]).pvalue > 1e-3
    places = top[small] / (height - h[small])
    assert scipy.stats.chisquare(np.histogram(places, 20, (0, 1))[0]).pvalue > 1e-3
    places = left[small] / (width - w[small])
    assert scipy.stats.chisquare(np.histogram(places, 20, (0, 1))[0]).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (2, 3), (7, 900)])
@pytest.mark.parametrize("random", [False, True])
def test_resized_crops_of_odd_images_lie_inside(height: int, width: int, random: bool) -> None:
    framing = Framing(8, "resized", random=random)
    plan = BatchPlan(500, 500, shuffle=True)
    draws = framing.draw(plan, 0, 0)
    boxes, _ = framing.place([height] * 500, [width] * 500, draws)
    top, left, h, w = boxes.T
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
