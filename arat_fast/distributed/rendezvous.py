"""Where the processes of a job find each other, free of what an earlier attempt has left there."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

# Public names of torch that its stubs do not export.
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

_PAUSE = 0.01


def open_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """A store for the process group of this attempt.

    torchrun keeps one store over its restarts, and gloo would connect to processes of the attempt
    before. Rank 0 therefore makes up a name, and tells it to whoever asks with a number of their
    own, which no process before had.

    Args:
        rank: of this process.
        world_size: number of processes.
        timeout: of every operation.

    Raises:
        RuntimeError: the others did not come in that time.
    """
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        own and rank == 0,
        timeout,
        wait_for_workers=False,
    )
    name = uuid.uuid4().hex
    if rank == 0:
        _welcome(store, name, world_size, timeout.total_seconds())
    else:
        me = name
        store.set(f"hello/{rank}", me)
        name = store.get(f"welcome/{rank}/{me}").decode()
        store.set(f"here/{name}/{rank}", "")
    found: Store = PrefixStore(name, store)
    return found


def _welcome(store: TCPStore, name: str, world_size: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    missing = set(range(1, world_size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"here/{name}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"hello/{rank}"]):
                store.set(f"welcome/{rank}/{store.get(f'hello/{rank}').decode()}", name)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(missing)} of them did not come within {seconds:g} s")
        time.sleep(_PAUSE)
