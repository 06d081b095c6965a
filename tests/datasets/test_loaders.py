"""Every loader gives the same batches."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import CPU, LOADERS, collect, levels, load, needs_dali, refused, same
from pictures import encoded, image_folder, picture, tar_shard
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import RandAugment
from torchvision.transforms.v2 import functional as F

from arat_fast.data import (
    Batch,
    BatchPlan,
    DaliBatches,
    Framing,
    LoaderBatches,
    ResidentBatches,
    Shard,
    Shift,
)
from arat_fast.data.dali import has_dali
from arat_fast.data.framing import AREA, RATIO
from arat_fast.data.plan import seeded_generator
from arat_fast.datasets.encoded import EncodedImages
from arat_fast.datasets.rows import Images
from arat_fast.evaluation.evaluate import ImageSet

KINDS = {"resident": ResidentBatches, "dataloader": LoaderBatches, "dali": DaliBatches}
ARRAY_LOADERS = ["resident", *LOADERS]


# Images in arrays


@pytest.mark.parametrize("loader", ARRAY_LOADERS)
def test_cifar_is_torchvisions_by_every_loader(published: Any, tmp_path: Path, loader: str) -> None:
    published.cifar()
    splits = load("cifar10", tmp_path, loader=loader, padding=0, flip=False)
    for batches, train in ((splits.test, False), (splits.train, True)):
        assert type(batches) is KINDS[loader]
        expected = datasets.CIFAR10(tmp_path, train=train)
        order = [batches.plan.samples(3, number) for number in range(len(batches))]
        x, y = collect(batches, 3)
        for place, index in enumerate(torch.cat(order).tolist()):
            image, label = expected[index]
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            assert torch.equal(levels(x[place]), pixels) and int(y[place]) == label


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [
        ("svhn", torch.channels_last),
        pytest.param("digits", torch.contiguous_format, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("loader", LOADERS)
def test_batches_of_arrays_are_those_of_the_resident_loader(
    published: Any, tmp_path: Path, loader: str, name: str, memory_format: torch.memory_format
) -> None:
    """Digits have their own largest value."""
    published.svhn()
    options: dict[str, Any] = {"padding": 3, "num_val": 9, "memory_format": memory_format}
    expected = load(name, tmp_path, loader="resident", **options)
    splits = load(name, tmp_path, loader=loader, **options)
    for a, b in zip(expected[:4], splits[:4], strict=True):
        assert same(a.epoch(1, 2), b.epoch(1, 2))
        assert (a.num_samples, a.image_shape) == (b.num_samples, b.image_shape)
    x = next(splits.train.epoch(0)).x
    assert x.is_contiguous(memory_format=memory_format)
    assert max(float(x.max()) for x, _ in splits.test.epoch(0)) == 1


@pytest.mark.parametrize(
    ("name", "dali", "kind"),
    [
        # For arrays on a CPU DALI is slower.
        ("digits", True, LoaderBatches),
        ("folder", False, LoaderBatches),
        pytest.param("folder", True, DaliBatches, marks=needs_dali),
    ],
)
def test_the_loader_that_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dali: bool, kind: type
) -> None:
    monkeypatch.setattr("arat_fast.data.load.free_bytes", lambda device: 0)
    monkeypatch.setattr("arat_fast.data.load.has_dali", lambda: dali)
    train = load(name, image_folder(tmp_path / "set"), loader="auto").train
    assert type(train) is kind and len(next(train.epoch(0)).y) == 6


def test_the_way_to_dali_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arat_fast.data.dali.has_dali", lambda: False)
    with refused("pip install .*--data.loader dataloader"):
        load("digits", loader="dali")


def test_augmented_crops_are_torchvisions(tmp_path: Path) -> None:
    """Drawn by their place in the batch of all processes, whoever makes it."""
    folder = image_folder(tmp_path / "set")
    plain = load("folder", folder)
    state = torch.get_rng_state()
    splits = load("folder", folder, loader="auto", augment=True)
    found = list(splits.train.epoch(2))
    assert torch.equal(torch.get_rng_state(), state)
    expected = []
    for number, (x, _) in enumerate(plain.train.epoch(2)):
        for place, image in enumerate(levels(x)):
            torch.manual_seed(seeded_generator(0, 2, number, place).initial_seed())
            expected.append(RandAugment()(image))
    assert torch.equal(levels(torch.cat([x for x, _ in found])), torch.stack(expected))
    assert not same(found, plain.train.epoch(2)) and same(splits.test.epoch(0), plain.test.epoch(0))
    assert same(load("folder", folder, augment=True, num_workers=2).train.epoch(2), found)
    second = list(load("folder", folder, augment=True, shard=Shard(1, 2)).train.epoch(2))
    # A last batch that is too small for two processes is left out.
    halves = zip(second, found[: len(second)], strict=True)
    assert second and all(torch.equal(a.x, b.x[-len(a.x) :]) for a, b in halves)


@pytest.mark.parametrize(("name", "loader"), [("digits", "auto"), ("folder", "dali")])
def test_what_is_not_augmented_is_refused(tmp_path: Path, name: str, loader: str) -> None:
    with refused("leave --data.augment out"):
        load(name, image_folder(tmp_path / "set"), loader=loader, augment=True)


# Image files


@needs_dali
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_dali_decodes_files_as_the_dataloader_does(tmp_path: Path, suffix: str, crop: str) -> None:
    """Identical, augmented or not: DALI decodes with the same arithmetic, PyTorch scales both."""
    root = image_folder(tmp_path / "set", suffix=suffix)
    options: dict[str, Any] = {"crop": crop, "padding": 3, "num_val": 3}
    expected = load("folder", root, **options)
    splits = load("folder", root, loader="dali", num_workers=2, **options)
    for split in ("train", "val", "test"):
        for epoch in (0, 1):
            a, b = getattr(expected, split), getattr(splits, split)
            assert same(a.epoch(epoch), b.epoch(epoch))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("suffix", "most"), [(".png", 0), (".jpg", 1)])
def test_files_without_augmentation_are_the_images(
    tmp_path: Path, loader: str, suffix: str, most: int
) -> None:
    root = image_folder(tmp_path / "set", suffix=suffix)
    batches: Any = load("folder", root, loader=loader, crop="pad", image_size=28).test
    for image, path in zip(levels(collect(batches)[0]), batches.samples.files, strict=True):
        with Image.open(path) as file:
            expected = F.center_crop(F.pil_to_tensor(file.convert("RGB")), [28, 28])
        assert int((image.int() - expected.int()).abs().max()) <= most


@pytest.mark.parametrize("loader", LOADERS)
def test_tar_shards_are_the_same_images_as_their_files(tmp_path: Path, loader: str) -> None:
    for name, first, number in (("train-0", 0, 7), ("train-1", 7, 6), ("test-0", 13, 5)):
        tar_shard(tmp_path / "shards" / f"{name}.tar", first, number)
    splits = load("webdataset", tmp_path / "shards", loader=loader, num_workers=2)
    files = [tmp_path / f"{index}.jpg" for index in range(13)]
    for index, path in enumerate(files):
        path.write_bytes(encoded(picture(index), ".jpg"))
    framing = Framing(24, "resized", random=True, padding=4, flip=True)
    plan = BatchPlan(13, 6, shuffle=True)
    source = EncodedImages(files, torch.arange(13) % 3)
    expected = LoaderBatches(source, ("0", "1", "2"), plan, framing, device=CPU)
    for epoch in (0, 3):
        assert same(expected.epoch(epoch), splits.train.epoch(epoch))
    assert splits.train.classes == ("0", "1", "2")
    assert len(collect(splits.test)[1]) == splits.test.num_samples == 5


def crops(pixels: Any, folder: Path, num_epochs: int, framing: Framing) -> list[Tensor]:
    path = folder / "image.png"
    Image.fromarray(pixels).save(path)
    source, plan = EncodedImages([path], torch.tensor([0])), BatchPlan(1, 1)
    batches = LoaderBatches(source, ("a",), plan, framing, device=CPU)
    return [levels(next(batches.epoch(epoch)).x[0]) for epoch in range(num_epochs)]


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), size=st.integers(1, 14))
def test_centre_crop_of_any_size_is_torchvisions(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, size: int
) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (height, width, 3), dtype=np.uint8)
    (crop,) = crops(pixels, tmp_path_factory.mktemp("images"), 1, Framing(size))
    expected = F.center_crop(torch.from_numpy(pixels).permute(2, 0, 1), [size, size])
    assert torch.equal(crop, expected)


def positions(length: int, size: int, padding: int) -> set[int]:
    """Where a random crop may start, counted from the image: torchvision's RandomCrop with
    pad_if_needed adds what is missing on both sides."""
    padding += max(size - length - 2 * padding, 0)
    return {start - padding for start in range(length + 2 * padding - size + 1)}


@pytest.mark.parametrize(
    ("height", "width", "size", "padding"), [(7, 5, 4, 0), (5, 6, 4, 2), (3, 6, 5, 0), (3, 3, 6, 1)]
)
def test_random_crops_cover_every_place_and_nothing_else(
    tmp_path: Path, height: int, width: int, size: int, padding: int
) -> None:
    pixels = np.random.default_rng(7).integers(1, 256, (height, width, 3), dtype=np.uint8)
    canvas = np.pad(pixels, ((20, 20), (20, 20), (0, 0))).transpose(2, 0, 1)
    possible = {
        canvas[:, 20 + top : 20 + top + size, 20 + left : 20 + left + size].tobytes()
        for top in positions(height, size, padding)
        for left in positions(width, size, padding)
    }
    seen = crops(pixels, tmp_path, 400, Framing(size, random=True, padding=padding))
    assert {x.numpy().tobytes() for x in seen} == possible


@pytest.mark.parametrize("loader", [*ARRAY_LOADERS, pytest.param("files", marks=pytest.mark.slow)])
def test_crops_and_flips_are_uniform(tmp_path: Path, loader: str) -> None:
    size, padding, number = 12, 2, 1500
    image = np.arange(1, size * size + 1, dtype=np.uint8).reshape(size, size, 1)
    samples = Images(np.repeat(image[None], number, 0), torch.zeros(number).long())
    plan = BatchPlan(number, 500, shuffle=True, seed=6)
    shift = Shift(padding, flip=True)
    if loader == "files":
        framing = Framing(size, random=True, padding=padding, flip=True)
        x = torch.stack(crops(image[:, :, 0], tmp_path, number, framing))
    elif loader == "resident":
        images = torch.from_numpy(samples.rows[np.arange(number)]).permute(0, 3, 1, 2)
        x, _ = collect(ResidentBatches(images, samples.labels, ("a",), plan, shift))
    else:
        kind: Any = KINDS[loader]
        x, _ = collect(kind(samples, ("a",), plan, shift, device=CPU))
    x = (levels(x) if loader != "files" else x).long()
    here, right = x[:, 0, 6, 6] - 1, x[:, 0, 6, 7] - 1
    mirrored = (right < here).long()
    row = here // size - 6 + padding
    column = here % size - torch.where(mirrored == 1, 5, 6) + padding
    counts = torch.bincount((row * 5 + column) * 2 + mirrored, minlength=50)
    assert len(counts) == 50
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def boxes_of(framing: Framing, number: int, height: int, width: int) -> Any:
    plan = BatchPlan(number, number, shuffle=True, seed=4)
    draws = framing.draw(plan, 0, 0)
    boxes, mirror = framing.place([height] * number, [width] * number, draws)
    top, left, h, w = boxes.T
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    return top, left, h, w, mirror


def test_random_resized_crops_have_the_published_sizes_shapes_and_places() -> None:
    height, width = 3000, 4000
    framing = Framing(8, "resized", random=True, flip=True)
    top, left, h, w, mirror = boxes_of(framing, 20_000, height, width)
    assert abs(mirror.mean() - 0.5) < 0.02
    area, ratio = h * w / (height * width), w / h
    assert area.min() > AREA[0] - 0.001 and area.max() <= AREA[1]
    assert ratio.min() > RATIO[0] - 0.01 and ratio.max() < RATIO[1] + 0.01
    # Small crops fit in any shape, so that nothing was rejected: uniform in the logarithm.
    small = area < 0.4
    u = np.log(ratio[small] / RATIO[0]) / np.log(RATIO[1] / RATIO[0])
    for uniform in (u, top[small] / (height - h[small]), left[small] / (width - w[small])):
        assert scipy.stats.chisquare(np.histogram(uniform, 20, (0, 1))[0]).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (2, 3), (7, 900)])
@pytest.mark.parametrize("random", [False, True])
def test_resized_crops_of_odd_images_lie_inside(height: int, width: int, random: bool) -> None:
    boxes_of(Framing(8, "resized", random=random), 500, height, width)


# Epochs


@pytest.fixture(params=["resident", "stream", "dali stream", "dataloader", "dali"])
def way(request: pytest.FixtureRequest, tmp_path: Path, published: Any) -> dict[str, Any]:
    """Each way to train."""
    chosen: dict[str, Any] = {
        "resident": {"name": "cifar10", "loader": "resident"},
        "stream": {"name": "cifar10", "loader": "dataloader", "num_workers": 2},
        "dali stream": {"name": "cifar10", "loader": "dali"},
        "dataloader": {"name": "folder", "loader": "dataloader", "num_workers": 2},
        "dali": {"name": "folder", "loader": "dali", "num_workers": 2},
    }[request.param]
    if chosen["loader"] == "dali" and not has_dali():
        pytest.skip("DALI is not installed")
    if chosen["name"] == "cifar10":
        published.cifar(num_train=35)
        return {**chosen, "root": tmp_path}
    return {**chosen, "root": image_folder(tmp_path / "set", per_class=12)}


def test_epochs_differ_seeds_repeat_and_any_batch_resumes(way: dict[str, Any]) -> None:
    """Also after an epoch that was left early; PyTorch's generator is neither read nor moved."""
    train = load(seed=1, **way).train
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = list(train.epoch(0))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    second = list(train.epoch(1))
    assert not same(first, second) and same(first, train.epoch(0))
    assert not same(first, load(seed=2, **way).train.epoch(0))
    again = load(seed=1, **way).train
    for start in range(len(train) + 1):
        assert same(first[start:], again.epoch(0, start))
    for taken in (1, 2, 3):
        batches: Any = train.epoch(0)
        assert same([next(batches) for _ in range(taken)], first[:taken])
        batches.close()
        assert same(train.epoch(1), second)
    assert len(torch.cat([y for _, y in first])) == train.num_samples


