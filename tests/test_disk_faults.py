"""Every command, ended at every call that changes a file, by a crash, a power loss, a full disk or
a broken one: the same command given again comes to the same end."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk import Disk, Tree, read_tree, write_tree
from rich.console import Console
from safetensors.torch import load
from tiny import TinyRun, leaves, popen

import arat_fast.compare.command
import arat_fast.report
from arat_fast.cli import main
from arat_fast.command_line import apply_overrides
from arat_fast.display import Display
from arat_fast.recipes import recipe
from arat_fast.run.loop import train_run
from arat_fast.stop import InterruptedRun
from arat_fast.training.checkpoint import load_checkpoint

# 16 training images are left, two batches.
OPTIONS = (
    "--data.num-val 1421 --data.batch-size 8 --train.epochs 2 --train.log-every 1 --train.device "
    "cpu --attack.num-steps 1 --eval.num-steps 1 --eval.no-autoattack --eval.max-samples 8"
)
BEST = ["--train.eval-every", "1", "--train.keep-best", "--train.keep-last", "3"]
SWA = ["--average.kind", "swa", "--average.start", "0", "--average.every", "1"]


def trained(*options: str, resume: bool = False, interrupt: int = 0) -> None:
    """Train digits in the folder run."""
    config = apply_overrides(recipe("digits"), [*shlex.split(OPTIONS), *options])
    run = TinyRun(config, Path("run"), resume=resume, display=Display(Console(quiet=True)))
    if interrupt:
        run.interrupt_at(interrupt, signal.SIGTERM)
    train_run(run)


def stopped(*options: str) -> None:
    """A run that was stopped at its third step of four, and has checkpoints."""
    with pytest.raises(InterruptedRun):
        trained(*options, interrupt=3)


def command(line: str) -> Callable[[], None]:
    def run() -> None:
        assert main(shlex.split(line)) == 0

    return run


def generated() -> None:
    np.savez(
        "generated.npz",
        image=np.arange(3 * 48, dtype=np.uint8).reshape(3, 4, 4, 3),
        label=np.array([2, 0, 1]),
    )


@dataclass(frozen=True)
class Trial:
    """What is done before, what is watched, and what comes to its end afterwards."""

    before: Callable[[], object]
    act: Callable[[], object]
    again: Callable[[], object]
    made: str = ""
    """What appears as a whole, so that the command is not given again where it is there."""


EVAL = command("eval run --attacks pgd --max-samples 9")
COMPARE = command(
    "compare digits --objectives arat arat+swa --seeds 0 --out compared --train.eval-every 0 "
    + OPTIONS
)
EXPORTS = {f: command(f"export run --format {f} --out out") for f in ("hub", "torch-export")}
PREPARE = command("data prepare generated.npz out")
TRIALS = {
    "run": Trial(lambda: None, lambda: trained(*BEST), lambda: trained(*BEST, resume=True)),
    "resume": Trial(lambda: stopped(*SWA), *[lambda: trained(*SWA, resume=True)] * 2),
    "eval": Trial(lambda: trained(*BEST), EVAL, EVAL),
    "compare": Trial(lambda: None, COMPARE, COMPARE),
    **{f"export {f}": Trial(lambda: trained(*BEST), e, e, "out") for f, e in EXPORTS.items()},
    "prepare": Trial(generated, PREPARE, PREPARE, "out"),
}
EXHAUSTIVE = "EXHAUSTIVE" in os.environ
AMOUNTS = [("run", 46), ("prepare", 1)] + [
    pytest.param(
        name,
        1 if EXHAUSTIVE else 360 if name == "compare" else 18,
        marks=[pytest.mark.slow, pytest.mark.timeout(1800)],
    )
    for name in TRIALS
    if name != "prepare"
]
"""Each call, or one in so many."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each state is at the same path, which is in what the commands write."""
    root = tmp_path / "disk"
    root.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setenv("ARAT_FAST_TRACEBACK", "1")
    # They take longer than all else, and are made again whenever asked for.
    monkeypatch.setattr(arat_fast.report, "write_report", lambda run: run)
    monkeypatch.setattr(arat_fast.compare.command, "plane", lambda results: None)
    return root


