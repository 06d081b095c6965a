"""What is kept of a run's checkpoints, and what is passed over."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_trainer
from torch import Tensor

import arat_fast.training.checkpoint as checkpoint_module
from arat_fast.stop import InterruptedRun
from arat_fast.training import loop
from arat_fast.training.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint


def save(folder: CheckpointFolder, step: int) -> None:
    folder.save(step, {"step": step, "weights": torch.full((1000,), float(step))}, lambda: None)
    folder.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def refuse(*paths: Path) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


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


def test_every_bit_of_the_directory(tmp_path: Path) -> None:
    """Damage to the archive's directory is refused, or changes nothing that is read."""
    save(CheckpointFolder(tmp_path, 1), 9)
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    refused = 0
    for bit in range(8 * start, 8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            assert "not a whole checkpoint" in str(error)
            refused += 1
        else:
            assert state["step"] == 9 and (state["weights"] == 9).all()
    assert refused > 4 * (len(content) - start)


class BadEnd(io.FileIO):
    """A file whose last bytes the disk refuses."""

    def readinto(self, buffer: Any) -> int:
        if self.tell() + len(buffer) >= os.fstat(self.fileno()).st_size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(buffer)


def test_a_file_that_cannot_be_read_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be readable tomorrow; zipfile takes an end that cannot be read for another format."""
    folder = CheckpointFolder(tmp_path, 2)
    for step in (3, 6):
        save(folder, step)
    whole = io.open

    def refusing(file: Any, *mode: Any, **options: Any) -> Any:
        if Path(file).name == "checkpoint.pt":
            return io.BufferedReader(BadEnd(file))
        return whole(file, *mode, **options)

    for module in ("builtins", "io"):
        monkeypatch.setattr(f"{module}.open", refusing)
    folder = CheckpointFolder(tmp_path, 2)
    with pytest.raises(OSError, match=r"checkpoint.pt cannot be read: Input/output error; .*try"):
        folder.find()
    monkeypatch.undo()
    found = folder.find()
    assert found is not None and found.state["step"] == 6 and not found.problems


def test_steps_that_are_numbered_anew_cost_no_checkpoint(tmp_path: Path) -> None:
    """With more processes an epoch has fewer steps; what is whole stays, by its age."""
    folder = CheckpointFolder(tmp_path, 3)
    for step in (20, 40, 60):
        save(folder, step)
    cut(tmp_path / "checkpoint.pt")
    folder = CheckpointFolder(tmp_path, 3)
    found = folder.find()
    assert found is not None and found.state["step"] == 40
    save(folder, 30)
    assert names(tmp_path) == [f"checkpoint{end}.pt" for end in ("-00000020", "-00000040", "")]
    save(folder, 35)
    assert names(tmp_path) == [f"checkpoint{end}.pt" for end in ("-00000030", "-00000040", "")]
    cut(tmp_path / "checkpoint.pt")
    found = CheckpointFolder(tmp_path, 3).find()
    assert found is not None and found.state["step"] == 30


@pytest.mark.parametrize("links", [True, False])
def test_damaged_files_do_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Neither the newest, nor one before it, nor one half-copied under a name still to come."""
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path, 3)
    for step in (3, 6, 9):
        save(folder, step)
    for name in ("checkpoint.pt", "checkpoint-00000006.pt"):
        cut(tmp_path / name)
    folder = CheckpointFolder(tmp_path, 3)
    found = folder.find()
    assert found is not None and found.state["step"] == 3 and len(found.problems) == 2
    save(folder, 4)
    assert names(tmp_path) == ["checkpoint-00000003.pt", "checkpoint.pt"]
    (tmp_path / "checkpoint-00000004.pt").write_bytes(b"half")
    save(folder, 7)
    assert names(tmp_path) == [f"checkpoint{end}.pt" for end in ("-00000003", "-00000004", "")]
    assert [load_checkpoint(path)["step"] for path in sorted(tmp_path.iterdir())] == [3, 4, 7]


def test_kept_before_the_newest_was_replaced(tmp_path: Path) -> None:
    """A process killed in between leaves one file with two names; and files half-made."""
    save(CheckpointFolder(tmp_path, 2), 3)
    os.link(tmp_path / "checkpoint.pt", tmp_path / "checkpoint-00000003.pt")
    for name in (".checkpoint.pt.a1", ".checkpoint-00000003.pt.new", ".checkpoint-best.pt.b2"):
        (tmp_path / name).touch()
    folder = CheckpointFolder(tmp_path, 2)
    folder.remove_leftovers()
    assert folder.find() is not None
    save(folder, 6)
    assert names(tmp_path) == ["checkpoint-00000003.pt", "checkpoint.pt"]
    assert load_checkpoint(tmp_path / "checkpoint-00000003.pt")["step"] == 3


