"""Which processes of a job are alive, and who says why a job ends."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # a public name of torch

BEAT_SECONDS = 0.5
"""Between two signs of life of a process."""
LOST_SECONDS = 3.0
"""Silence after which a process is held to be lost, once talking to it has failed."""
SILENT_SECONDS = 60.0
"""Silence after which it is held to be lost while everything waits for it."""
LOST_EXIT_CODE = 1


class Watch:
    """A thread that gives signs of life and listens for those of the other processes.

    They go through a store of rank 0, beside the collectives: a collective with a dead process may
    never come back.

    Args:
        rank: of this process.
        world_size: number of processes.
        local_rank: of this process among those of its machine.

    Attributes:
        step: how far this process is.
        asked: the largest number that any process has asked with, or 0; a second late at most.
    """

    def __init__(self, rank: int, world_size: int, local_rank: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.step = 0
        self.asked = 0
        self._spoken: int | None = None
        self._store = _open_store(rank, world_size)
        self._names = [f"beat/{r}" for r in range(world_size)]
        self._me = f"{socket.gethostname()}, pid {os.getpid()}"
        self._beats = [""] * world_size
        now = time.monotonic()
        self._heard = [now] * world_size
        self._store_lost = False
        self._num_meetings = 0
        self._beat(0)
        # Every name must be there before one is read: reading waits.
        self._barrier("watch")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        # A connection of its own: a store answers one request at a time.
        self._line = self._store.clone()  # type: ignore[attr-defined]  # not in torch's stub
        self._thread.start()

    def stop(self) -> int | None:
        """Stop watching, when all processes have come here, however long the others still work.

        Signs of life go on until then. Rank 0 leaves last, because the store is its own; one that
        is lost between its goodbye and its end is waited for :data:`SILENT_SECONDS`.

        Returns:
            None: all are done; else the exit code of a process that has failed meanwhile.

        Raises:
            RuntimeError: rank 0 was lost.
        """
        self._store.add("stop", 1)
        if self.rank == 0:
            self._wait_until(
                lambda: self._spoken is not None or self._store.add("stop", 0) >= self.world_size
            )
        else:
            self._wait_until(lambda: self._spoken is not None or self._store.check(["bye"]))
        if self.rank == 0 and self._spoken is None:
            self._store.set("bye", "")
        self._stopped.set()
        self._thread.join()
        if self._spoken is not None:
            self._let_others_hear()
            return self._spoken
        deadline = time.monotonic() + SILENT_SECONDS
        with contextlib.suppress(RuntimeError):
            if self.rank == 0:
                others = self.world_size - 1
                self._wait_until(lambda: self._store.add("gone", 0) >= others, deadline)
            else:
                self._store.add("gone", 1)
        return None

    def meet(self) -> int | None:
        """Wait until every process has called this.

        Returns:
            None: all have; else the exit code of a process that has failed meanwhile.
        """
        self._num_meetings += 1
        self._barrier(f"meet/{self._num_meetings}")
        return self._spoken

    def ask(self, number: int) -> None:
        """Tell all processes a number > 0, for instance of a signal."""
        self._store.set("asked", str(number))

    def claim(self, exit_code: int) -> int | None:
        """Ask to be the one that says why the job ends.

        Args:
            exit_code: of this process.

        Returns:
            None: speak; else the exit code of the process that has spoken.
        """
        spoken = self._spoken
        try:
            if spoken is None and self._store.add("claimed", 1) == 1:
                self._store.set("exit code", str(exit_code))
            elif spoken is None:
                spoken = int(self._store.get("exit code"))
            self._let_others_hear()
            return spoken
        except RuntimeError:
            # Rank 0 has gone, and the store with it: the first rank after it speaks, and as its
            # whole machine may be lost, the first process of every other machine.
            return None if self.rank == 1 or self.local_rank == 0 else LOST_EXIT_CODE

    def _let_others_hear(self) -> None:
        if self.rank == 0:
            # The store goes with this process.
            time.sleep(3 * BEAT_SECONDS)

    def explain_loss(self, error: Exception) -> tuple[str, int]:
        """Why talking to another process failed: a message, empty if another process has given one,
        and an exit code."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"gave up/{self.rank}", "")
        lost = self._wait_for_a_loss()
        # A process that failed for a reason of its own says it before it goes.
        if not lost:
            time.sleep(BEAT_SECONDS)
        # Before a claim, after which rank 0 may go, and the store with it.
        busy = self._still_busy()
        spoken = self.claim(LOST_EXIT_CODE)
        if spoken is not None:
            return "", spoken
        if lost:
            return self._lost_message(lost), LOST_EXIT_CODE
        reason = str(error).splitlines()[0]
        if not busy:
            return f"the processes failed to talk at step {self.step}: {reason}", LOST_EXIT_CODE
        return (
            f"{self._named(busy)} did not get beyond step {min(map(self._step_of, busy))} while "
            f"the others waited: {reason}",
            LOST_EXIT_CODE,
        )

    def _still_busy(self) -> list[int]:
        """The ranks that have not given up waiting for others."""
        with contextlib.suppress(RuntimeError):
            ranks = range(self.world_size)
            return [rank for rank in ranks if not self._store.check([f"gave up/{rank}"])]
        return []

    def _wait_for_a_loss(self) -> list[int]:
        deadline = time.monotonic() + LOST_SECONDS + 2 * BEAT_SECONDS
        while time.monotonic() < deadline:
            lost = self._silent(LOST_SECONDS)
            if lost or self._claimed():
                return lost
            time.sleep(0.1)
        return []

    def _claimed(self) -> bool:
        if self._spoken is not None or self._store_lost:
            return self._spoken is not None
        try:
            return bool(self._store.check(["claimed"]))
        except RuntimeError:
            return False

    def _silent(self, seconds: float) -> list[int]:
        """The ranks without a sign of life for that long."""
        if self._store_lost and self.rank != 0:
            return [0]
        now = time.monotonic()
        others = (r for r in range(self.world_size) if r != self.rank)
        return [r for r in others if now - self._heard[r] > seconds]

    def _lost_message(self, lost: list[int]) -> str:
        verb = "was" if len(lost) == 1 else "were"
        return (
            f"{self._named(lost)} {verb} lost at step {self.step}, and the others of the "
            f"{self.world_size} processes end with it; go on from the last checkpoint with "
            "--resume"
        )

    def _named(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} ({self._where(rank)})" for rank in ranks)

    def _where(self, rank: int) -> str:
        return self._beats[rank].split(";")[2] if self._beats[rank] else "never heard"

    def _step_of(self, rank: int) -> int:
        return int(self._beats[rank].split(";")[1]) if self._beats[rank] else 0

    def _watch(self) -> None:
        count = 0
        while not self._stopped.wait(BEAT_SECONDS):
            count += 1
            try:
                self._beat(count)
                self._listen()
            except RuntimeError:
                self._store_lost = True
            lost = self._silent(SILENT_SECONDS)
            if lost and not self._stopped.is_set():
                # The main thread waits in a collective that nothing ends.
                if self.claim(LOST_EXIT_CODE) is None:
                    print(f"arat-fast: error: {self._lost_message(lost)}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(LOST_EXIT_CODE)
            if self._store_lost or self._spoken is not None:
                # The main thread ends with an error of its own, or is done; if it does not, it
                # waits in a collective that nothing ends.
                if self._stopped.wait(10 * LOST_SECONDS):
                    return
                os._exit(LOST_EXIT_CODE if self._spoken is None else self._spoken)

    def _beat(self, count: int) -> None:
        line = self._store if count == 0 else self._line
        line.set(self._names[self.rank], f"{count};{self.step};{self._me}")

    def _listen(self) -> None:
        now = time.monotonic()
        for rank, raw in enumerate(self._line.multi_get(self._names)):
            beat = raw.decode()
            if beat != self._beats[rank]:
                self._beats[rank], self._heard[rank] = beat, now
        if self._line.check(["asked"]):
            self.asked = max(self.asked, int(self._line.get("asked")))
        if self._line.check(["exit code"]):
            self._spoken = int(self._line.get("exit code"))

    def _barrier(self, name: str) -> None:
        self._store.add(name, 1)
        self._wait_until(
            lambda: self._spoken is not None or self._store.add(name, 0) >= self.world_size
        )

    @staticmethod
    def _wait_until(ready: Callable[[], bool], deadline: float = math.inf) -> None:
        pause = 0.005
        while not ready() and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 0.5)


def _open_store(rank: int, world_size: int) -> TCPStore:
    host = os.environ["MASTER_ADDR"]
    port = torch.zeros(1, dtype=torch.int64)
    timeout = timedelta(seconds=60)
    store = None
    if rank == 0:
        store = TCPStore(host, 0, world_size, True, timeout, wait_for_workers=False)
        port[0] = store.port
    dist.broadcast(port, 0)
    return store or TCPStore(host, int(port), world_size, False, timeout)
