"""Accidents: what a run of several processes survives, and what it says when it ends."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed import drills, jobs
from distributed.drills import STEPS_PER_EPOCH, Drill
from safetensors.torch import load_file

from arat_fast.training.checkpoint import CheckpointFolder, load_checkpoint

EPOCHS = ("--train.epochs", "3")
TOTAL = 3 * STEPS_PER_EPOCH


def go(folder: Path, num_ranks: int, drill: Drill) -> tuple[list[int | None], str]:
    """Start a job and wait for it; exit codes, and what it printed."""
    folder.mkdir(exist_ok=True)
    log = folder / f"log{len(list(folder.iterdir()))}"
    log.mkdir()
    codes = jobs.wait(jobs.start(drills.as_rank, (drill,), num_ranks, log))
    return codes, jobs.printed(log)


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("arat-fast: error")]


def assert_same_run(left: Path, right: Path) -> None:
    """The same deployed weights and the same last checkpoint, bit for bit."""
    for pair in (
        [load_file(run / "model.safetensors") for run in (left, right)],
        [flat(load_checkpoint(run / "checkpoint.pt")) for run in (left, right)],
    ):
        assert pair[0].keys() == pair[1].keys() and len(pair[0]) > 20
        for name, value in pair[0].items():
            assert torch.equal(value, pair[1][name]), name


def flat(value: object, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {path: value}
    found: dict[str, torch.Tensor] = {}
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = ((str(i), v) for i, v in enumerate(value))  # type: ignore[assignment]
    for key, item in items:
        found |= flat(item, f"{path}/{key}")
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The uninterrupted run of that many processes; 0 without torchrun's variables."""
    folder = tmp_path_factory.mktemp("whole")

    def run(num_ranks: int) -> Path:
        out = folder / str(num_ranks)
        if not out.exists():
            codes, text = go(folder / f"of{num_ranks}", num_ranks, Drill(str(out), extra=EPOCHS))
            assert set(codes) == {0}, text
        return out

    return run


def finish(folder: Path, out: Path, num_ranks: int, extra: tuple[str, ...] = EPOCHS) -> str:
    codes, text = go(folder, num_ranks, Drill(str(out), extra=extra))
    assert set(codes) == {0}, text
    return text


def test_one_process_under_torchrun_equals_one_without(whole: Callable[[int], Path]) -> None:
    assert_same_run(whole(0), whole(1))


