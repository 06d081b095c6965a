"""A run's numbers for TensorBoard, as a table, and for Weights & Biases, offline."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import changed, metric_lines, tiny_config, tiny_trainer


class Session:
    """What wandb.init gives, and what it was given."""

    def __init__(self, **options: Any) -> None:
        self.options, self.finished = options, False
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.slow
def test_every_logger_has_the_numbers_of_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[Session] = []
    wandb: Any = ModuleType("wandb")
    wandb.setup = lambda: SimpleNamespace(settings=SimpleNamespace(project=None))

    def init(**options: Any) -> Session:
        sessions.append(Session(**options))
        return sessions[-1]

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = changed(tiny_config(2), "train", loggers=("csv", "wandb"), eval_every=1, log_every=2)
    summary = tiny_trainer(tmp_path, config).run()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = metric_lines(tmp_path, "train")
    table = [row for row in rows if row["train/loss"]]
    assert [float(row["train/loss"]) for row in table] == [line["loss"] for line in lines]
    evaluated = [(row["step"], row["val/last/pgd"]) for row in rows if row["val/last/pgd"]]
    assert evaluated and evaluated[0][0] == "4"
    (session,) = sessions
    assert session.finished and session.options["id"] == summary["run"]
    assert session.options["config"]["train"]["loggers"] == ["csv", "wandb"]
    told = [(step, n["train/loss"]) for step, n in session.logged if "train/loss" in n]
    assert told == [(line["step"], line["loss"]) for line in lines]
    assert not (tmp_path / "tensorboard").exists()


def test_weights_and_biases_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        tiny_trainer(tmp_path, changed(tiny_config(1), "train", loggers=("wandb",)))
