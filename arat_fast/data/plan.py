"""Which samples make which batch, on which rank: the same for every loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class Place(NamedTuple):
    """Where the samples of one process are in a batch of all processes.

    Attributes:
        first: place of the first of them.
        total: samples in the whole batch.
    """

    first: int
    total: int


class BatchPlan:
    """The batches of an epoch, and this rank's share of each.

    All ranks walk through one order of the samples, which depends on the seed and the epoch, in
    batches of ``batch_size``; each rank takes its share of every batch (:meth:`Shard.share`), so
    that the batches joined over the ranks do not depend on their number. The last batch of an epoch
    can be smaller. In training (``shuffle``) it is left out where it is too small to be shared:
    BatchNorm needs two samples on every rank.

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
        if num_samples == 0:
            raise ValueError("the dataset is empty, expected at least one image")
        ranks = shard.world_size
        least = 2 * ranks if shuffle else 1
        sharing = f" ({ranks} processes share it)" if ranks > 1 else ""
        if batch_size < least:
            raise ValueError(f"batch_size must be >= {least}{sharing}, got {batch_size}")
        if num_samples < least:
            raise ValueError(
                f"at least {least} images to train on are expected{sharing}, got {num_samples}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.shard = shard
        rest = num_samples % batch_size
        self._end = num_samples - rest if rest < least else num_samples
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return -(-self._end // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The samples of an epoch in order: (num_samples,), int64, on the CPU."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        return torch.randperm(self.num_samples, generator=seeded_generator(self.seed, epoch))

    def samples(self, epoch: int, number: int) -> Tensor:
        """This rank's share of a batch: (N,), int64, on the CPU."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.order(epoch))
        return self._order[1][self.places(number)]

    @property
    def largest_share(self) -> int:
        """The most samples that this rank can have in a batch."""
        return self.shard.num(self.size(0))

    def size(self, number: int) -> int:
        """Samples of batch ``number``, over all ranks."""
        return self.samples_before(number + 1) - self.samples_before(number)

    def share(self, number: int) -> slice:
        """This rank's part of batch ``number``, counted from the start of the batch."""
        return self.shard.share(self.size(number))

    def place(self, number: int) -> Place:
        """Where this rank's part of batch ``number`` is in it."""
        return Place(self.share(number).start, self.size(number))

    def places(self, number: int) -> slice:
        """The places of this rank's part of batch ``number`` in the order of its epoch."""
        start, share = self.samples_before(number), self.share(number)
        return slice(start + share.start, start + share.stop)

    def samples_before(self, number: int) -> int:
        """Samples of an epoch, over all ranks, that come before batch ``number``; with
        ``number = len(plan)`` those of a whole epoch."""
        return min(number * self.batch_size, self._end)


class MixedPlan(BatchPlan):
    """Training batches of original and of generated images, ``fraction`` of each generated.

    Samples count from 0: first the original ones, then the generated ones. An epoch has as many
    batches as one of the original images alone, so that a schedule means the same with and without
    generated images. Both kinds are drawn without repeats until all have been seen, which takes
    several epochs, and are shuffled within the batch, so that every rank gets both.

    Args:
        num_original: original samples.
        num_generated: generated samples, >= 1.
        batch_size: samples in a batch, over all ranks.
        fraction: share of the generated samples in a batch, in (0, 1).
        seed: of the order, >= 0.
        shard: this process.

    Raises:
        ValueError: as for :class:`BatchPlan`; nothing is generated; a batch would hold samples of
            one kind only.

    Source: Gowal et al., NeurIPS 2021 (arXiv 2110.09468), section 5.
    """

    def __init__(
        self,
        num_original: int,
        num_generated: int,
        batch_size: int,
        fraction: float,
        *,
        seed: int = 0,
        shard: Shard = WHOLE,
    ) -> None:
        super().__init__(num_original, batch_size, shuffle=True, seed=seed, shard=shard)
        if num_generated < 1:
            raise ValueError("no generated image, expected at least one")
        self.num_generated = num_generated
        self.fraction = fraction
        generated = self._generated(0)
        if not 0 < generated < self.size(0):
            raise ValueError(
                f"a batch of {self.size(0)} with unsup_fraction {fraction} holds {generated} "
                "generated images, expected some of either kind"
            )
        self._passes: dict[int, tuple[int, Tensor]] = {}

    def order(self, epoch: int) -> Tensor:
        """The samples of the batches of an epoch in order, int64, on the CPU."""
        numbers = range(len(self))
        generated = [self._generated(number) for number in numbers]
        original = [self.size(number) - generated[number] for number in numbers]
        new = self._stream(1, self.num_generated, epoch * sum(generated), sum(generated))
        old = self._stream(0, self.num_samples, epoch * sum(original), sum(original))
        batches = []
        parts = zip(torch.split(old, original), torch.split(new, generated), strict=True)
        for number, (a, b) in enumerate(parts):
            batch = torch.cat([a, b + self.num_samples])
            generator = seeded_generator(self.seed, epoch, number, 1)
            batches.append(batch[torch.randperm(len(batch), generator=generator)])
        return torch.cat(batches)

    def _generated(self, number: int) -> int:
        return round(self.fraction * self.size(number))

    def _stream(self, kind: int, num_samples: int, start: int, length: int) -> Tensor:
        """``length`` samples from place ``start`` of an endless row of permutations."""
        parts = []
        while length:
            number, first = divmod(start, num_samples)
            if self._passes.get(kind, (-1,))[0] != number:
                generator = seeded_generator(self.seed, number, kind, 0, 0)
                permutation = torch.randperm(num_samples, generator=generator)
                self._passes[kind] = (number, permutation)
            part = self._passes[kind][1][first : first + length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return torch.cat(parts)
