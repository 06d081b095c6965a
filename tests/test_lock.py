"""One job writes into a folder at a time, and a job whose folder was taken stops."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest
from rich.console import Console
from tiny import changed, tiny_config

from arat_fast import files
from arat_fast.display import Display
from arat_fast.files import LOCK, Lock, OvertakenError, folder_atomic, write_atomic, write_bytes
from arat_fast.run.hooks import Hook
from arat_fast.run.loop import train
from arat_fast.run.state import Run
from arat_fast.training.checkpoint import load_checkpoint

HOLD = """
import os, sys, time
from pathlib import Path
from arat_fast.files import Lock
lock = Lock(Path(sys.argv[1]))
if os.fork() == 0:
    print("held", flush=True)
    time.sleep(60)
os.wait()
"""


def test_a_lock_is_one_jobs_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run" / LOCK
    with Lock(path) as lock:
        lock.check()
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on "):
            Lock(path)
        lock.share()
        with Lock(path, holder=lock.holder) as other:
            lock.release()
            with pytest.raises(BlockingIOError):
                Lock(path)
            other.check()
        # Another machine's folder has no such file.
        Lock(path, holder=lock.holder).release()
    assert not path.exists()
    (path.parent / "file").touch()
    Lock(path).release()
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_an_error_that_is_kept_keeps_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="full") as kept:
            Lock(tmp_path / LOCK)
    Lock(tmp_path / LOCK).release()
    assert str(tmp_path / LOCK) in str(kept.value)


def test_a_lock_ends_with_its_process_whatever_that_has_forked(tmp_path: Path) -> None:
    """A data loader's worker lives on for seconds."""
    path = tmp_path / LOCK
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} on "):
        Lock(path)
    holder.kill()
    holder.wait()
    Lock(path).release()
    assert not path.exists()
    holder.stdout.close()


@pytest.mark.parametrize("take", [Path.unlink, lambda path: path.write_text("process 7 on b, x")])
def test_who_has_lost_a_lock_is_told_and_leaves_it(
    tmp_path: Path, take: Callable[[Path], object]
) -> None:
    path = tmp_path / LOCK
    with Lock(path) as lock:
        take(path)
        before = path.exists()
        with pytest.raises(OvertakenError, match="taken over by"):
            lock.check()
    assert path.exists() == before


class At(Hook):
    """Calls ``act`` before the second epoch."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def before_epoch(self, run: Run, epoch: int) -> None:
        if epoch == 1:
            run.checkpoints.wait()
            self.act()


CONFIG = changed(tiny_config(epochs=2), "train", eval_every=0)
QUIET = Display(Console(quiet=True))


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, resume: bool) -> None:
    out = tmp_path / "run"

    def again() -> None:
        with pytest.raises(BlockingIOError, match="--out"):
            train(CONFIG, out, resume=resume, display=QUIET)

    summary = train(CONFIG, out, display=QUIET, hooks=[At(again)])
    assert not (out / LOCK).exists()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ids = {summary["run"], load_checkpoint(out / "checkpoint.pt")["run"]["id"]}
    assert len(ids | {line["run"] for line in lines}) == 1
    assert train(CONFIG, out, resume=True, display=QUIET)["run"] == summary["run"]


def test_a_run_that_was_overtaken_writes_nothing_more(tmp_path: Path) -> None:
    """As after an hour on another machine, on a file system without locks."""
    files = {}

    def overtake() -> None:
        (tmp_path / LOCK).write_text("process 7 on another, x")
        files.update({path.name: path.read_bytes() for path in tmp_path.glob("*.*")})

    with pytest.raises(OvertakenError, match="process 7 on another"):
        train(CONFIG, tmp_path, display=QUIET, hooks=[At(overtake)])
    assert "summary.json" not in files and "checkpoint.pt" in files
    assert files == {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}


def test_two_writers_without_locks_leave_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "record"

    def write(file: BinaryIO) -> None:
        file.write(b"first")
        file.flush()
        write_bytes(path, b"second, whole")
        file.write(b" goes on")

    with pytest.raises(OSError, match="another process's"):
        write_atomic(path, write)
    assert path.read_bytes() == b"second, whole"
    (tmp_path / ".record.new").write_bytes(b"left by one that was killed, and longer")
    write_bytes(path, b"third")
    assert path.read_bytes() == b"third"
    assert list(tmp_path.iterdir()) == [path]


def write_folder(path: Path, go_on: threading.Event) -> None:
    with folder_atomic(path) as made:
        (made / "first").write_bytes(b"whole")
        go_on.wait(30)


def test_who_waited_for_a_folder_does_not_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two exports, or conversions, into one folder at once; that one waits is said."""
    monkeypatch.setattr(files, "WAIT_SECONDS", 0.1)
    path, go_on, said = tmp_path / "out", threading.Event(), ""
    with ThreadPoolExecutor() as pool:
        first = pool.submit(write_folder, path, go_on)
        while not (tmp_path / ".out.new" / "first").exists():
            time.sleep(0.01)
        second = pool.submit(write_folder, path, go_on)
        while "waiting" not in said:
            said += capfd.readouterr().err
        go_on.set()
        first.result(30)
        with pytest.raises(FileExistsError, match="has files"):
            second.result(30)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/first",
    ]


def test_refused_settings_leave_no_folder(tmp_path: Path) -> None:
    config = changed(CONFIG, "data", num_val=1437)
    with pytest.raises(ValueError):
        train(config, tmp_path / "run", display=QUIET)
    assert not (tmp_path / "run").exists()