@pytest.mark.parametrize(
    "way",
    [
        "resident",
        "dali stream",
        pytest.param("stream", marks=pytest.mark.slow),
        pytest.param("dataloader", marks=pytest.mark.slow),
        "dali",
    ],
    indirect=True,
)
def test_three_ranks_with_an_indivisible_size(way: dict[str, Any]) -> None:
    """35 or 36 training images in batches of 8: 3 or 4 are too few for three ranks to train on."""
    alone = load(batch_size=8, **way)
    ranks = [load(batch_size=8, shard=Shard(rank, 3), **way) for rank in range(3)]
    for split in ("train", "probe"):
        whole = list(getattr(alone, split).epoch(1))
        parts = [list(getattr(splits, split).epoch(1)) for splits in ranks]
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


def test_the_garbage_collector_does_not_wait_for_workers(tmp_path: Path) -> None:
    """In a cycle of references, as a run is: PyTorch waits five seconds for each of them."""
    train = load("folder", image_folder(tmp_path / "set"), batch_size=2, num_workers=2).train
    next(train.epoch(0))
    assert len(multiprocessing.active_children()) == 2
    cycle: list[Any] = [train]
    cycle.append(cycle)
    del train, cycle
    began = time.perf_counter()
    gc.collect()
    assert not multiprocessing.active_children() and time.perf_counter() - began < 4


def test_interrupt_of_the_workers_loses_no_batch(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    expected = list(load("folder", root, batch_size=2).train.epoch(0))
    batches = load("folder", root, batch_size=2, num_workers=2).train.epoch(0)
    first = [next(batches), next(batches)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
    assert same(expected, [*first, *batches])
