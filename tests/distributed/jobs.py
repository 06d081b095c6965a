"""Starts the processes of a job on this machine, as torchrun does, but forked from one that has
imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # a public name of torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["distributed.drills", "distributed.endings", "distributed.worker"])
_STORES: list[TCPStore] = []
"""Those that jobs share, as torchrun has them."""


def start(
    body: Callable[..., None],
    arguments: Sequence[Any],
    num_ranks: int,
    folder: Path,
    per_machine: int = 8,
    own_store: bool = False,
) -> list[BaseProcess]:
    """Processes that call ``body(*arguments, environment, log)``, rank r with ``folder/r.log``.

    With ``num_ranks`` 0 it is one process without torchrun's variables. ``per_machine`` of them
    believe that they share a machine. With ``own_store`` rank 0 has the store, as without torchrun.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    if not own_store:
        _STORES.append(store)
    # Gone, so that rank 0 can listen there.
    del store
    processes: list[BaseProcess] = []
    for rank in range(max(num_ranks, 1)):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % per_machine),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": str(not own_store),
        }
        log = str(folder / f"{rank}.log")
        given = environment if num_ranks else {}
        process = _CONTEXT.Process(target=body, args=(*arguments, given, log), daemon=True)
        process.start()
        processes.append(process)
    return processes


def wait(processes: Sequence[BaseProcess], seconds: float = 150) -> list[int | None]:
    """Exit codes, negative for a signal; processes that are there after that long are killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def printed(folder: Path) -> str:
    """What all ranks printed."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
