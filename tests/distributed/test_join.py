"""How processes find each other, and how they part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import endings, jobs

from arat_fast.distributed import join, ranks


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


def test_the_machine_of_rank_0_is_lost(tmp_path: Path) -> None:
    """The first process of another machine says it."""
    codes, messages = end("machine_lost", 3, tmp_path, per_machine=2)
    assert codes == [-9, -9, 1], messages
    (message,) = messages
    assert message.startswith("arat-fast: error: rank 0 (") and "--resume" in message