def test_a_killed_rank_takes_the_others_down_with_one_message(
    whole: Callable[[int], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    codes, text = go(tmp_path / "logs", 2, Drill(str(out), "kill", 6, 1, EPOCHS))
    assert codes == [1, -9], text
    (message,) = errors(text)
    assert "rank 1 (" in message and "step 6," in message
    finish(tmp_path / "logs", out, 2)
    assert_same_run(whole(2), out)


@pytest.mark.parametrize("step", [STEPS_PER_EPOCH, TOTAL])
def test_a_signal_in_an_evaluation(whole: Callable[[int], Path], tmp_path: Path, step: int) -> None:
    """In one between epochs and in the last; the rank that still evaluates hears of it."""
    out = tmp_path / "run"
    extra = (*EPOCHS, "--train.eval-every", "1")
    codes, text = go(tmp_path / "logs", 2, Drill(str(out), "evaluation", step, 1, extra))
    assert codes == [75, 75], text
    assert text.count("arat-fast: stopped") == 1
    assert load_checkpoint(out / "checkpoint.pt")["progress"]["step"] == step
    finish(tmp_path / "logs", out, 2)
    assert_same_run(whole(2), out)


@pytest.mark.parametrize(
    ("name", "code", "rank"), [("SIGTERM", 75, 1), ("SIGUSR1", 75, None), ("SIGINT", 130, 1)]
)
def test_a_signal_stops_all_ranks_at_one_step(
    whole: Callable[[int], Path], tmp_path: Path, name: str, code: int, rank: int | None
) -> None:
    out = tmp_path / "run"
    codes, text = go(tmp_path / "logs", 2, Drill(str(out), name, 6, rank, EPOCHS))
    assert codes == [code, code], text
    assert text.count("stopped at step") == 1 and "--resume" in text
    # All know of it one step later.
    assert load_checkpoint(out / "checkpoint.pt")["progress"]["step"] == 8
    finish(tmp_path / "logs", out, 2)
    assert_same_run(whole(2), out)


def test_job_killed_in_the_middle_of_a_checkpoint(
    whole: Callable[[int], Path], tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    log.mkdir()
    drill = Drill(str(out), "kill in write", 2 * STEPS_PER_EPOCH, 0, EPOCHS)
    processes = jobs.start(drills.as_rank, (drill,), 2, log)
    deadline = time.monotonic() + 60
    while not (out / "writing").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.kill()
    assert jobs.wait(processes) == [-9, -9], jobs.printed(log)
    assert load_checkpoint(out / "checkpoint.pt")["progress"]["step"] == STEPS_PER_EPOCH
    assert list(out.glob(".checkpoint.pt.*")), "the half-written file"
    finish(tmp_path / "logs", out, 2)
    assert not list(out.glob(".checkpoint.pt.*"))
    assert_same_run(whole(2), out)


def test_full_disk(whole: Callable[[int], Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    drill = Drill(str(out), "full disk", 2 * STEPS_PER_EPOCH, 0, EPOCHS)
    codes, text = go(tmp_path / "logs", 2, drill)
    assert codes == [2, 1], text
    (message,) = errors(text)
    assert "checkpoint.pt" in message
    assert load_checkpoint(out / "checkpoint.pt")["progress"]["step"] == STEPS_PER_EPOCH
    finish(tmp_path / "logs", out, 2)
    assert_same_run(whole(2), out)


def test_damaged_newest_checkpoint(whole: Callable[[int], Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    codes, text = go(tmp_path / "logs", 2, Drill(str(out), "SIGTERM", 9, 0, EPOCHS))
    assert set(codes) == {75}, text
    newest = out / "checkpoint.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    text = finish(tmp_path / "logs", out, 2)
    assert "warning:" in text and "checksum" in text and "step 8" in text
    assert_same_run(whole(2), out)


@pytest.mark.parametrize("rank", [None, 1])
def test_nan_stops_all_ranks_and_keeps_the_checkpoint(tmp_path: Path, rank: int | None) -> None:
    out = tmp_path / "run"
    codes, text = go(tmp_path / "logs", 2, Drill(str(out), "nan", 6, rank, EPOCHS))
    assert sorted(codes) == [1, 2], text  # type: ignore[type-var]  # none is None
    (message,) = errors(text)
    assert f"at step 6 on {'rank 0, 1' if rank is None else 'rank 1'}" in message
    assert load_checkpoint(out / "checkpoint.pt")["progress"]["step"] == STEPS_PER_EPOCH


def test_rollback_goes_on_with_a_lower_rate(tmp_path: Path) -> None:
    out = tmp_path / "run"
    extra = (*EPOCHS, "--train.rollbacks", "1")
    codes, text = go(tmp_path / "logs", 2, Drill(str(out), "nan once", 6, 1, extra))
    assert codes == [0, 0], text
    assert "back to step 4" in text
    progress = load_checkpoint(out / "checkpoint.pt")["progress"]
    assert (progress["rate_factor"], progress["num_rollbacks"]) == (0.5, 1)
    assert progress["step"] == TOTAL


def test_resume_with_another_number_of_ranks(tmp_path: Path) -> None:
    """With synchronised BatchNorm the runs agree up to rounding, wherever the ranks change."""
    # In L2: signs of gradients near zero would turn over.
    ball = ("--attack.norm", "L2", "--attack.eps", "0.5", "--attack.alpha", "0.5")
    extra = (*EPOCHS, "--distributed.sync-bn", *ball)
    codes, text = go(tmp_path / "logs", 3, Drill(str(tmp_path / "a"), "SIGTERM", 5, 0, extra))
    assert set(codes) == {75}, text
    text = finish(tmp_path / "logs", tmp_path / "a", 2, extra)
    assert "from step 7" in text
    codes, text = go(tmp_path / "logs", 1, Drill(str(tmp_path / "b"), extra=extra))
    assert set(codes) == {0}, text
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name, value in a.items():
        torch.testing.assert_close(
            value, b[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: n + m
        )


def test_more_ranks_can_leave_nothing_of_an_epoch_but_its_end(tmp_path: Path) -> None:
    """The last 3 of 195 images are a batch of one process, and none of two."""
    out = tmp_path / "run"
    extra = ("--train.epochs", "1", "--data.num-val", "1242")
    codes, text = go(tmp_path / "logs", 0, Drill(str(out), "SIGTERM", 2, None, extra))
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
def test_twenty_interruptions(tmp_path: Path) -> None:
    """Kills and signals at random steps of one run, on whichever rank: nothing is left of them."""
    extra = ("--train.epochs", "10")
    total = 10 * STEPS_PER_EPOCH
    finish(tmp_path / "logs", tmp_path / "whole", 2, extra)
    out = tmp_path / "run"
    draw = random.Random(20)
    folder = CheckpointFolder(out, 2)
    for number in range(20):
        found = folder.find() if folder.exists() else None
        at = found.state["progress"]["step"] if found else 0
        # A kill loses the steps since the checkpoint, a signal none: so the run gets on.
        kind = "kill" if number % 2 else draw.choice(["SIGTERM", "SIGUSR1", "SIGINT"])
        step = at + draw.randrange(1 + min(5, (total - 2 - at) // (20 - number)))
        drill = Drill(str(out), kind, step, draw.choice([0, 1, None]), extra)
        codes, text = go(tmp_path / "logs", 2, drill)
        assert set(codes) <= ({1, -9} if kind == "kill" else {75, 130}), (drill, text)
    finish(tmp_path / "logs", out, 2, extra)
    assert_same_run(tmp_path / "whole", out)


def torchrun(drill: Drill, *options: str) -> subprocess.CompletedProcess[str]:
    """The real launcher, of two processes."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            *options,
            drills.__file__,
            drills.as_json(drill),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(whole: Callable[[int], Path], tmp_path: Path) -> None:
    """A rank is killed, all are started again, and go on."""
    out = tmp_path / "run"
    drill = Drill(str(out), "kill", 6, 1, EPOCHS, first_attempt_only=True)
    result = torchrun(drill, "--max-restarts=1")
    assert result.returncode == 0, result.stderr
    assert "2 processes from step 4" in result.stderr
    assert_same_run(whole(2), out)


@pytest.mark.slow
def test_sigterm_to_torchrun_with_workers(whole: Callable[[int], Path], tmp_path: Path) -> None:
    """It signals whole process groups, and the data loader's workers go on all the same."""
    out = tmp_path / "run"
    workers = ("--data.loader", "dataloader", "--data.num-workers", "1")
    result = torchrun(Drill(str(out), "launcher", 5, 0, (*EPOCHS, *workers)))
    assert result.returncode != 0, result.stderr
    assert load_checkpoint(out / "checkpoint.pt")["progress"]["step"] == 7
    finish(tmp_path / "logs", out, 2)
    assert_same_run(whole(2), out)
