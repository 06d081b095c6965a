"""How processes find each other, and how they part."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import endings, jobs
from distributed.endings import LATE

from arat_fast.config import DataConfig
from arat_fast.data import load
from arat_fast.datasets import Dataset
from arat_fast.distributed import Ranks, join


class JoinedError(Exception):
    """Thrown in place of a process group."""


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One process on a machine that seems to have two GPUs; what is called, in order."""
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    calls: list[object] = []

    def group(backend: str, **_: object) -> None:
        calls.append(backend)
        raise JoinedError

    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", group)
    return calls


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_the_gpu_of_the_local_rank(two_gpus: list[object], name: str) -> None:
    with pytest.raises(JoinedError), join(name):
        pass
    assert two_gpus == [torch.device("cuda", 1), "cpu:gloo,cuda:nccl"]


def test_a_gpu_by_number_or_too_few(
    two_gpus: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"), join("cuda:0"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="--nproc-per-node"), join("auto"):
        pass
    assert two_gpus == []


LOST = r"rank {} \(.* lost"


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("actions", "codes", "words", "options"),
    [
        # Rank 0 writes for long, before a collective or after a stop that all have agreed on.
        ((f"{LATE} meet sum", *2 * ["meet sum"]), [0, 0, 0], None, {}),
        slow((f"{LATE} agreed", *2 * ["agreed"]), [75, 75, 75], None, {"own_store": True}),
        # An error, while the others are done, or wait in a collective, or work by themselves.
        (("1 fail", "", ""), [2, 1, 1], "disk", {}),
        slow(("1 fail", "", ""), [2, 1, 1], "disk", {"own_store": True}),
        slow(("sum", "fail", "sum"), [1, 2, 1], "disk", {}),
        slow(("60", "fail", "60"), [1, 2, 1], "disk", {}),
        # A death.
        (("meet", "SIGKILL", "meet"), [1, -9, 1], LOST.format(1), {}),
        slow(("0.5 SIGKILL", "sum", "sum"), [-9, 1, 1], LOST.format(0), {}),
        slow(("0.5 SIGKILL", "sum", "sum"), [-9, 1, 1], LOST.format(0), {"own_store": True}),
        # Of a machine that has the store: the first process of another one says it.
        slow(
            ("meet 1 SIGKILL", "meet SIGKILL", "meet meet"),
            [-9, -9, 1],
            LOST.format(0),
            {"own_store": True, "per_machine": 2},
        ),
        # Alive and late for a collective; standing still.
        slow(("sum", "60", "sum"), [1, None, 1], "step 0", {}),
        slow(("meet", "SIGSTOP", "meet"), [1, None, 1], LOST.format(1), {}),
    ],
)
def test_one_says_why_and_all_end(
    tmp_path: Path,
    actions: tuple[str, ...],
    codes: list[int | None],
    words: str | None,
    options: dict[str, Any],
) -> None:
    processes = jobs.start(endings.as_rank, (actions,), 3, tmp_path, **options)
    ended = [process for process, code in zip(processes, codes, strict=True) if code is not None]
    assert jobs.wait(ended, 40) == [code for code in codes if code is not None]
    jobs.wait(processes, 0)
    messages = [m for m in jobs.printed(tmp_path).splitlines() if m.startswith("error: ")]
    assert len(messages) == (words is not None), messages
    assert words is None or re.search(words, messages[0])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of the death of a parent")
def test_ranks_hear_of_the_death_of_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import signal, sys, time\n"
        "from arat_fast.distributed import join\n"
        "with join('cpu') as ranks:\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('told', flush=True)))\n"
        "    ranks.meet()\n"
        "    print('joined', flush=True)\n"
        "    time.sleep(60)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "joined\n"
    launcher.send_signal(signal.SIGKILL)
    # Once for each thread of the launcher that dies: the handler may run in the middle of itself.
    assert launcher.stdout.readline().startswith("told")
    launcher.wait()


@pytest.mark.parametrize(("per_machine", "expected"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (4, [0])])
def test_files_are_fetched_once_for_each_disk(
    monkeypatch: pytest.MonkeyPatch, per_machine: int, expected: list[int]
) -> None:
    together = threading.Barrier(4)

    class Meeting(Ranks):
        alone = False

        def meet(self) -> None:
            together.wait(30)

        def gather(self, value: torch.Tensor) -> torch.Tensor:
            return torch.tensor([number % per_machine for number in range(4)])

    order: list[int] = []
    lock = threading.Lock()
    rank = threading.local()

    def read(dataset: Dataset, root: Path, download: bool) -> None:
        # Late enough to be overtaken by whoever does not wait; the later, the faster.
        assert lock.acquire(blocking=False), "two fetch at once"
        time.sleep(0.1 - 0.02 * rank.number)
        order.append(rank.number)
        lock.release()

    def one(number: int) -> list[int]:
        rank.number = number
        load.download_data(
            DataConfig("cifar10", download=True), Meeting(number, 4, number % per_machine)
        )
        return list(order)

    monkeypatch.setattr(Dataset, "load", read)
    with ThreadPoolExecutor(4) as pool:
        # All leave when all that is fetched is there.
        assert list(pool.map(one, range(4))) == [expected] * 4
