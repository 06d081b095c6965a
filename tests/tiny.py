"""A run on a few digits that takes about a second, for tests of everything around the training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from arat_fast.config import Config
from arat_fast.display import Display
from arat_fast.recipes import recipe
from arat_fast.run.loop import Trainer

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


def tiny_trainer(out: Path, config: Config | None = None, resume: bool = False) -> Trainer:
    """A trainer of :func:`tiny_config` that prints nothing."""
    return Trainer(
        config or tiny_config(), out, resume=resume, display=Display(Console(quiet=True))
    )
