"""How much Python one training step is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

from tiny import changed, tiny_config, tiny_trainer

import arat_fast
import arat_kernels

FOLDERS = tuple(str(Path(package.__file__).parent) for package in (arat_fast, arat_kernels))
MOST_CALLS = 640
"""Of this project's functions in a steady step of ARAT on the digits, ten steps of the attack and
what the loop does between two steps included."""


def test_calls_of_a_step(tmp_path: Path) -> None:
    calls: list[str] = []

    def count(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(FOLDERS):
            calls.append(f"{Path(code.co_filename).name}:{code.co_name}")

    run = tiny_trainer(tmp_path, changed(tiny_config(epochs=1), "attack", num_steps=10))
    # Where no line is logged and the average is there already.
    run.at_step(2, lambda: sys.setprofile(count))
    run.at_step(3, lambda: sys.setprofile(None))
    run.run()
    assert "step.py:method_step" in calls
    assert len(calls) <= MOST_CALLS, {name: calls.count(name) for name in sorted(set(calls))}