def test_a_run_with_other_steps_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """Step 8, the end of the first epoch of a run with smaller batches, is step 4 of this one."""
    tiny_trainer(tmp_path, tiny_config(epochs=2)).run()
    newest = tmp_path / "checkpoint.pt"
    save_checkpoint(newest, {**load_checkpoint(newest), "step": 8, "steps_per_epoch": 8})
    (tmp_path / "checkpoint-00000004.pt").unlink()
    tiny_trainer(tmp_path, tiny_config(epochs=2), resume=True).run()
    assert load_checkpoint(newest)["step"] == 8
    before = load_checkpoint(tmp_path / "checkpoint-00000004.pt")
    assert (before["step"], before["steps_per_epoch"]) == (8, 8)


def test_all_damaged(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    assert folder.find() is None and not folder.exists()
    for step in (3, 6):
        save(folder, step)
    for path in tmp_path.iterdir():
        cut(path)
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


@pytest.mark.parametrize("error", [MemoryError("of the host"), RuntimeError("CUDA\nerror")])
def test_a_failure_of_another_kind_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    save(folder, 1)

    def fail(copy: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint_module._Copy, "on_host", fail)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for tell in (folder.wait, lambda: folder.save(3, {"step": 3}, lambda: None)):
        folder.save(2, {"step": 2}, lambda: None)
        with pytest.raises(OSError, match=f"cannot write .*checkpoint.pt: {reason}") as told:
            tell()
        assert told.value.__cause__ is error
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 1


def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    line = {"split": "val", "model": "last", "clean": 0.5}
    monkeypatch.setattr(trainer, "_evaluate", lambda *a: {**line, "pgd": next(scores)})
    trainer.run()
    best = load_checkpoint(tmp_path / "run" / "checkpoint-best.pt")
    # Weights and their average are scored; the average counts, which begins with the second epoch.
    assert best["step"] == 8 and best["best_accuracy"] == 0.6
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 20


def test_an_evaluation_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best checkpoint is written after it; a run that is killed then goes on behind it."""
    config = tiny_config(epochs=3)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, eval_every=1, keep_best=True)
    )
    tiny_trainer(tmp_path / "whole", config).run()
    trainer = tiny_trainer(tmp_path / "cut", config)
    start_epoch = trainer._start_epoch

    def killed(epoch: int) -> None:
        if epoch == 1:
            raise RuntimeError("killed")
        start_epoch(epoch)

    monkeypatch.setattr(trainer, "_start_epoch", killed)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.run()
    assert len(evaluation_lines(tmp_path / "cut")) == 2
    resumed = tiny_trainer(tmp_path / "cut", config, resume=True)
    evaluate, epochs = resumed._evaluate, []

    def noting(epoch: int, *rest: Any) -> dict[str, Any]:
        epochs.append(epoch)
        return evaluate(epoch, *rest)

    monkeypatch.setattr(resumed, "_evaluate", noting)
    resumed.run()
    assert epochs == [2, 2]
    assert evaluation_lines(tmp_path / "cut") == evaluation_lines(tmp_path / "whole")


def test_best_needs_validation_images() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match="not by test images: set data.num_val"):
        dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, num_val=0),
            train=dataclasses.replace(config.train, keep_best=True),
        )


def test_best_needs_validation_images_of_the_dataset_or_held_out(tmp_path: Path) -> None:
    """Whether a dataset of one's own has some is known when it is read."""
    for split in ("train", "val", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        pixels = np.zeros((64, 8, 8, 3), np.uint8)
        np.save(tmp_path / "set" / split / "images.npy", pixels)
        np.save(tmp_path / "set" / split / "labels.npy", np.arange(64) % 10)
    config = tiny_config()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, name="arrays", root=tmp_path / "set", num_val=0, batch_size=32
        ),
        train=dataclasses.replace(config.train, eval_every=1, keep_best=True),
    )
    assert tiny_trainer(tmp_path / "run", config).data.val is not None
    shutil.rmtree(tmp_path / "set" / "val")
    with pytest.raises(ValueError, match="keep_best needs validation images, and .* has none"):
        tiny_trainer(tmp_path / "other", config)


def evaluation_lines(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]


@pytest.mark.parametrize("calls", [1, 2])
def test_signal_during_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The evaluation, of the weights or of their average, is made again when the run goes on."""
    config = tiny_config(epochs=3)
    tiny_trainer(tmp_path / "whole", config).run()
    pgd = loop.pgd_accuracy
    left = calls

    def interrupted(*args: object, **options: object) -> object:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGTERM)
        return pgd(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "pgd_accuracy", interrupted)
    with pytest.raises(InterruptedRun, match="stopped at step 8 of 12") as stopped:
        tiny_trainer(tmp_path / "cut", config).run()
    assert stopped.value.exit_code == 75
    monkeypatch.undo()
    tiny_trainer(tmp_path / "cut", config, resume=True).run()
    lines = evaluation_lines(tmp_path / "whole")
    assert len(lines) == 2 and evaluation_lines(tmp_path / "cut") == lines
    states = [
        load_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "cut")
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
