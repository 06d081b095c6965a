"""A run on a few digits that takes about a second, for tests of everything around the training."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from arat_fast.config import Config
from arat_fast.display import Display
from arat_fast.objectives import objective_type
from arat_fast.recipes import recipe
from arat_fast.run import loop
from arat_fast.run.hooks import Hook
from arat_fast.run.state import Run

# 1,200 of the 1,437 training images are held out: 237 are left, 4 batches of 64.
OPTIONS = [
    "--data.num-val",
    "1200",
    "--attack.num-steps",
    "1",
    "--train.log-every",
    "3",
    "--eval.num-steps",
    "1",
    "--eval.no-autoattack",
    "--eval.max-samples",
    "40",
    "--train.device",
    "cpu",
]


def tiny_config(epochs: int = 4, **average: object) -> Config:
    """The digits recipe on 237 images, PGD-1, no AutoAttack; keywords change the averaging."""
    config = recipe("digits")
    return dataclasses.replace(
        config,
        attack=dataclasses.replace(config.attack, num_steps=1),
        average=dataclasses.replace(config.average, **average),  # type: ignore[arg-type]
        data=dataclasses.replace(config.data, num_val=1200, padding=1),
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
        built = [self]

        def build(*arguments: Any, **keywords: Any) -> Run:
            return built.pop() if built else Run(*arguments, **keywords)

        with mock.patch.object(loop, "Run", build):
            return loop.train(self.config, self.out, resume=self.resume, display=self.display)

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
    out: Path, config: Config | None = None, resume: bool = False, hooks: Sequence[Hook] = ()
) -> TinyRun:
    """A run of :func:`tiny_config`, built and not yet trained."""
    quiet = Display(Console(quiet=True))
    return TinyRun(config or tiny_config(), out, resume=resume, display=quiet, hooks=hooks)
