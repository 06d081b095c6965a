"""Accidents: what a run of several processes survives, and what it says when it ends."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import drills, jobs
from distributed.drills import STEPS_PER_EPOCH, Drill
from safetensors.torch import load_file
from tiny import assert_same_end, leaves

from arat_fast.training.checkpoint import CheckpointFolder, load_checkpoint

EPOCHS = ("--train.epochs", "3")
SECOND, TOTAL = 2 * STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def go(folder: Path, num_ranks: int, drill: Drill) -> tuple[list[int | None], str]:
    """Start a job and wait for it; exit codes, and what it printed."""
    folder.mkdir(exist_ok=True)
    log = folder / f"log{len(list(folder.iterdir()))}"
    log.mkdir()
    codes = jobs.wait(jobs.start(drills.as_rank, (drill,), num_ranks, log))
    return codes, jobs.printed(log)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The uninterrupted run of that many processes; 0 without torchrun's variables."""
    folder = tmp_path_factory.mktemp("whole")

    def run(num_ranks: int) -> Path:
        out = folder / str(num_ranks)
        if not out.exists():
            codes, text = go(
                folder / f"of{num_ranks}", num_ranks, Drill(out=str(out), extra=EPOCHS)
            )
            assert set(codes) == {0}, text
        return out

    return run


def finish(folder: Path, out: Path, num_ranks: int, extra: tuple[str, ...] = EPOCHS) -> str:
    codes, text = go(folder, num_ranks, Drill(out=str(out), extra=extra))
    assert set(codes) == {0}, text
    return text


@pytest.mark.slow
def test_one_process_under_torchrun_equals_one_without(whole: Callable[[int], Path]) -> None:
    assert_same_end(whole(0), whole(1), numbers=False)


@pytest.mark.parametrize(
    ("drill", "codes", "saved", "words"),
    [
        (Drill("kill", 6, 1), [1, -9], STEPS_PER_EPOCH, r"error: rank 1 \(.* step 6,"),
        # All know of a signal one step later; it says how to go on.
        slow(Drill("SIGTERM", 6, 1), [75, 75], 8, "stopped .*--resume"),
        slow(Drill("SIGINT", 6, 1), [130, 130], 8, "stopped .*--resume"),
        # In an evaluation between epochs and in the last; the rank that still works hears of it.
        slow(Drill("evaluation", STEPS_PER_EPOCH, 1), [75, 75], STEPS_PER_EPOCH, "stopped"),
        slow(Drill("evaluation", TOTAL, 1), [75, 75], TOTAL, "stopped"),
        slow(Drill("kill in write", SECOND, 0), [-9, 1], STEPS_PER_EPOCH, r"error: rank 0 \("),
        slow(Drill("full disk", SECOND, 0), [2, 1], STEPS_PER_EPOCH, r"error: .*checkpoint.pt"),
        slow(Drill("nan", 6, 1), [1, 2], STEPS_PER_EPOCH, r"error: .* step 6 on rank 1"),
        slow(Drill("nan", 6), [1, 2], STEPS_PER_EPOCH, r"error: .* rank 0, 1"),
    ],
    ids=lambda value: f"{value.accident}-{value.rank}" if isinstance(value, Drill) else "",
)
def test_accident(
    whole: Callable[[int], Path],
    tmp_path: Path,
    drill: Drill,
    codes: list[int],
    saved: int,
    words: str,
) -> None:
    """All end, one says why, and the same command leaves the weights of the run without it."""
    out = tmp_path / "run"
    extra = (*EPOCHS, "--train.eval-every", "1") if drill.accident == "evaluation" else EPOCHS
    drill = dataclasses.replace(drill, out=str(out), extra=extra)
    ended, text = go(tmp_path / "logs", 2, drill)
    # Which rank says it is chance where both see it.
    assert (sorted if drill.accident == "nan" else list)(ended) == codes, text  # type: ignore[operator]
    assert len(re.findall(words, text)) == text.count("arat-fast: ") == 1, text
    assert load_checkpoint(out / "checkpoint.pt")["progress"]["step"] == saved
    assert len(list(out.glob(".checkpoint.pt.*"))) == (drill.accident == "kill in write")
    finish(tmp_path / "logs", out, 2)
    assert not list(out.glob(".checkpoint.pt.*"))
    assert_same_end(whole(2), out, numbers=False)


