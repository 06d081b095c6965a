"""What is kept of a run's checkpoints, and what is passed over."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from tiny import tiny_config, tiny_trainer
from torch import Tensor

import arat_fast.training.checkpoint as checkpoint_module
from arat_fast.training import loop
from arat_fast.training.checkpoint import CheckpointFolder, load_checkpoint
from arat_fast.training.interrupt import InterruptedRun


def save(folder: CheckpointFolder, step: int) -> None:
    folder.save(step, {"step": step, "weights": torch.full((1000,), float(step))}, lambda: None)
    folder.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_are_kept(tmp_path: Path, keep: int) -> None:
    folder = CheckpointFolder(tmp_path, keep)
    for step in (3, 6, 9, 12, 15):
        save(folder, step)
    before = [f"checkpoint-{step:08}.pt" for step in (12, 9, 6)[: keep - 1]]
    assert names(tmp_path) == sorted(["checkpoint.pt", *before])
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 15
    for name in before:
        assert load_checkpoint(tmp_path / name)["step"] == int(name[11:19])


def test_the_same_step_again_takes_no_place(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    for step in (3, 6, 6):
        save(folder, step)
    assert names(tmp_path) == ["checkpoint-00000003.pt", "checkpoint.pt"]


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_damage_anywhere_is_found(tmp_path: Path, place: float) -> None:
    folder = CheckpointFolder(tmp_path, 3)
    for step in (3, 6, 9):
        save(folder, step)
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    content[int(place * len(content))] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    found = CheckpointFolder(tmp_path, 3).find()
    assert found is not None and found.state["step"] == 6
    assert found.path.name == "checkpoint-00000006.pt"
    (problem,) = found.problems
    assert "checkpoint.pt" in problem and "not a whole checkpoint" in problem


def test_all_damaged(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    assert folder.find() is None and not folder.exists()
    for step in (3, 6):
        save(folder, step)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    assert folder.exists()
    with pytest.raises(ValueError, match="not a whole checkpoint") as error:
        folder.find()
    assert "\n" not in str(error.value)


def test_saving_does_not_wait_and_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on, and changes the weights, while the disk is slow."""
    disk = threading.Event()
    whole = checkpoint_module.write_atomic

    def slow(path: Path, write: Callable[[BinaryIO], None]) -> None:
        disk.wait(10)
        whole(path, write)

    monkeypatch.setattr(checkpoint_module, "write_atomic", slow)
    folder = CheckpointFolder(tmp_path, 1)
    state: dict[str, Tensor] = {"weights": torch.ones(1000)}
    folder.save(1, {"step": 1, "model": state, "list": [state["weights"]]}, lambda: None)
    state["weights"].fill_(5)
    assert not folder.exists()
    disk.set()
    folder.wait()
    loaded = load_checkpoint(folder.newest)
    assert (loaded["model"]["weights"] == 1).all() and (loaded["list"][0] == 1).all()


def test_a_failed_write_is_told_later_and_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    save(folder, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    folder.save(2, {"step": 2}, lambda: None)
    with pytest.raises(OSError, match="No space left"):
        folder.wait()
    folder.check()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 1
    monkeypatch.undo()
    save(folder, 3)
    assert names(tmp_path) == ["checkpoint-00000001.pt", "checkpoint.pt"]


def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path, 2)
    for step in (1, 2, 3):
        save(folder, step)
    folder.keep_as_best()
    assert names(tmp_path) == ["checkpoint-00000002.pt", "checkpoint-best.pt", "checkpoint.pt"]


def test_best_by_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(epochs=5)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, eval_every=1, keep_best=True)
    )
    trainer = tiny_trainer(tmp_path / "run", config)
    scores = iter([0.2, 0.2, 0.6, 0.6, 0.5, 0.5, 0.4, 0.4])
    monkeypatch.setattr(trainer, "_evaluate", lambda *a: next(scores))
    trainer.run()
    best = load_checkpoint(tmp_path / "run" / "checkpoint-best.pt")
    # Weights and their average are scored; the average counts, which begins with the second epoch.
    assert best["step"] == 8 and best["best_accuracy"] == 0.6
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 20


def test_best_needs_validation_images() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match="not by test images: set data.num_val"):
        dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, num_val=0),
            train=dataclasses.replace(config.train, keep_best=True),
        )


def test_signal_during_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation is broken off, and made again when the run goes on."""
    config = tiny_config(epochs=3)
    tiny_trainer(tmp_path / "whole", config).run()
    pgd = loop.pgd_accuracy

    def interrupted(*args: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return pgd(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "pgd_accuracy", interrupted)
    with pytest.raises(InterruptedRun, match="stopped at step 8 of 12") as stopped:
        tiny_trainer(tmp_path / "cut", config).run()
    assert stopped.value.exit_code == 75
    monkeypatch.undo()
    tiny_trainer(tmp_path / "cut", config, resume=True).run()
    whole, cut = (
        (tmp_path / name / "metrics.jsonl").read_text().count('"eval"') for name in ("whole", "cut")
    )
    assert whole == cut
    states = [
        load_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "cut")
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
