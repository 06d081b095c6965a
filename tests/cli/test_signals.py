"""A signal ends every command from its first moment on, with the code that is promised."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import OPTIONS

from arat_fast.cli import main
from arat_fast.stop import Terminated, end_on_signals, stop_on_signals
from arat_fast.training.checkpoint import load_checkpoint

EARLY = """
import os, time
os.kill(os.getpid(), {number})
time.sleep(5)
raise AssertionError("the signal was not heard")
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGUSR1, 75)],
)
@pytest.mark.parametrize("command", ["train digits", "compare digits"])
def test_during_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, number: int, code: int
) -> None:
    """While an objective of one's own is imported, before there is any data."""
    (tmp_path / f"early{number}.py").write_text(EARLY.format(number=int(number)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(number)
    if before is signal.SIG_IGN:
        pytest.skip("the signal is ignored, as under nohup, and stays so")
    assert main([*command.split(), "--objective.name", f"early{number}:Mine"]) == code
    assert signal.getsignal(number) is before
    assert not (tmp_path / "runs").exists()


def test_one_that_comes_too_late_for_a_part_ends_the_whole() -> None:
    """As for the natural training that others begin with."""
    with pytest.raises(Terminated) as ended, end_on_signals():
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
        raise AssertionError("the signal was lost")
    assert ended.value.exit_code == 75


def start(out: Path, **keywords: object) -> subprocess.Popen[bytes]:
    """A training of many epochs, once it has begun."""
    command = ["-m", "arat_fast", "train", "digits", *OPTIONS, "--train.epochs", "1000"]
    process = subprocess.Popen([sys.executable, *command, "--out", str(out)], **keywords)  # type: ignore[call-overload]
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    return process  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_terminal_that_is_lost_costs_nothing(tmp_path: Path) -> None:
    """As when an ssh session ends: what is written to it would fail."""
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        # Where the tests themselves run under nohup.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.close(os.open(os.ttyname(theirs), os.O_RDWR))

    process = start(
        tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    os.close(ours)
    assert process.wait(60) == 75
    assert load_checkpoint(tmp_path / "checkpoint.pt")["progress"]["step"] > 0
    assert '"interrupted"' in (tmp_path / "summary.json").read_text()


@pytest.mark.slow
def test_nohup_is_respected(tmp_path: Path) -> None:
    quiet = subprocess.DEVNULL
    process = start(
        tmp_path,
        stdout=quiet,
        stderr=quiet,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_output_that_nobody_reads_any_more_ends_no_run(tmp_path: Path, kind: str) -> None:
    """As when Ctrl-C ends the tee behind it too, or a run that was disowned outlives its
    terminal."""
    ours, theirs = os.pipe() if kind == "pipe" else pty.openpty()
    process = start(tmp_path, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.close(ours)
    metrics = tmp_path / "metrics.jsonl"
    size, latest = metrics.stat().st_size, time.monotonic() + 60
    while metrics.stat().st_size < 5 * size and process.poll() is None:
        assert time.monotonic() < latest
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert '"interrupted"' in (tmp_path / "summary.json").read_text()
