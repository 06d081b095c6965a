"""The processes of a job that torchrun started, and what they tell each other."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from arat_fast.data.plan import Shard
from arat_fast.device import count_gpus, resolve_device
from arat_fast.distributed.watch import LeftBehindError, Watch, open_store
from arat_fast.stop import end_with_parent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(eq=False)
class Ranks:
    """The processes of a job, seen from one of them.

    Every method but the properties is called by all processes, in the same order.

    Args:
        rank: of this process, in [0, world_size).
        world_size: number of processes.
        local_rank: of this process among those of its machine.
        group: the processes; None for a process of its own, to which nothing is ever sent.
        watch: tells which processes are alive.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: ProcessGroup | None = None
    watch: Watch | None = None

    @property
    def alone(self) -> bool:
        """Whether this process was started without torchrun."""
        return self.group is None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files of the run and speaks to the user."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """This process's share of the data."""
        return Shard(self.rank, self.world_size)

    def device(self, name: str) -> torch.device:
        """The device of this process; ``auto`` and ``cuda`` are the GPU of its local rank.

        Raises:
            ValueError: no such device, a GPU asked for by number, or fewer GPUs than processes.
        """
        return resolve_device(name) if self.alone else _local_device(name, self.local_rank)

    def sum_(self, value: Tensor) -> Tensor:
        """Add up every process's ``value``, in place; returns it."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """Every process's ``value``, of one shape: (world_size, ...)."""
        if self.group is None:
            return value.unsqueeze(0)
        parts = [torch.empty_like(value) for _ in range(self.world_size)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.stack(parts)

    def gather_rows(self, value: Tensor) -> Tensor:
        """The rows of every process's ``value``, in the order of the ranks: (N, ...).

        Args:
            value: (n, ...), with an n of its own on every process, 0 included.
        """
        if self.group is None:
            return value
        counts = self.gather(torch.tensor([len(value)])).flatten().tolist()
        padded = value.new_zeros((max(counts), *value.shape[1:]))
        padded[: len(value)] = value
        # Bits travel alike whatever they mean; gloo knows few dtypes.
        raw = padded.view(torch.uint8) if value.dtype == torch.bool else padded
        parts = self.gather(raw).view(value.dtype)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def broadcast_bytes(self, content: bytes | None) -> bytes:
        """Rank 0's ``content``, on every process."""
        box = [content]
        if self.group is not None:
            dist.broadcast_object_list(box, 0, group=self.group)
        assert box[0] is not None
        return box[0]

    def broadcast_(self, value: Tensor) -> None:
        """Rank 0's ``value`` in place of every process's."""
        if self.group is not None:
            dist.broadcast(value, 0, group=self.group)

    def meet(self) -> None:
        """Wait for all processes, however long the others still work.

        A collective gives up after the timeout of the job, which the shares of an evaluation can
        exceed.

        Raises:
            LeftBehindError: another process has failed or was lost meanwhile.
        """
        if self.watch is not None:
            self.watch.meet()

    def ask(self, number: int) -> None:
        """Tell the other processes a number > 0; may be called by one of them alone."""
        if self.watch is not None:
            self.watch.store.set("asked", str(number))

    @property
    def asked(self) -> int:
        """The largest number that any process has told, or 0; a second late at most."""
        return 0 if self.watch is None else self.watch.asked

    def largest(self, value: int) -> int:
        """The largest ``value`` of any process."""
        return int(self.gather(torch.tensor([value])).max())

    def at_step(self, step: int) -> None:
        """Note how far this process is, for the message if it is lost."""
        if self.watch is not None:
            self.watch.step = step


ALONE = Ranks()
"""A process that was started without torchrun."""


class Vote:
    """Lets all processes agree on a number once a step, without waiting for it in that step.

    The result of a step is known in the next one: no process waits for another's device, and all
    act on it in the same step.

    Args:
        ranks: the processes.

    Attributes:
        result: the largest number that any process cast, as far as it is known; 0 at first.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.result = 0
        self._pending: tuple[Any, Tensor] | None = None

    def cast(self, value: int) -> int:
        """Vote, and return :attr:`result`; a process of its own knows it at once.

        Args:
            value: >= 0.
        """
        if self.ranks.group is None:
            self.result = value
            return value
        self.settle()
        ballot = torch.tensor([value])
        work = dist.all_reduce(ballot, dist.ReduceOp.MAX, self.ranks.group, async_op=True)
        self._pending = work, ballot
        return self.result

    def settle(self) -> None:
        """Wait for the votes that are still on their way."""
        if self._pending is None:
            return
        work, ballot = self._pending
        self._pending = None
        work.wait()
        self.result = max(self.result, int(ballot))


@contextmanager
def join(device: str = "auto", timeout: float = 600.0) -> Iterator[Ranks]:
    """The processes that torchrun started; :data:`ALONE` in a process of its own.

    If one process ends with an error, or dies, the others end too, and one of them says why. Where
    torchrun itself is killed, its processes get SIGTERM (Linux).

    Args:
        device: auto, cpu, cuda or cuda:N, as configured.
        timeout: seconds after which a process that waits for another gives up; > 0.

    Raises:
        LeftBehindError: another process failed or was lost.
        OSError: the processes did not find each other.
        ValueError: as :meth:`Ranks.device`.
    """
    if any(name not in os.environ for name in _VARIABLES):
        yield ALONE
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _local_device(device, local_rank)
    backend = "gloo"
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        backend = "cpu:gloo,cuda:nccl"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    limit = datetime.timedelta(seconds=timeout)
    try:
        store = open_store(rank, world_size, limit)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=limit
        )
        watch = Watch(store, rank, world_size, local_rank)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"the {world_size} processes did not find each other at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {reason}"
        ) from error
    assert dist.group.WORLD is not None
    try:
        yield Ranks(rank, world_size, local_rank, dist.group.WORLD, watch)
        watch.stop()
    except LeftBehindError:
        raise
    except Exception as error:
        if hasattr(error, "exit_code"):
            # A stop that all processes agreed on. torchrun and its store may have gone.
            with suppress(RuntimeError):
                watch.stop()
            raise
        if _is_collective_failure(error):
            raise LeftBehindError(watch.explain(error)) from error
        if not watch.claim():
            raise LeftBehindError("") from error
        # What torchrun tells of the rank that failed first.
        get_error_handler().record_exception(error)
        raise
    finally:
        watch.stopped.set()
    dist.destroy_process_group()


def _local_device(name: str, local_rank: int) -> torch.device:
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(
            f"each process takes the GPU of its local rank, got --train.device {name}; set "
            "CUDA_VISIBLE_DEVICES to choose among them"
        )
    found = count_gpus()
    if local_rank >= found:
        raise ValueError(
            f"one GPU for each process of a machine is expected, got {found} for local rank "
            f"{local_rank}; lower --nproc-per-node to {found}"
        )
    return torch.device("cuda", local_rank)


def _is_collective_failure(error: Exception) -> bool:
    """Whether talking to another process failed, rather than something of this one."""
    # gloo's errors have no type of their own.
    marks = ("gloo", "Connection closed by peer", "NCCL", "Connection reset")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
    )
