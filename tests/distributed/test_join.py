"""How processes find each other, and how they part."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import endings, jobs
from tiny import tiny_config, tiny_trainer

from arat_fast.config import DataConfig
from arat_fast.data import DataSplits, load
from arat_fast.datasets import Dataset
from arat_fast.distributed import join, ranks
from arat_fast.evaluation import checkpoint
from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.training import loop


class JoinedError(Exception):
    """Thrown in place of a process group."""


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Rank 5 of 8 on a machine that seems to have two GPUs; what is called, in order."""
    for name, value in {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    calls: list[object] = []

    def group(backend: str, **_: object) -> None:
        calls.append(backend)
        raise JoinedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(ranks, "open_store", lambda *_: None)
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
    with pytest.raises(ValueError, match="lower --nproc-per-node to 2"), join("auto"):
        pass
    assert two_gpus == []


def end(
    ending: str, num_ranks: int, folder: Path, per_machine: int = 8
) -> tuple[list[int | None], list[str]]:
    processes = jobs.start(endings.as_rank, (ending,), num_ranks, folder, per_machine)
    codes = jobs.wait(processes)
    lines = jobs.printed(folder).splitlines()
    return codes, [line for line in lines if line.startswith("arat-fast: ")]


@pytest.mark.parametrize(("ending", "code"), [("late", 0), ("late_stop", 75)])
def test_rank_0_may_take_its_time(tmp_path: Path, ending: str, code: int) -> None:
    codes, messages = end(ending, 2, tmp_path)
    assert codes == [code, code], messages
    assert not any("error" in line for line in messages)


def test_an_error_while_the_others_wait_for_the_end(tmp_path: Path) -> None:
    codes, messages = end("late_error", 3, tmp_path)
    assert codes == [2, 2, 2], messages
    assert messages == ["arat-fast: error: a disk that cannot be written"]


def test_an_error_while_the_others_wait_in_a_meeting(tmp_path: Path) -> None:
    codes, messages = end("error_before_meeting", 3, tmp_path)
    assert codes == [2, 2, 2], messages
    over = "arat-fast: the meeting is over"
    assert sorted(messages) == ["arat-fast: error: a disk that cannot be read", over, over]


def test_the_machine_of_rank_0_is_lost(tmp_path: Path) -> None:
    """The first process of another machine says it."""
    codes, messages = end("machine_lost", 3, tmp_path, per_machine=2)
    assert codes == [-9, -9, 1], messages
    (message,) = messages
    assert message.startswith("arat-fast: error: rank 0 (") and "--resume" in message


def test_a_rank_is_lost_while_the_others_wait_for_it(tmp_path: Path) -> None:
    codes, messages = end("lost_in_meeting", 3, tmp_path)
    assert codes == [1, -9, 1], messages
    (message,) = messages
    assert message.startswith("arat-fast: error: rank 1 (") and "was lost" in message


@pytest.mark.parametrize(("per_machine", "expected"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (4, [0])])
def test_files_are_fetched_once_for_each_disk(
    monkeypatch: pytest.MonkeyPatch, per_machine: int, expected: list[int]
) -> None:
    together = threading.Barrier(4)

    class Meeting(ranks.Ranks):
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


def test_training_and_evaluation_fetch_before_they_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for module in (loop, checkpoint):
        name = module.__name__

        def fetch(*_: object, name: str = name) -> None:
            calls.append(f"fetch {name}")

        def loading(*arguments: Any, name: str = name, **options: Any) -> DataSplits:
            calls.append(f"load {name}")
            return load.load_data(*arguments, **options)

        monkeypatch.setattr(module, "download_data", fetch)
        monkeypatch.setattr(module, "load_data", loading)
    tiny_trainer(tmp_path, tiny_config(epochs=1)).run()
    evaluate_checkpoint(tmp_path, attacks=(), max_samples=4, device="cpu")
    modules = (loop.__name__, checkpoint.__name__)
    assert calls == [f"{what} {name}" for name in modules for what in ("fetch", "load")]
