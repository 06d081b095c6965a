"""Metrics of the steps: kept on the device, read in blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arat_fast.data.plan import Shard
from arat_fast.distributed import ALONE, Ranks
from arat_fast.training.values import Values


class NotFiniteError(ValueError):
    """A loss, a weight or an answer is NaN or infinite."""


class CatastrophicOverfittingError(ValueError):
    """The network has learned to withstand nothing but the attack that it is trained with."""


class StepMetrics:
    """Collects the metrics of every step without synchronising the device.

    :meth:`read` moves what has come since the last call in one copy, checks that every number is
    finite, and adds it to the sums of the epoch.

    Args:
        ranks: the processes whose samples are counted; all read at the same steps.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.pending: list[Tensor] = []
        self.pending_samples: list[int] = []
        self.names: tuple[str, ...] = ()
        self.first_pending = 0
        self.epoch_samples = 0
        self.epoch_sums: dict[str, float] = {}

    def add(self, step: int, values: Values, num_samples: int) -> None:
        """Keep the metrics of ``step``, a batch of ``num_samples`` over all processes.

        The metrics are means over the samples of this process.
        """
        if not self.pending:
            self.first_pending = step
            self.names = values.names
        self.pending.append(values.packed)
        self.pending_samples.append(num_samples)

    def read(self) -> dict[str, float]:
        """Means since the last call, weighted by samples; empty if there was no step.

        Raises:
            NotFiniteError: names the step and the term that went first, and the process; raised by
                all of them.
        """
        if not self.pending:
            return {}
        rows = torch.stack(self.pending).double()
        samples = torch.tensor(self.pending_samples, dtype=torch.float64)
        of_rank = self.ranks.gather(rows).cpu()
        self.pending, self.pending_samples = [], []
        rows = of_rank[0]
        if len(of_rank) > 1:
            parts = [
                [Shard(rank, len(of_rank)).num(int(total)) for total in samples]
                for rank in range(len(of_rank))
            ]
            shares = torch.tensor(parts, dtype=torch.float64) / samples
            rows = (of_rank * shares[:, :, None]).sum(dim=0)
        finite = rows.isfinite()
        if not finite.all():
            row = int((~finite).any(dim=1).nonzero()[0])
            bad = [n for n, ok in zip(self.names, finite[row].tolist(), strict=True) if not ok]
            terms = [name for name in bad if name != "loss"] or bad
            values = dict(zip(self.names, rows[row].tolist(), strict=True))
            where = ""
            if len(of_rank) > 1:
                sick = ~of_rank[:, row].isfinite().all(dim=1)
                named = ", ".join(str(rank) for rank in sick.nonzero().flatten().tolist())
                where = f" on rank {named}"
            raise NotFiniteError(
                f"the loss stopped being finite at step {self.first_pending + row}{where}: "
                f"{', '.join(f'{name} is {values[name]}' for name in terms)}"
            )
        sums = (rows * samples[:, None]).sum(dim=0).tolist()
        total = float(samples.sum())
        for name, value in zip(self.names, sums, strict=True):
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value
        self.epoch_samples += int(total)
        return {n: value / total for n, value in zip(self.names, sums, strict=True)}

    def epoch_mean(self, name: str) -> float | None:
        """Mean of a metric over the samples of the epoch that were read; None without any."""
        if name not in self.epoch_sums or not self.epoch_samples:
            return None
        return self.epoch_sums[name] / self.epoch_samples

    def start_epoch(self) -> None:
        """Forget the sums of the epoch before."""
        self.epoch_samples = 0
        self.epoch_sums = {}

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch; everything pending must have been read."""
        assert not self.pending
        return {"epoch_samples": self.epoch_samples, "epoch_sums": dict(self.epoch_sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending, self.pending_samples = [], []
        self.epoch_samples = state["epoch_samples"]
        self.epoch_sums = dict(state["epoch_sums"])
