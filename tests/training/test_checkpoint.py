"""Checkpoints: whole or not there, what is kept of them, and what is passed over."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from torch import Tensor

import arat_fast.training.checkpoint as checkpoint_module
from arat_fast.evaluation.pieces import read_arrays
from arat_fast.files import write_atomic, write_json
from arat_fast.training.checkpoint import (
    FORMAT,
    CheckpointFolder,
    load_checkpoint,
    save_checkpoint,
)


def state(step: int) -> dict[str, Any]:
    return {
        "progress": {"step": step},
        "weights": torch.full((1000,), float(step)),
        "list": [1, 2.5, "x"],
    }


def save(folder: CheckpointFolder, *steps: int) -> None:
    for step in steps:
        folder.save(step, state(step), lambda: None)
        folder.wait()


def step_in(path: Path) -> int:
    loaded = load_checkpoint(path)
    assert (loaded["weights"] == loaded["progress"]["step"]).all()
    return int(loaded["progress"]["step"])


def found_step(folder: CheckpointFolder) -> int:
    found = folder.find()
    assert found is not None
    return int(found.state["progress"]["step"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ends(*endings: str) -> list[str]:
    return [f"checkpoint{end}.pt" for end in endings]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def refuse(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_cut_file(tmp_path: Path, share: float) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, state(1))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(path)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/exploded",)

    torch.save({"format": FORMAT, "bomb": Bomb()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "exploded").exists()


def test_other_files(tmp_path: Path) -> None:
    for content, match in (
        ({"weights": torch.ones(3)}, "not a training checkpoint"),
        ({"format": 99}, f"format 99, expected {FORMAT}"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=match):
            load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.pt")


def test_a_write_that_fails_midway_keeps_the_previous_file(tmp_path: Path) -> None:
    """A real failing write: a process that may not make files over 100 kB."""
    save_checkpoint(tmp_path / "c.pt", {"weights": torch.ones(10)})
    larger = {"weights": torch.ones(30_000)}

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path / "c.pt", larger)

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert load_checkpoint(tmp_path / "c.pt")["weights"].shape == (10,)
    assert names(tmp_path) == ["c.pt"]


def test_what_is_interrupted_or_refused_leaves_nothing(tmp_path: Path) -> None:
    def write(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "f", write)
    with pytest.raises(ValueError):
        write_json(tmp_path / "f.json", {"value": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path, keep)
    # The same step again takes no place.
    save(folder, 3, 6, 9, 12, 15)
    folder.save(15, state(15), lambda: None, best=True)
    folder.wait()
    before = {f"checkpoint-{number:08}.pt": 3 * number for number in (4, 3, 2)[: keep - 1]}
    assert names(tmp_path) == sorted([*ends("", "-best"), *before])
    assert step_in(tmp_path / "checkpoint.pt") == step_in(tmp_path / "checkpoint-best.pt") == 15
    assert all(step_in(tmp_path / name) == step for name, step in before.items())


def test_a_clock_that_is_set_back_costs_no_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 3)
    for step in (3, 6, 9, 12):
        save(folder, step)
        os.utime(folder.newest, (1e9 - 3600 * step,) * 2)
    assert [step_in(path) for path in sorted(tmp_path.iterdir())] == [6, 9, 12]
    cut(folder.newest)
    assert found_step(CheckpointFolder(tmp_path, 3)) == 9


def test_damage_anywhere_is_found(tmp_path: Path) -> None:
    save(CheckpointFolder(tmp_path, 3), 3, 6, 9)
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = [archive.read(info) for info in archive.infolist() if info.file_size > 50]
    assert len(members) >= 2
    for member in members:
        for place in (0, len(member) // 2, len(member) - 1):
            damaged = bytearray(content)
            damaged[content.index(member) + place] ^= 1
            path.write_bytes(damaged)
            found = CheckpointFolder(tmp_path, 3).find()
            assert found is not None and found.state["progress"]["step"] == 6
            assert found.path.name == "checkpoint-00000002.pt"
            (problem,) = found.problems
            assert "not a whole checkpoint" in problem


@pytest.mark.parametrize(
    "every", [29, pytest.param(1 if "EXHAUSTIVE" in os.environ else 7, marks=pytest.mark.slow)]
)
def test_bits_of_the_directory(tmp_path: Path, every: int) -> None:
    """Damage to the archive's directory is refused, or changes nothing that is read."""
    save(CheckpointFolder(tmp_path, 1), 9)
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    refused = 0
    for bit in range(8 * start, 8 * len(content), every):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert step_in(path) == 9
        except ValueError as error:
            assert "not a whole checkpoint" in str(error)
            refused += 1
    assert refused > 4 * (len(content) - start) / every


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that gives EIO")
def test_a_file_that_cannot_be_read_is_not_given_up(tmp_path: Path) -> None:
    """It may be readable tomorrow."""
    save(CheckpointFolder(tmp_path, 2), 3, 6)
    newest, aside = tmp_path / "checkpoint.pt", tmp_path / "aside"
    newest.rename(aside)
    newest.symlink_to("/proc/self/mem")
    folder = CheckpointFolder(tmp_path, 2)
    with pytest.raises(OSError, match="Input/output error"):
        folder.find()
    aside.replace(newest)
    found = folder.find()
    assert found is not None and found.state["progress"]["step"] == 6 and not found.problems


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_one_that_finds_no_memory_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(CheckpointFolder(tmp_path, 2), 3, 6)

    def fail(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        CheckpointFolder(tmp_path, 2).find()


def test_steps_that_are_numbered_anew_cost_no_checkpoint(tmp_path: Path) -> None:
    """With more processes an epoch has fewer steps; what is whole stays, in its order."""
    save(CheckpointFolder(tmp_path, 3), 20, 40, 60)
    cut(tmp_path / "checkpoint.pt")
    folder = CheckpointFolder(tmp_path, 3)
    assert found_step(folder) == 40
    save(folder, 30)
    assert names(tmp_path) == ends("-00000001", "-00000002", "")
    save(folder, 35)
    assert [step_in(path) for path in sorted(tmp_path.iterdir())] == [40, 30, 35]
    cut(tmp_path / "checkpoint.pt")
    assert found_step(CheckpointFolder(tmp_path, 3)) == 30


@pytest.mark.parametrize("links", [True, False])
def test_damaged_files_do_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Neither the newest nor one before it."""
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    save(CheckpointFolder(tmp_path, 3), 3, 6, 9)
    for name in ends("", "-00000002"):
        cut(tmp_path / name)
    folder = CheckpointFolder(tmp_path, 3)
    assert found_step(folder) == 3
    save(folder, 4)
    assert names(tmp_path) == ends("-00000001", "")
    save(folder, 7)
    assert [step_in(path) for path in sorted(tmp_path.iterdir())] == [3, 4, 7]


def test_kept_before_the_newest_was_replaced(tmp_path: Path) -> None:
    """A process killed in between leaves one file with two names, and half of the next."""
    save(CheckpointFolder(tmp_path, 2), 3)
    os.link(tmp_path / "checkpoint.pt", tmp_path / "checkpoint-00000001.pt")
    (tmp_path / ".checkpoint.pt.new").write_bytes(b"half" * 10_000)
    folder = CheckpointFolder(tmp_path, 2)
    assert found_step(folder) == 3
    save(folder, 6)
    assert names(tmp_path) == ends("-00000001", "")
    assert step_in(tmp_path / "checkpoint-00000001.pt") == 3


def test_the_best_one_outlives_a_kill_between_its_two_names(tmp_path: Path) -> None:
    """The next checkpoint is not written into its file."""
    folder = CheckpointFolder(tmp_path, 1)
    folder.save(3, state(3), lambda: None, best=True)
    folder.wait()
    best = tmp_path / "checkpoint-best.pt"
    os.link(best, tmp_path / ".checkpoint.pt.new")
    save(CheckpointFolder(tmp_path, 1), 6)
    assert [step_in(path) for path in (best, tmp_path / "checkpoint.pt")] == [3, 6]
    assert names(tmp_path) == ends("-best", "")


def test_all_damaged(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    assert folder.find() is None and not folder.exists()
    save(folder, 3, 6)
    for path in tmp_path.iterdir():
        cut(path)
    assert folder.exists()
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        folder.find()


def test_saving_does_not_wait_and_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on, and changes the weights, while the disk is slow."""
    disk = threading.Event()
    whole = checkpoint_module.write_atomic

    def slow(path: Path, write: Callable[[BinaryIO], None]) -> None:
        disk.wait(10)
        whole(path, write)

    monkeypatch.setattr(checkpoint_module, "write_atomic", slow)
    folder = CheckpointFolder(tmp_path, 1)
    weights: dict[str, Tensor] = {"weights": torch.ones(1000)}
    folder.save(1, {"model": weights, "list": [weights["weights"]]}, lambda: None)
    weights["weights"].fill_(5)
    assert not folder.exists()
    disk.set()
    folder.wait()
    loaded = load_checkpoint(folder.newest)
    assert (loaded["model"]["weights"] == 1).all() and (loaded["list"][0] == 1).all()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), MemoryError("of host"), RuntimeError("CUDA")]
)
def test_a_failed_write_is_told_later_and_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    save(folder, 1)

    def fail(descriptor: int) -> None:
        raise error

    for tell in (folder.wait, lambda: save(folder, 3)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            folder.save(2, state(2), lambda: None)
            with pytest.raises(OSError, match=str(error.args[-1])):
                tell()
        folder.check()
        assert step_in(folder.newest) == 1
    save(folder, 3)
    assert names(tmp_path) == ends("-00000001", "")


def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path) -> None:
    """As its directory says; 6 MB can be 6 GB of zeros."""
    arrays, checkpoint = tmp_path / "arrays.npz", tmp_path / "checkpoint.pt"
    np.savez(arrays, a=np.zeros(3))
    save_checkpoint(checkpoint, state(1))
    assert read_arrays(arrays) is not None
    for path in (arrays, checkpoint):
        with zipfile.ZipFile(path, "a") as archive:
            archive.infolist()[0].file_size = 2**31
            archive.writestr("more", b"")
    assert read_arrays(arrays) is None
    with pytest.raises(ValueError) as refused:
        load_checkpoint(checkpoint)
    assert "unpack to 2,147,483,648" in str(refused.value.__cause__)
