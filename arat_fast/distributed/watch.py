"""Which processes of a job are alive, and which of them says why it ends."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta

# Public names of torch that its stubs do not export.
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

BEAT_SECONDS = 0.5
"""Between two signs of life of a process."""
LOST_SECONDS = 3.0
"""Silence after which a process is held to be lost, once talking to it has failed."""
SILENT_SECONDS = 60.0
"""Silence after which it is held to be lost where nothing has failed."""
LEAVE_SECONDS = 30.0
"""Time to leave for a process whose job has ended."""


class LeftBehindError(Exception):
    """This process ends because another one did; without a message if another one has told why."""

    exit_code = 1


def open_store(rank: int, world_size: int, timeout: timedelta) -> PrefixStore:
    """torchrun's store, or rank 0's, under a name that only this attempt has.

    torchrun keeps its store over restarts, and gloo would connect to processes of the attempt
    before; the count of restarts, which torch gives, differs between machines. Rank 0 makes up a
    name, and tells it to whoever asks with a number that no earlier process had.

    Raises:
        RuntimeError: the others did not come in that time.
    """
    store: Store = next(rendezvous("env://", timeout=timeout))[0]
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", name)
        name = store.get(f"welcome/{name}").decode()
        store.set(f"{name}/{rank}", "")
        return PrefixStore(name, store)
    deadline = time.monotonic() + timeout.total_seconds()
    for other in range(1, world_size):
        while not store.check([f"{name}/{other}"]):
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", name)
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {other} did not come within {timeout.seconds} s")
            time.sleep(0.01)
    return PrefixStore(name, store)


class Watch:
    """A thread that gives signs of life through the store and listens for those of the others.

    Args:
        store: of all processes.
        rank: of this process.
        world_size: number of processes.
        local_rank: of this process among those of its machine.

    Attributes:
        step: how far this process is.
        asked: the largest number that any process has asked with, or 0; a second late at most.
        stopped: to be set when this process leaves.
    """

    def __init__(self, store: PrefixStore, rank: int, world_size: int, local_rank: int) -> None:
        # A connection of its own: a store answers one request at a time.
        self.store: Store = store.clone()  # type: ignore[attr-defined]  # not in torch's stub
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.step = 0
        self.asked = 0
        self._ended = self._store_lost = False
        self._num_meetings = 0
        self._names = [f"beat/{r}" for r in range(world_size)]
        self._me = f"{socket.gethostname()}, pid {os.getpid()}"
        self._heard = [("", time.monotonic())] * world_size
        self._beat(0)
        # Every name must be there before one is read: reading waits.
        self.meet()
        self.stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Wait until every process has called this, however long the others still work.

        Raises:
            LeftBehindError: a process has failed or was lost meanwhile.
            RuntimeError: the store was lost.
        """
        self._num_meetings += 1
        meeting = f"meeting/{self._num_meetings}"
        self.store.add(meeting, 1)
        pause = 0.005
        while self.store.add(meeting, 0) < self.world_size:
            lost = self._silent(SILENT_SECONDS)
            if self._ended or lost:
                raise LeftBehindError(self._told(lost) if self.claim() else "")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def stop(self) -> None:
        """Stop watching, when all processes have come here; raises as :meth:`meet`."""
        self.meet()
        self.stopped.set()
        self._thread.join()
        deadline = time.monotonic() + LOST_SECONDS
        with suppress(RuntimeError):
            count = self.store.add("gone", 1)
            # The store may be of rank 0, which leaves last.
            while self.rank == 0 and count < self.world_size and time.monotonic() < deadline:
                time.sleep(0.01)
                count = self.store.add("gone", 0)

    def claim(self) -> bool:
        """Whether this process is the one to say why the job ends."""
        try:
            return self.store.add("ended", 1) == 1
        except RuntimeError:
            # With rank 0 and the store its machine may be lost: one of every other machine speaks.
            return self.rank == 1 or self.local_rank == 0
        finally:
            if self.rank == 0:
                # The others hear of it, though the store may go with this process.
                time.sleep(3 * BEAT_SECONDS)

    def explain(self, error: Exception) -> str:
        """Why talking to another process failed; nothing if another one says it."""
        deadline = time.monotonic() + LOST_SECONDS + 2 * BEAT_SECONDS
        # A process that failed for a reason of its own has claimed before its connections broke.
        while not (lost := self._silent(LOST_SECONDS)) and not self._ended:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if not self.claim():
            return ""
        reason = str(error).splitlines()[0]
        if not lost:
            return f"the processes failed to talk at step {self.step}: {reason}"
        return self._told(lost)

    def _told(self, lost: list[int]) -> str:
        ranks = ", ".join(f"rank {r} ({self._heard[r][0].partition(' ')[2]})" for r in lost)
        return (
            f"{ranks} was lost at step {self.step}, and the others of the {self.world_size} "
            "processes end with it; go on from the last checkpoint with --resume"
        )

    def _silent(self, seconds: float) -> list[int]:
        """The ranks without a sign of life for that long."""
        if self._store_lost:
            return [0] if self.rank else []
        now = time.monotonic()
        others = (r for r in range(self.world_size) if r != self.rank)
        return [r for r in others if now - self._heard[r][1] > seconds]

    def _watch(self) -> None:
        count, lost = 0, list[int]()
        try:
            while not (self._ended or lost):
                if self.stopped.wait(BEAT_SECONDS):
                    return
                count += 1
                self._beat(count)
                self._listen()
                lost = self._silent(SILENT_SECONDS)
        except RuntimeError:
            # The launcher's end, or rank 0's.
            self._store_lost = True
            lost = self._silent(SILENT_SECONDS)
        # The main thread leaves the next meeting or collective, but may not come to one for long,
        # or wait in it for a process that hangs.
        if not self.stopped.wait(LEAVE_SECONDS):
            if lost and self.claim():
                print(f"arat-fast: error: {self._told(lost)}", file=sys.stderr, flush=True)
            os._exit(LeftBehindError.exit_code)

    def _beat(self, count: int) -> None:
        self.store.set(self._names[self.rank], f"{count} {self._me}")

    def _listen(self) -> None:
        now = time.monotonic()
        for rank, beat in enumerate(self.store.multi_get(self._names)):
            if beat.decode() != self._heard[rank][0]:
                self._heard[rank] = beat.decode(), now
        if self.store.check(["asked"]):
            self.asked = max(self.asked, int(self.store.get("asked")))
        self._ended = self._ended or self.store.check(["ended"])
