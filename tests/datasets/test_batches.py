"""Which samples make a batch, where they are cropped, and that batches that are held stay."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import collect, refused, same
from torch import Tensor

from arat_fast.data import (
    Batch,
    BatchPlan,
    MixedPlan,
    ResidentBatches,
    Shard,
    Shift,
    seeded_generator,
    stratified_split,
)
from arat_fast.data.crops import Buffers, CropFlip, to_unit_range
from arat_fast.evaluation.evaluate import ImageSet
from arat_kernels.crop_flip import crop_flip

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def make(num_samples: int = 20, padding: int = 0, flip: bool = False, **plan: Any) -> Any:
    return ResidentBatches(
        pixels(num_samples, 3, 8, 8),
        torch.arange(num_samples) % 10,
        tuple("0123456789"),
        BatchPlan(num_samples, 6, **plan),
        Shift(padding, flip),
    )


def shards(world_size: int) -> list[Shard]:
    return [Shard(rank, world_size) for rank in range(world_size)]


def test_unshuffled_batches_are_the_images_over_255_in_order() -> None:
    batches = make()
    x, y = collect(batches)
    assert [len(y) for _, y in batches.epoch(0)] == [6, 6, 6, 2]
    assert x.dtype == torch.float32 and torch.equal(x, batches.images.float() / 255)
    assert torch.equal(y, batches.labels)
    assert (batches.num_samples, batches.num_classes, batches.image_shape) == (20, 10, (3, 8, 8))
    assert same(batches.epoch(0), batches.epoch(7))


@pytest.mark.parametrize(
    ("num_samples", "shuffle", "sizes"),
    [
        (13, True, [6, 6]),
        (13, False, [6, 6, 1]),
        (14, True, [6, 6, 2]),
        (4, True, [4]),
        (1, False, [1]),
    ],
)
def test_last_batch(num_samples: int, shuffle: bool, sizes: list[int]) -> None:
    batches = make(num_samples, shuffle=shuffle)
    assert [len(y) for _, y in batches.epoch(0)] == sizes and len(batches) == len(sizes)


def test_keys_of_different_lengths_give_unrelated_streams() -> None:
    keys = [(3,), (3, 0), (3, 0, 0), (3, 1), (1, 3), (0, 3), (2**32 + 3,), (3, 5), (3, 5, 0)]
    draws = {torch.randint(2**60, (), generator=seeded_generator(*key)).item() for key in keys}
    assert len(draws) == len(keys)
    assert seeded_generator(3, 5).initial_seed() == seeded_generator(3, 5).initial_seed()


def one_by_one(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """The definition: zeros around the image, a crop of its size, then the mirror."""
    num_samples, channels, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, num_samples, 1), generator=generator)[..., 0]
    mirror = torch.rand(num_samples, 1, generator=generator)[:, 0] < 0.5
    result = torch.empty_like(images)
    for i in range(num_samples):
        canvas = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=torch.uint8)
        canvas[:, padding : padding + height, padding : padding + width] = images[i]
        crop = canvas[:, int(top[i]) : int(top[i]) + height, int(left[i]) : int(left[i]) + width]
        result[i] = torch.flip(crop, (2,)) if mirror[i] else crop
    return result


@pytest.mark.parametrize("start", [0, 2])
def test_every_batch_has_a_generator_of_its_own(start: int) -> None:
    """A batch depends on the seed, the epoch and its number only, whatever is drawn with it."""
    batches = make(shuffle=True, padding=2, flip=True, seed=8)
    order = torch.randperm(20, generator=seeded_generator(8, 3))
    out = list(batches.epoch(3, start))
    assert len(out) == 4 - start
    for index, (x, y) in enumerate(out, start):
        chosen = order[index * 6 : (index + 1) * 6]
        expected = one_by_one(batches.images[chosen], 2, seeded_generator(8, 3, index))
        assert torch.equal(x, expected.float() / 255) and torch.equal(y, batches.labels[chosen])


def test_batches_differ_and_keep_their_pixels_while_they_are_held() -> None:
    images = pixels(1, 3, 12, 12).repeat(70, 1, 1, 1)
    labels = torch.zeros(70, dtype=torch.int64)
    plan = BatchPlan(70, 5, shuffle=True)
    batches = ResidentBatches(images, labels, ("a",), plan, Shift(4, flip=True))
    seen = [x.clone() for epoch in range(2) for x, _ in batches.epoch(epoch)]
    held = [x for epoch in range(2) for x, _ in batches.epoch(epoch)]
    assert len(held) > 2 * Buffers.KEPT
    assert all(torch.equal(a, b) for a, b in zip(seen, held, strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", LAYOUTS)
def test_crops_on_a_cpu_are_those_of_the_definition(
    padding: int, channels: int, layout: torch.memory_format, stored: torch.memory_format
) -> None:
    made = CropFlip(padding, 200, layout)
    # One after the other through the same memory: smaller, larger, and of another shape.
    for number, size in ((5, (6, 9)), (3, (6, 9)), (8, (6, 9)), (8, (7, 5)), (1, (6, 9))):
        images = pixels(20, channels, *size).contiguous(memory_format=stored)
        generator = torch.Generator().manual_seed(number)
        index = torch.randint(20, (number,), generator=generator)
        draws = Shift(padding, flip=True).offsets(BatchPlan(number, number, seed=size[0]), 0, 0)
        x = made(images, index, draws)
        expected = crop_flip(images, index, padding=padding, offsets=draws, max_value=200)
        assert torch.equal(x, expected) and x.is_contiguous(memory_format=layout)


def test_memory_is_used_again_once_nothing_holds_it_and_no_more_is_kept() -> None:
    buffers = Buffers()
    first = buffers.empty((4, 3), torch.float32)
    place, part = first.data_ptr(), first[1].numpy()
    del first
    # A view in NumPy still shows what was there.
    other = buffers.empty((4, 3), torch.float32)
    assert other.data_ptr() != place
    del part
    for shape, dtype in (((2, 5), torch.float32), ((48,), torch.uint8)):
        again = buffers.empty(shape, dtype)
        assert again.data_ptr() == place
        del again
    buffers = Buffers()
    held = [buffers.empty((10,), torch.float32) for _ in range(3 * Buffers.KEPT)]
    assert len({x.data_ptr() for x in held}) == len(held)
    places = {x.data_ptr() for x in held[-Buffers.KEPT :]}
    held.clear()
    held = [buffers.empty((10,), torch.float32) for _ in range(Buffers.KEPT)]
    assert {x.data_ptr() for x in held} == places


def test_unit_range_is_the_division() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(2, 128).t()
    assert torch.equal(to_unit_range(values, 255, Buffers()), values / 255)


IMAGES = torch.full((4, 1, 8, 8), 17, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 2])


@pytest.mark.parametrize(
    ("images", "labels", "max_value", "message"),
    [
        (IMAGES[:, 0], LABELS, 255, "uint8"),
        (IMAGES.float(), LABELS, 255, "float32"),
        (IMAGES[:0], LABELS[:0], 255, "empty"),
        (IMAGES, LABELS[:3], 255, "labels"),
        (IMAGES, LABELS.float(), 255, "int64"),
        (IMAGES, torch.tensor([0, 1, 2, 3]), 255, "image 3: .* got 3"),
        (IMAGES, torch.tensor([0, -1, 2, 2]), 255, "image 1: .* got -1"),
        (IMAGES, LABELS, 16, "got 17"),
    ],
)
def test_bad_input_is_named(images: Tensor, labels: Tensor, max_value: int, message: str) -> None:
    with refused(message):
        ResidentBatches(images, labels, tuple("abc"), BatchPlan(4, 2), max_value=max_value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchPlan(4, 0), "batch_size"),
        (lambda: BatchPlan(0, 4), "empty"),
        (lambda: BatchPlan(1, 4, shuffle=True), "at least 2"),
        (lambda: BatchPlan(100, 5, shuffle=True, shard=Shard(0, 3)), ">= 6"),
        (lambda: BatchPlan(5, 6, shuffle=True, shard=Shard(0, 3)), "at least 6"),
        (lambda: Shard(0, 0), "world_size"),
        (lambda: Shard(3, 3), "rank"),
        (lambda: MixedPlan(20, 0, 10, 0.5), "no generated"),
        (lambda: MixedPlan(20, 9, 10, 0.01), "holds 0"),
        (lambda: MixedPlan(20, 9, 10, 0.99), "holds 10"),
        (lambda: stratified_split(torch.tensor([0, 1, 0, 1]), 3), "at most 2"),
        (lambda: stratified_split(torch.tensor([0, -1]), 0), ">= 0"),
    ],
)
def test_impossible_plans_are_named(make: Any, message: str) -> None:
    with refused(message):
        make()


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


@settings(max_examples=200, deadline=None)
@given(
    num_samples=st.integers(1, 90),
    batch_size=st.integers(1, 40),
    ranks=st.integers(1, 7),
    shuffle=st.booleans(),
)
def test_shares_are_equal_in_number_near_in_size_and_the_whole_once(
    num_samples: int, batch_size: int, ranks: int, shuffle: bool
) -> None:
    """And batches are those of one process, but for the last."""
    least = 2 * ranks if shuffle else 1
    if min(num_samples, batch_size) < least:
        with pytest.raises(ValueError, match=str(least)):
            BatchPlan(num_samples, batch_size, shuffle=shuffle, shard=Shard(0, ranks))
        return
    plans = [
        BatchPlan(num_samples, batch_size, shuffle=shuffle, seed=3, shard=shard)
        for shard in shards(ranks)
    ]
    assert len({len(plan) for plan in plans}) == 1
    alone = BatchPlan(num_samples, batch_size, shuffle=shuffle, seed=3)
    order = alone.order(4)
    assert all(torch.equal(order, plan.order(4)) for plan in plans)
    assert len(alone) - len(plans[0]) in (0, 1)
    seen: list[int] = []
    for number in range(len(plans[0])):
        size = alone.size(number)
        assert plans[0].size(number) == size
        parts = [order[plan.places(number)].tolist() for plan in plans]
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 2 or not shuffle
        batch = [sample for part in parts for sample in part]
        assert batch == order[len(seen) : len(seen) + size].tolist()
        assert plans[0].samples_before(number) == len(seen)
        seen += batch
    assert len(set(seen)) == len(seen) == plans[0].samples_before(len(plans[0]))
    left_out = num_samples - len(seen)
    assert 0 <= left_out < least if shuffle else left_out == 0
    assert left_out == 0 or num_samples % batch_size < least


def test_mixed_batches_hold_their_share_of_generated_images() -> None:
    plan = MixedPlan(21, 28, 10, 0.7, seed=3)
    ranks = [MixedPlan(21, 28, 10, 0.7, seed=3, shard=shard) for shard in shards(3)]
    originals: list[int] = []
    generated: list[int] = []
    for epoch in range(9):
        assert len(plan) == 2
        for number in range(2):
            batch = plan.samples(epoch, number).tolist()
            parts = [rank.samples(epoch, number).tolist() for rank in ranks]
            assert sum(parts, []) == batch
            originals += [sample for sample in batch if sample < 21]
            generated += [sample - 21 for sample in batch if sample >= 21]
            assert len(originals) == 3 * (2 * epoch + number + 1)
            assert len(generated) == 7 * (2 * epoch + number + 1)
    # Each once, before any comes again.
    assert sorted(originals[:21]) == sorted(originals[21:42]) == list(range(21))
    assert sorted(generated[:28]) == sorted(generated[28:56]) == list(range(28))
    assert originals[:21] != originals[21:42]
    again = MixedPlan(21, 28, 10, 0.7, seed=3)
    assert torch.equal(again.samples(7, 1), plan.samples(7, 1))
    assert not torch.equal(MixedPlan(21, 28, 10, 0.7, seed=4).order(0), plan.order(0))


@pytest.mark.parametrize("max_samples", [0, 2, 17])
def test_a_rank_reads_its_part_of_what_is_evaluated_and_no_batch_beside_it(
    max_samples: int,
) -> None:
    """Shares that begin anywhere, more ranks than images or than fit into a batch."""
    batches = make(22)
    whole = ImageSet.from_batches(batches, max_samples)
    assert len(whole.y) == (max_samples or 22)
    parts, read = [], []
    assemble = batches.assemble

    def noting(index: Tensor, draws: Tensor) -> Batch:
        read.extend(index.tolist())
        return assemble(index, draws)  # type: ignore[no-any-return]

    batches.assemble = noting
    for shard in shards(9):
        read.clear()
        parts.append(ImageSet.from_batches(batches, max_samples, shard))
        own = shard.share(max_samples or 22)
        if own.start < own.stop:
            assert read == list(range(own.start // 6 * 6, min(-(-own.stop // 6) * 6, 22)))
    assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
    assert torch.equal(torch.cat([part.y for part in parts]), whole.y)
    sizes = [len(part.y) for part in parts]
    assert max(sizes) - min(sizes) <= 1
