"""Which samples make which batch, on which rank: the same for every loader."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on one or more non-negative integers only.

    Keys of different lengths give unrelated streams: (seed, epoch) and (seed, epoch, 0) too.
    """
    # Entropy alone would be padded with zeros, which makes those two the same; a spawn key is not.
    sequence = np.random.SeedSequence(key[0], spawn_key=key[1:])
    seed = sequence.generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


@dataclass(frozen=True)
class Shard:
    """One of the processes that share every batch.

    Args:
        rank: of this process, in [0, world_size).
        world_size: number of processes, >= 1.

    Raises:
        ValueError: a value out of range.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"world_size must be >= 1, got {self.world_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size - 1}], got {self.rank}")

    def share(self, num_samples: int) -> slice:
        """This rank's part of ``num_samples`` in a row.

        The parts follow each other in the order of the ranks, and their sizes differ by one at
        most, the larger ones first.
        """
        size, rest = divmod(num_samples, self.world_size)
        start = self.rank * size + min(self.rank, rest)
        return slice(start, start + size + (self.rank < rest))

    def num(self, num_samples: int) -> int:
        """Samples in this rank's part of ``num_samples``."""
        part = self.share(num_samples)
        return int(part.stop) - int(part.start)


WHOLE = Shard()
"""A process of its own."""


class BatchPlan:
    """The batches of an epoch, and this rank's share of each.

    All ranks walk through one order of the samples, which depends on the seed and the epoch, in
    batches of ``batch_size``; each rank takes its share of every batch (:meth:`Shard.share`), so
    that the batches joined over the ranks do not depend on their number. The last batch of an epoch
    can be smaller. Where it is too small to be shared, it is

    - left out in training (``shuffle``): BatchNorm needs two samples on every rank;
    - otherwise joined to the batch before, so that every sample is seen once and no rank is left
      with nothing.

    Every rank has as many batches as the others. Where a last batch is left out for one number of
    ranks and not for another, the lengths of their epochs differ: a run that is to go on with
    another number of ranks keeps the epoch and the number of the batch, not the number of steps.

    Args:
        num_samples: in the split.
        batch_size: samples in a batch, over all ranks.
        shuffle: training: a new order in each epoch.
        seed: of the order, >= 0.
        shard: this process.

    Raises:
        ValueError: no sample, or fewer samples in the split or in a batch than every rank needs.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        shard: Shard = WHOLE,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if num_samples == 0:
            raise ValueError("the dataset is empty, expected at least one image")
        ranks = shard.world_size
        least = (2 if shuffle else 1) * ranks
        sharing = f" ({ranks} processes share it)" if ranks > 1 else ""
        if batch_size < least:
            raise ValueError(f"batch_size must be >= {least}{sharing}, got {batch_size}")
        if num_samples < least:
            use = "train on" if shuffle else "evaluate"
            raise ValueError(
                f"at least {least} images to {use} are expected{sharing}, got {num_samples}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.shard = shard
        full, rest = divmod(num_samples, batch_size)
        too_small = 0 < rest < least
        self._num_batches = full + (rest > 0 and not too_small)
        self._end = full * batch_size if too_small and shuffle else num_samples

    def __len__(self) -> int:
        return self._num_batches

    def order(self, epoch: int) -> Tensor:
        """The samples of an epoch in order: (num_samples,), int64, on the CPU."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        return torch.randperm(self.num_samples, generator=seeded_generator(self.seed, epoch))

    def batch(self, number: int) -> slice:
        """The places of batch ``number`` in the order of its epoch, over all ranks."""
        start = number * self.batch_size
        last = number == len(self) - 1
        return slice(start, self._end if last else start + self.batch_size)

    def share(self, number: int) -> slice:
        """This rank's part of batch ``number``, counted from the start of the batch."""
        batch = self.batch(number)
        return self.shard.share(batch.stop - batch.start)

    def places(self, number: int) -> slice:
        """The places of this rank's part of batch ``number`` in the order of its epoch."""
        start, share = self.batch(number).start, self.share(number)
        return slice(start + share.start, start + share.stop)

    def samples_before(self, number: int) -> int:
        """Samples of an epoch, over all ranks, that come before batch ``number``; with
        ``number = len(plan)`` those of a whole epoch."""
        return self._end if number == len(self) else number * self.batch_size
