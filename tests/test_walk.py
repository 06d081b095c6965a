"""How far one steady training step wanders through the project's own functions."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import changed

import arat_fast
import arat_kernels
from arat_fast.display import Display
from arat_fast.recipes import recipe
from arat_fast.run.loop import train_epoch
from arat_fast.run.state import Run
from arat_fast.training.step import TrainStep
from arat_kernels import forks

PACKAGES = tuple(str(Path(p.__file__).parent) for p in (arat_fast, arat_kernels) if p.__file__)


class Walk:
    """Records calls from one steady call of the step to the next."""

    def __init__(self, skipped: int) -> None:
        self.steps_to_come = skipped
        self.calls: list[tuple[str, str]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGES):
            return
        if code is TrainStep.from_indices.__code__:
            self.steps_to_come -= 1
        if self.steps_to_come == 0:
            self.calls.append((code.co_filename, code.co_name))


def test_walk_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the calls and half of the changes of file that there once were: 1,417 and 679."""
    # As in a process in which no kernel was launched; other tests may have recorded some.
    monkeypatch.setattr(forks, "made", False)
    torch.set_num_threads(1)
    config = changed(recipe("digits"), "data", num_val=1117)
    run = Run(config, tmp_path / "run", display=Display(Console(quiet=True)))
    walk = Walk(skipped=4)
    with run.display.training(run.total_steps, 0, "arat") as run.bar:
        for hook in run.hooks:
            hook.begin(run)
        run.objective.start_epoch(0.1)
        sys.setprofile(walk)
        try:
            train_epoch(run, 0, 0)
        finally:
            sys.setprofile(None)
    files = [file for file, _ in walk.calls]
    changes = sum(a != b for a, b in pairwise(files))
    print(len(set(walk.calls)), len(set(files)), len(walk.calls), changes)
    assert len(walk.calls) <= 460
    assert changes <= 339
