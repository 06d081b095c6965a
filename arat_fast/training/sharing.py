"""How a batch is shared: by the processes of a job, and in parts that go one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from arat_fast.data.plan import Place
from arat_fast.distributed import Ranks
from arat_fast.distributed.batch_norm import running_statistics
from arat_fast.distributed.gradients import GradientSum
from arat_fast.training.values import Values


@dataclass(frozen=True)
class Part:
    """Some of this process's samples in a batch.

    Attributes:
        inputs: rows of the step's inputs.
        samples: their places among this process's samples.
        of_batch: share of the batch of all processes, in (0, 1]; None: all of it.
        of_process: share of this process's samples, in (0, 1]; None: all of them.
        is_last: whether it completes the batch.
    """

    inputs: tuple[Tensor, ...]
    samples: slice
    of_batch: float | None
    of_process: float | None
    is_last: bool

    def add(self, sums: Values | None, values: Values) -> Values:
        """Means over this process's samples, as far as they are known with this part."""
        if self.of_process is None:
            return values
        weighed = values.packed * self.of_process
        return Values(values.names, weighed if sums is None else sums.packed + weighed)


class BatchSharing:
    """Divides batches, and adds up their gradients.

    Args:
        modules: network and objective.
        accumulate: parts of a process's samples, >= 1; of two samples or more.
        ranks: the processes.
        overlap: send gradients while the backward pass still runs.
    """

    def __init__(
        self, modules: Sequence[nn.Module], accumulate: int, ranks: Ranks, overlap: bool
    ) -> None:
        self.accumulate = accumulate
        self.ranks = ranks
        self.sum: GradientSum | None = None
        if ranks.group is not None:
            for module in modules:
                # What stays in eval mode keeps its statistics.
                module.train()
            parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
            statistics = running_statistics(*modules)
            self.sum = GradientSum(parameters, statistics, ranks.group, overlap=overlap)

    def parts(self, inputs: tuple[Tensor, ...], place: Place) -> Iterator[Part]:
        """This process's samples, as many parts on every process.

        Args:
            inputs: tensors with a row for each of its samples.
            place: of them in the batch of all processes.
        """
        num_samples = len(inputs[0])
        num = num_parts(self.accumulate, place.total // self.ranks.world_size)
        if num == 1:
            share = None if self.sum is None else num_samples / place.total
            yield Part(inputs, slice(0, num_samples), share, None, True)
            return
        pieces = zip(*(tensor.tensor_split(num) for tensor in inputs), strict=True)
        done = 0
        for number, piece in enumerate(pieces):
            size = len(piece[0])
            samples = slice(done, done + size)
            last = number == num - 1
            yield Part(piece, samples, size / place.total, size / num_samples, last)
            done += size

    def backward(self, loss: Tensor, part: Part) -> None:
        """Add the gradients of a part's mean loss, weighed by its share, to ``.grad``; with the
        last part those of all processes."""
        if part.of_batch is not None:
            loss = loss * part.of_batch
        if self.sum is None or not part.is_last:
            loss.backward()  # type: ignore[no-untyped-call]  # Tensor.backward
            return
        with self.sum.backward():
            loss.backward()  # type: ignore[no-untyped-call]  # Tensor.backward

    def end_batch(self, inputs: tuple[Tensor, ...], place: Place) -> None:
        """Make the running statistics of BatchNorm those of all processes."""
        if self.sum is not None:
            self.sum.average_statistics(len(inputs[0]) / place.total)


def num_parts(accumulate: int, num_samples: int) -> int:
    """In how many parts of two samples or more a batch is taken; ``accumulate`` at most."""
    return max(1, min(accumulate, num_samples // 2))
