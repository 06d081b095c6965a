from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arat_fast.config import DataConfig
from arat_fast.data import (
    Batch,
    Batches,
    BatchPlan,
    DataSplits,
    ResidentBatches,
    Shard,
    load_data,
)
from arat_fast.evaluation.evaluate import ImageSet

CPU = torch.device("cpu")


def shards(world_size: int) -> list[Shard]:
    return [Shard(rank, world_size) for rank in range(world_size)]


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
    order = plans[0].order(4)
    assert all(torch.equal(order, plan.order(4)) for plan in plans)
    seen: list[int] = []
    for number in range(len(plans[0])):
        parts = [order[plan.places(number)].tolist() for plan in plans]
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 2 or not shuffle
        batch = [sample for part in parts for sample in part]
        assert batch == order[plans[0].batch(number)].tolist()
        assert plans[0].samples_before(number) == len(seen)
        seen += batch
    assert len(set(seen)) == len(seen) == plans[0].samples_before(len(plans[0]))
    left_out = num_samples - len(seen)
    assert 0 <= left_out < least if shuffle else left_out == 0
    if shuffle and num_samples % batch_size >= least:
        assert left_out == 0


@settings(max_examples=100, deadline=None)
@given(num_samples=st.integers(2, 90), batch_size=st.integers(2, 40), ranks=st.integers(1, 6))
def test_batches_are_those_of_one_process_but_for_the_last(
    num_samples: int, batch_size: int, ranks: int
) -> None:
    if min(num_samples, batch_size) < 2 * ranks:
        return
    alone = BatchPlan(num_samples, batch_size, shuffle=True, seed=1)
    shared = BatchPlan(num_samples, batch_size, shuffle=True, seed=1, shard=Shard(0, ranks))
    assert torch.equal(alone.order(2), shared.order(2))
    assert len(alone) - len(shared) in (0, 1)
    for number in range(len(shared)):
        assert shared.batch(number) == alone.batch(number)


@pytest.mark.parametrize(
    ("shard", "message"),
    [((0, 0), "world_size must be >= 1, got 0"), ((3, 3), r"rank must be in \[0, 2\], got 3")],
)
def test_impossible_shards_are_named(shard: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shard(*shard)


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "message"),
    [
        (100, 5, r"batch_size must be >= 6 \(3 processes share it\), got 5"),
        (5, 6, r"at least 6 images to train on are expected \(3 processes .*, got 5"),
    ],
)
def test_too_little_for_every_rank_is_named(
    num_samples: int, batch_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(num_samples, batch_size, shuffle=True, shard=Shard(0, 3))


def load(name: str, root: Path, world_size: int, **options: Any) -> list[DataSplits]:
    config = DataConfig(
        name=name,  # type: ignore[arg-type]
        root=root,
        **{"batch_size": 7, "padding": 2, "num_workers": 0, "image_size": 16, **options},
    )
    return [
        load_data(config, device=CPU, seed=5, eval_batch_size=8, shard=shard)
        for shard in shards(world_size)
    ]


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
@pytest.mark.parametrize("max_samples", [0, 2, 17])
def test_ranks_read_their_part_of_what_is_evaluated(
    published: Any, tmp_path: Path, name: str, max_samples: int
) -> None:
    """Batches of 8, shares that begin anywhere, more ranks than images or than fit into a batch."""
    if name == "cifar10":
        published.cifar(num_train=60, num_test=22)
    else:
        published.imagenette(per_class=6)
    options = {"num_val": 19, "batch_size": 18}
    (alone,) = load(name, tmp_path, 1, **options)
    for split in ("val", "test"):
        batches: Batches = getattr(alone, split)
        whole = ImageSet.from_batches(batches, max_samples)
        assert len(whole.y) == min(max_samples or batches.num_samples, batches.num_samples)
        ranks = [getattr(splits, split) for splits in load(name, tmp_path, 9, **options)]
        parts = [
            ImageSet.from_batches(of_rank, max_samples, shard)
            for of_rank, shard in zip(ranks, shards(9), strict=True)
        ]
        assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
        assert torch.equal(torch.cat([part.y for part in parts]), whole.y)
        sizes = [len(part.y) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_a_rank_reads_no_batch_but_its_own() -> None:
    images = torch.zeros(40, 1, 4, 4, dtype=torch.uint8)
    batches = ResidentBatches(images, torch.arange(40) % 2, ("a", "b"), batch_size=4)
    read: list[int] = []
    assemble = batches.assemble

    def noting(index: Tensor, draws: Tensor) -> Batch:
        read.extend(index.tolist())
        return assemble(index, draws)

    batches.assemble = noting  # type: ignore[method-assign]
    part = ImageSet.from_batches(batches, 30, Shard(1, 3))
    assert read == list(range(8, 20)) and len(part.y) == 10
