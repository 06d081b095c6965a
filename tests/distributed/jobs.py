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

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # a public name of torch

from arat_kernels.implementation import interpreting

_CONTEXT = multiprocessing.get_context("forkserver")
# Also what they import late: it would be most of a process's time. In the interpreter there are
# kernels alone.
_CONTEXT.set_forkserver_preload(
    ["kernels.split_batch_norm_group"]
    if interpreting()
    else ["distributed.drills", "distributed.endings", "distributed.cases"]
    + ["sklearn.datasets", "torch._dynamo", "torch.utils.tensorboard", "tyro"]
)
_STORES: list[TCPStore] = []
"""Those that jobs share, as torchrun has them."""


def _as_rank(
    body: Callable[..., None], arguments: Sequence[Any], environment: dict[str, str], log: Path
) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    body(*arguments)


def start(
    body: Callable[..., None],
    arguments: Sequence[Any],
    num_ranks: int,
    folder: Path,
    per_machine: int = 8,
    own_store: bool = False,
) -> list[BaseProcess]:
    """Processes that call ``body(*arguments)``; rank r writes what it prints into ``folder/r.log``.

    With ``num_ranks`` 0 it is one process without torchrun's variables. ``per_machine`` of them
    believe that they share a machine. With ``own_store`` rank 0 has the store, as without torchrun.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": str(not own_store),
    }
    if not own_store:
        _STORES.append(store)
    # Gone, so that rank 0 can listen there.
    del store
    processes: list[BaseProcess] = []
    for rank in range(max(num_ranks, 1)):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank % per_machine)}
        given = (body, arguments, own if num_ranks else {}, folder / f"{rank}.log")
        processes.append(_CONTEXT.Process(target=_as_rank, args=given, daemon=True))
        processes[-1].start()
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