@pytest.mark.slow
def test_damaged_newest_checkpoint(whole: Callable[[int], Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    codes, text = go(tmp_path / "logs", 2, Drill("SIGTERM", 9, 0, str(out), EPOCHS))
    assert set(codes) == {75}, text
    newest = out / "checkpoint.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    text = finish(tmp_path / "logs", out, 2)
    assert "warning:" in text and "not a whole checkpoint" in text and "step 8" in text
    assert_same_end(whole(2), out, numbers=False)


@pytest.mark.slow
def test_rollback_goes_on_with_a_lower_rate(tmp_path: Path) -> None:
    out = tmp_path / "run"
    extra = (*EPOCHS, "--train.rollbacks", "1")
    codes, text = go(tmp_path / "logs", 2, Drill("nan once", 6, 1, str(out), extra))
    assert codes == [0, 0], text
    assert "back to step 4" in text
    progress = load_checkpoint(out / "checkpoint.pt")["progress"]
    assert (progress["rate_factor"], progress["num_rollbacks"]) == (0.5, 1)
    assert progress["step"] == TOTAL


def seen(out: Path, step: int) -> list[dict[str, Any]]:
    """What each rank was given in a step."""
    files = sorted(Path(f"{out}.seen").glob(f"step{step}-rank*.pt"))
    return [torch.load(file, weights_only=True) for file in files]


def test_resume_with_another_number_of_ranks(tmp_path: Path) -> None:
    """What is restored and what each step is given are the same bits, wherever the ranks change;
    with synchronised BatchNorm the weights agree up to rounding."""
    # In L2, where no sign turns over, and for few steps: rounding grows a hundredfold in each.
    ball = ("--attack.norm", "L2", "--attack.eps", "0.5", "--attack.alpha", "0.5")
    extra = ("--train.epochs", "1", "--distributed.sync-bn", *ball)
    resumed, whole = (Drill(out=str(tmp_path / name), extra=extra, watched=True) for name in "ab")
    stopped = dataclasses.replace(resumed, accident="SIGTERM", rank=0)
    codes, text = go(tmp_path / "logs", 3, stopped)
    assert set(codes) == {75}, text
    saved = load_checkpoint(tmp_path / "a" / "checkpoint.pt")
    for num_ranks, drill in ((2, resumed), (1, whole)):
        codes, text = go(tmp_path / "logs", num_ranks, drill)
        assert set(codes) == {0}, text
    for rank in seen(tmp_path / "a", 2):
        for name, part in rank["state"].items():
            restored, expected = leaves(part), leaves(saved[name])
            assert restored.keys() == expected.keys()
            for path, value in expected.items():
                # Numbers of the optimiser's are this step's learning rate.
                assert not torch.is_tensor(value) or torch.equal(restored[path], value), path
    for step, num_ranks in enumerate((3, 3, 2, 2)):
        ranks, (alone,) = (seen(tmp_path / name, step) for name in "ab")
        assert len(ranks) == num_ranks
        for name in ("index", "draws"):
            assert torch.equal(torch.cat([rank[name] for rank in ranks]), alone[name])
        firsts = [0, *accumulate(len(rank["index"]) for rank in ranks)][:-1]
        assert [rank["first"] for rank in ranks] == firsts
        assert all(torch.equal(rank["generator"], alone["generator"]) for rank in ranks)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name, value in a.items():
        torch.testing.assert_close(
            value, b[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: n + m
        )


@pytest.mark.slow
def test_more_ranks_can_leave_nothing_of_an_epoch_but_its_end(tmp_path: Path) -> None:
    """The last 3 of 51 images are a batch of one process, and none of two."""
    out = tmp_path / "run"
    extra = ("--train.epochs", "1", "--data.num-val", "1386")
    codes, text = go(tmp_path / "logs", 0, Drill("SIGTERM", 2, None, str(out), extra))
    assert codes == [75], text
    before = load_checkpoint(out / "checkpoint.pt")
    progress = before["progress"]
    assert progress["step"] == 3 and progress["steps_per_epoch"] == 4
    text = finish(tmp_path / "logs", out, 2, extra)
    assert "from step 3" in text
    state, metrics = load_checkpoint(out / "checkpoint.pt")["progress"], before["metrics"]
    assert state["step"] == state["steps_per_epoch"] == 3
    mean = metrics["epoch_sums"]["accuracy_clean"] / metrics["epoch_samples"]
    assert state["clean_accuracy"] == mean != progress["clean_accuracy"]


@pytest.mark.slow
def test_interruptions(tmp_path: Path) -> None:
    """Kills and signals at random steps of one run, on whichever rank: nothing is left of them."""
    count = 20 if "EXHAUSTIVE" in os.environ else 6
    extra = ("--train.epochs", str(count // 2))
    total = count // 2 * STEPS_PER_EPOCH
    finish(tmp_path / "logs", tmp_path / "whole", 2, extra)
    out = tmp_path / "run"
    draw = random.Random(20)
    folder = CheckpointFolder(out, 2)
    for number in range(count):
        found = folder.find() if folder.exists() else None
        at = found.state["progress"]["step"] if found else 0
        # A kill loses the steps since the checkpoint, a signal none: so the run gets on.
        kind = "kill" if number % 2 else ("SIGTERM", "SIGUSR1", "SIGINT")[number // 2 % 3]
        step = at + draw.randrange(1 + min(5, (total - 2 - at) // (count - number)))
        drill = Drill(kind, step, draw.choice([0, 1, None]), str(out), extra)
        codes, text = go(tmp_path / "logs", 2, drill)
        assert set(codes) <= ({1, -9} if kind == "kill" else {75, 130}), (drill, text)
    finish(tmp_path / "logs", out, 2, extra)
    assert_same_end(tmp_path / "whole", out, numbers=False)


def launcher(drill: Drill, *options: str) -> subprocess.Popen[str]:
    """The real torchrun, of two processes."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return subprocess.Popen(
        [sys.executable, *torchrun, drills.__file__, drills.as_json(drill)],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(drill: Drill, *options: str) -> subprocess.CompletedProcess[str]:
    """What torchrun comes to."""
    process = launcher(drill, *options)
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="only there a process hears of its parent's end"
)
def test_ranks_end_with_their_launcher(whole: Callable[[int], Path], tmp_path: Path) -> None:
    """Also one that waits for another, which hangs."""
    out = tmp_path / "run"
    process = launcher(Drill("SIGSTOP", 6, 1, str(out), EPOCHS))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until((out / "checkpoint.pt").exists, 120)
    ranks = [int(pid) for pid in children.read_text().split()]
    wait_until(lambda: any(map(is_stopped, ranks)), 60)
    process.kill()
    (alive,) = [pid for pid in ranks if not is_stopped(pid)]
    wait_until(lambda: not Path(f"/proc/{alive}").exists(), 45)
    for pid in set(ranks) - {alive}:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 45)
    finish(tmp_path / "logs", out, 2)
    assert_same_end(whole(2), out, numbers=False)


@pytest.mark.slow
def test_a_rank_that_hangs_keeps_the_folder(whole: Callable[[int], Path], tmp_path: Path) -> None:
    """For longer than the others wait for it; then it goes on, and ends."""
    out, log = tmp_path / "run", tmp_path / "first"
    log.mkdir()
    extra = (*EPOCHS, "--distributed.timeout", "5")
    processes = jobs.start(drills.as_rank, (Drill("SIGSTOP", 6, 1, str(out), extra),), 2, log)
    processes[0].join(120)
    assert processes[0].exitcode == 1, jobs.printed(log)
    codes, text = go(tmp_path / "logs", 2, Drill(out=str(out), extra=EPOCHS))
    assert 2 in codes and f"at work in {out}" in text, text
    pid = processes[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGCONT)
    assert jobs.wait(processes) == [1, 1], jobs.printed(log)
    finish(tmp_path / "logs", out, 2)
    assert_same_end(whole(2), out, numbers=False)


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(whole: Callable[[int], Path], tmp_path: Path) -> None:
    """A rank is killed, all are started again, and go on."""
    out = tmp_path / "run"
    drill = Drill("kill", 6, 1, str(out), EPOCHS, first_attempt_only=True)
    result = torchrun(drill, "--max-restarts=1")
    assert result.returncode == 0, result.stderr
    assert "2 processes of " in result.stderr and "from step 4" in result.stderr
    assert_same_end(whole(2), out, numbers=False)


@pytest.mark.slow
def test_sigterm_to_torchrun_with_workers(whole: Callable[[int], Path], tmp_path: Path) -> None:
    """It signals whole process groups, and the data loader's workers go on all the same."""
    out = tmp_path / "run"
    workers = ("--data.loader", "dataloader", "--data.num-workers", "1")
    result = torchrun(Drill("launcher", 5, 0, str(out), (*EPOCHS, *workers)))
    assert result.returncode != 0, result.stderr
    # The other rank may not have voted on the step before when its signal comes.
    assert load_checkpoint(out / "checkpoint.pt")["progress"]["step"] in (6, 7)
    finish(tmp_path / "logs", out, 2)
    assert_same_end(whole(2), out, numbers=False)
