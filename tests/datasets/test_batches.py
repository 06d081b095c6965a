from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arat_fast.data import (
    ResidentBatches,
    seeded_generator,
    stratified_split,
)

CLASSES = tuple("0123456789")


def make(
    num_samples: int = 20, batch_size: int = 6, size: int = 8, **options: object
) -> ResidentBatches:
    generator = torch.Generator().manual_seed(5)
    shape = (num_samples, 3, size, size)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.arange(num_samples) % 10
    return ResidentBatches(images, labels, CLASSES, batch_size=batch_size, **options)  # type: ignore[arg-type]


def collect(
    batches: ResidentBatches, epoch: int = 0, start: int = 0
) -> list[tuple[Tensor, Tensor]]:
    return [(x, y) for x, y in batches.epoch(epoch, start)]


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_unshuffled_batches_are_the_images_over_255_in_order() -> None:
    batches = make(num_samples=20, batch_size=6)
    out = collect(batches)
    assert [len(y) for _, y in out] == [6, 6, 6, 2]
    x, y = torch.cat([x for x, _ in out]), torch.cat([y for _, y in out])
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x, batches.images.float() / 255)
    assert torch.equal(y, batches.labels)
    assert (batches.num_samples, batches.num_classes, batches.image_shape) == (20, 10, (3, 8, 8))
    assert same(out, collect(batches, epoch=7))


def test_a_shuffled_epoch_visits_every_sample_once() -> None:
    batches = make(num_samples=20, shuffle=True)
    x = torch.cat([x for x, _ in collect(batches, epoch=2)]).flatten(1)
    expected = (batches.images.float() / 255).flatten(1)
    assert sorted(x.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize(
    ("num_samples", "shuffle", "sizes"),
    [
        (13, True, [6, 6]),
        (13, False, [6, 6, 1]),
        (14, True, [6, 6, 2]),
        (12, True, [6, 6]),
        (4, True, [4]),
        (1, False, [1]),
    ],
)
def test_last_batch(num_samples: int, shuffle: bool, sizes: list[int]) -> None:
    batches = make(num_samples=num_samples, shuffle=shuffle)
    assert [len(y) for _, y in collect(batches)] == sizes
    assert len(batches) == len(sizes)


def test_keys_of_different_lengths_give_unrelated_streams() -> None:
    keys = [(3,), (3, 0), (3, 0, 0), (3, 1), (1, 3), (0, 3), (2**32 + 3,), (3, 5), (3, 5, 0)]
    draws = {torch.randint(2**60, (), generator=seeded_generator(*key)).item() for key in keys}
    assert len(draws) == len(keys)
    assert seeded_generator(3, 5).initial_seed() == seeded_generator(3, 5).initial_seed()


def one_by_one(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """The definition: zeros around the image, a crop of its size, then the mirror."""
    num_samples, channels, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, num_samples, 1), generator=generator)[..., 0]
    mirror = torch.rand(num_samples, 1, generator=generator)[:, 0] < 0.5
    result = torch.empty_like(images)
    for i in range(num_samples):
        canvas = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=torch.uint8)
        canvas[:, padding : padding + height, padding : padding + width] = images[i]
        crop = canvas[:, int(top[i]) : int(top[i]) + height, int(left[i]) : int(left[i]) + width]
        result[i] = torch.flip(crop, (2,)) if flip and mirror[i] else crop
    return result


@pytest.mark.parametrize("start", [0, 2])
def test_every_batch_has_a_generator_of_its_own(start: int) -> None:
    """A batch depends on the seed, the epoch and its number only, whatever is drawn with it."""
    batches = make(num_samples=20, batch_size=6, shuffle=True, padding=2, flip=True, seed=8)
    order = torch.randperm(20, generator=seeded_generator(8, 3))
    out = collect(batches, epoch=3, start=start)
    assert len(out) == 4 - start
    for index, (x, y) in enumerate(out, start):
        chosen = order[index * 6 : (index + 1) * 6]
        expected = one_by_one(batches.images[chosen], 2, True, seeded_generator(8, 3, index))
        assert torch.equal(x, expected.float() / 255)
        assert torch.equal(y, batches.labels[chosen])


def test_augmentation_of_different_batches_and_epochs_is_independent() -> None:
    image = torch.arange(1, 145, dtype=torch.uint8).view(1, 1, 12, 12)
    batches = ResidentBatches(
        image.repeat(64, 1, 1, 1),
        torch.zeros(64, dtype=torch.int64),
        ("a",),
        batch_size=16,
        shuffle=True,
        padding=4,
        flip=True,
    )
    seen = [x for epoch in range(3) for x, _ in batches.epoch(epoch)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 8, 8, dtype=torch.uint8)}, r"\(num_samples, C, H, W\) uint8"),
        ({"images": torch.zeros(4, 1, 8, 8)}, "uint8, got .* torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "got .3,. labels"),
        ({"labels": torch.zeros(4)}, "int64, got .*torch.float32"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, r"\[0, 2\], got values from 0 to 3"),
        ({"labels": torch.tensor([0, -1, 2, 2])}, r"\[0, 2\], got values from -1 to 2"),
        ({"max_value": 16}, "<= 16, got 17"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        (
            {
                "images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
                "labels": torch.zeros(0, dtype=torch.int64),
            },
            "empty",
        ),
        (
            {
                "images": torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
                "labels": torch.zeros(1, dtype=torch.int64),
                "shuffle": True,
            },
            "at least 2 images .* got 1",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "images": torch.full((4, 1, 8, 8), 17, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 2, 2]),
        "batch_size": 2,
    }
    arguments |= change
    images, labels = arguments.pop("images"), arguments.pop("labels")
    with pytest.raises(ValueError, match=message) as error:
        ResidentBatches(images, labels, ("a", "b", "c"), **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=80), data=st.data())
def test_stratified_split_keeps_the_class_shares(labels: list[int], data: st.DataObject) -> None:
    num_val = data.draw(st.integers(0, len(labels) - max(len(set(labels)), 2)))
    y = torch.tensor(labels)
    train, val = stratified_split(y, num_val)
    assert len(val) == num_val
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(labels)))
    assert set(y[train].tolist()) == set(labels)
    exact = {label: labels.count(label) * num_val / len(labels) for label in set(labels)}
    if all(share <= labels.count(label) - 1 for label, share in exact.items()):
        for label, share in exact.items():
            assert abs(int((y[val] == label).sum()) - share) < 1


@pytest.mark.parametrize(
    ("labels", "num_val", "message"),
    [
        ([0, 1, 0, 1], 3, "at most 2 to leave two of the 4 training images, .* got 3"),
        ([0, -1], 0, ">= 0, got -1"),
    ],
)
def test_impossible_split_is_named(labels: list[int], num_val: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stratified_split(torch.tensor(labels), num_val)