@pytest.mark.parametrize(("name", "every"), AMOUNTS)
def test_crashes(name: str, every: int, place: Path) -> None:
    trial = TRIALS[name]
    trial.before()
    with Disk(place).watched() as disk:
        trial.act()
    expected = meaning(read_tree(place))
    states = {
        tuple(sorted(tree.items())): f"{mode} at {call}"
        for call, trees in zip(disk.calls, disk.crashes, strict=True)
        for mode, tree in trees.items()
    }
    failed = []
    for state, words in list(states.items())[::every]:
        put(place, dict(state))
        if problem := ends_well(trial, place, expected):
            failed.append(f"{words}: {problem}")
    assert not failed, f"{len(failed)} of {len(states)}:\n" + "\n".join(failed)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(errno.EIO, marks=pytest.mark.slow, id="EIO"),
        pytest.param(errno.ENOSPC, id="ENOSPC"),
    ],
)
@pytest.mark.parametrize(("name", "every"), AMOUNTS)
def test_errors(name: str, every: int, error: int, place: Path) -> None:
    trial = TRIALS[name]
    trial.before()
    start = read_tree(place)
    with Disk(place).watched() as disk:
        trial.act()
    expected = meaning(read_tree(place))
    failed = []
    for number, call in list(enumerate(disk.calls))[::every]:
        put(place, start)
        faulty = Disk(place, fail_at=number, error=error, stays=error == errno.ENOSPC)
        problem = ""
        try:
            with faulty.watched():
                trial.act()
        except OSError as said:
            problem = "" if said.filename or "cannot write" in str(said) else f"{said}; "
        except Exception as other:
            problem = f"{type(other).__name__}: {other}; "
        problem += ends_well(trial, place, expected)
        if problem:
            failed.append(f"{call}: {problem}")
    assert not failed, f"{len(failed)} of {len(disk.calls)}:\n" + "\n".join(failed)


def put(place: Path, tree: Tree) -> None:
    os.chdir(place.parent)
    shutil.rmtree(place)
    write_tree(place, tree)
    os.chdir(place)


def ends_well(trial: Trial, place: Path, expected: dict[str, Any]) -> str:
    """Give the command again; what is wrong with the end."""
    try:
        if not trial.made or not Path(trial.made).exists():
            trial.again()
        found = meaning(read_tree(place))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ", ".join(
        name for name in sorted({*expected, *found}) if expected.get(name, 0) != found.get(name, 0)
    )


def meaning(tree: Tree) -> dict[str, Any]:
    """What files hold, without times and the name of the run; beside parts of an evaluation and
    checkpoints before the newest, of which there may be fewer."""
    found = {
        name: _meaning(name, content)
        for name, content in tree.items()
        if ".partial" not in name and not name.endswith(".lock")
    }
    return {name: value for name, value in found.items() if "checkpoint-0" not in name}


def _meaning(name: str, content: bytes | None) -> Any:
    if content is None or name.endswith((".log", ".pt2", ".html", ".png")):
        return content is None
    if name.endswith(".pt"):
        return _numbers(load_checkpoint(Path(name)))
    if name.endswith(".safetensors"):
        return _numbers(dict(load(content)))
    if name.endswith(".npz"):
        with np.load(io.BytesIO(content)) as arrays:
            return {key: array.tobytes() for key, array in arrays.items()}
    if name.endswith(".jsonl"):
        return [_numbers(json.loads(line)) for line in content.splitlines()]
    return _numbers(json.loads(content)) if name.endswith(".json") else content


def _numbers(value: Any) -> dict[str, Any]:
    own = ("seconds", "seconds/train", "seconds/eval", "images_per_second", "/bytes", "/id", "/run")
    return {
        path: item.numpy().tobytes() if isinstance(item, torch.Tensor) else item
        for path, item in leaves(value).items()
        if not path.endswith(own)
    }
