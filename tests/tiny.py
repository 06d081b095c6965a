"""A run on a few digits that takes about a second, for tests of everything around the training."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from arat_fast.cli import main
from arat_fast.config import Config
from arat_fast.display import Display
from arat_fast.objectives import objective_type
from arat_fast.recipes import recipe
from arat_fast.run import loop
from arat_fast.run.hooks import Hook
from arat_fast.run.state import Run
from arat_fast.training.checkpoint import load_checkpoint

# 1,378 of the 1,437 training images are held out: 59 are left, 4 batches of 16.
OPTIONS = shlex.split(
    "--data.num-val 1378 --data.batch-size 16 --attack.num-steps 1 --train.log-every 3 "
    "--train.device cpu --eval.num-steps 1 --eval.no-autoattack --eval.max-samples 40"
)


def tiny_config(epochs: int = 4, **average: object) -> Config:
    """The digits recipe on 59 images, PGD-1, no AutoAttack; keywords change the averaging."""
    config = recipe("digits")
    return dataclasses.replace(
        config,
        attack=dataclasses.replace(config.attack, num_steps=1),
        average=dataclasses.replace(config.average, **average),  # type: ignore[arg-type]
        data=dataclasses.replace(config.data, num_val=1378, batch_size=16, padding=1),
        train=dataclasses.replace(
            config.train, epochs=epochs, eval_every=2, log_every=3, device="cpu"
        ),
        eval=dataclasses.replace(config.eval, num_steps=1, autoattack=False, max_samples=40),
    )


def changed(config: Config, section: str, **values: object) -> Config:
    """The configuration with other values in one section."""
    part = dataclasses.replace(getattr(config, section), **values)  # type: ignore[type-var]
    return dataclasses.replace(config, **{section: part})


def with_objective(config: Config, name: str, **settings: object) -> Config:
    """The configuration with another objective, at its defaults but for ``settings``."""
    return dataclasses.replace(config, objective=objective_type(name).Settings(name, **settings))


class TinyRun(Run):
    """A run that prints nothing and can be looked at before and after it is trained."""

    def run(self) -> dict[str, Any]:
        """Train to the end; the summary."""
        return loop.train_run(self)

    def at_step(self, number: int, act: Any) -> None:
        """Call ``act()`` in the step with that 1-based count, once it is computed."""
        step, calls = self.step.from_indices, 0

        def counting(*inputs: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            values = step(*inputs, **keywords)
            if calls == number:
                act()
            return values

        self.step.from_indices = counting  # type: ignore[method-assign]

    def interrupt_at(self, number: int, signal_number: int = signal.SIGINT) -> None:
        """Send the signal to this process during that step."""
        self.at_step(number, lambda: os.kill(os.getpid(), signal_number))


def tiny_trainer(
    out: Path,
    config: Config | None = None,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    console: Console | None = None,
) -> TinyRun:
    """A run of :func:`tiny_config`, built and not yet trained; it prints to ``console`` only."""
    display = Display(console or Console(quiet=True))
    return TinyRun(config or tiny_config(), out, resume=resume, display=display, hooks=hooks)


_POPEN = subprocess.Popen


def popen(arguments: Any, *values: Any, **keywords: Any) -> Any:
    """In the place of :class:`subprocess.Popen`: children of ``compare`` run in this process."""
    if arguments[1:3] == ["-m", "arat_fast"]:
        return _Ended(main(arguments[3:]))
    return _POPEN(arguments, *values, **keywords)


class _Ended:
    """A child that has ended."""

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None: ...

    def wait(self, timeout: float) -> None: ...


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a nested state by its path."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}/{key}").items()}


def assert_same_end(left: Path, right: Path, numbers: bool = True) -> None:
    """Both runs left the same tensors and, but for times, numbers, and export the same weights."""
    states = [leaves(load_checkpoint(run / "checkpoint.pt")) for run in (left, right)]
    if not numbers:
        states = [{k: v for k, v in s.items() if isinstance(v, Tensor)} for s in states]
    assert states[0].keys() == states[1].keys()
    assert sum(isinstance(value, Tensor) for value in states[0].values()) > 50
    for path, value in states[0].items():
        if isinstance(value, Tensor):
            assert torch.equal(value, states[1][path]), path
        elif not path.endswith(("seconds", "bytes", "/id")):
            assert value == states[1][path], path
    exported = [load_file(run / "model.safetensors") for run in (left, right)]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())


def metric_lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics, without its speed and its name."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "run")}
        for line in lines
        if line["kind"] == kind
    ]
