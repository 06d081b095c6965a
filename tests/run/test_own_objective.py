"""An objective of one's own, named by its import path, and how names are looked up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import assert_same_end, tiny_config, tiny_trainer, with_objective

from arat_fast.config import config_from_dict, config_to_dict
from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.objectives import OBJECTIVES, objective_type
from arat_fast.objectives.registry import objective_label
from arat_fast.stop import InterruptedRun
from arat_fast.training.checkpoint import load_checkpoint

MODULE = '''
from dataclasses import dataclass
import torch, torch.nn.functional as F
from arat_fast import objectives
from arat_fast.models import use_branch
from arat_fast.objectives import Objective, ObjectiveOutput
from arat_fast.settings import Weight

class Smooth(Objective):
    """Adversarial training with noise of its own and a moving temperature."""

    @dataclass(frozen=True)
    class Settings(objectives.Settings):
        smoothing: Weight = 0.1

    def __init__(self, smoothing=0.1):
        super().__init__()
        self.smoothing = smoothing
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.register_buffer("epochs", torch.tensor(0.0))

    def start_epoch(self, clean_accuracy, probe=None):
        self.epochs += 1

    def forward(self, model, x, x_adv, y, start):
        noise = torch.randn(x.shape, generator=start.generator)
        with use_branch(model, "adv"):
            logits = model(x_adv + 0.01 * noise) * self.scale
        loss = F.cross_entropy(logits, y, label_smoothing=self.smoothing)
        return ObjectiveOutput(loss, {"ce_adv": loss}, None, logits)

nothing = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "mine_too.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    # The current folder is appended where an objective is looked for.
    monkeypatch.setattr("sys.path", [*sys.path])
    yield "mine_too"
    sys.modules.pop("mine_too", None)


def test_it_is_trained_resumed_and_evaluated(module: str, tmp_path: Path) -> None:
    config = with_objective(tiny_config(2), f"{module}:Smooth", smoothing=0.2)
    assert config.norm == "shared" and config_from_dict(config_to_dict(config)) == config
    assert objective_type(config.objective.name).label == "Smooth"
    tiny_trainer(tmp_path / "whole", config).run()
    run = tiny_trainer(tmp_path / "cut", config)
    run.interrupt_at(6)
    with pytest.raises(InterruptedRun):
        run.run()
    resumed = tiny_trainer(tmp_path / "cut", config, resume=True)
    summary = resumed.run()
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    state = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["objective"]
    assert float(state["epochs"]) == 2 and float(state["scale"]) != 1
    assert summary["objective"] == "mine_too:Smooth"
    record = evaluate_checkpoint(tmp_path / "cut", attacks=(), device="cpu", max_samples=40)
    assert record["accuracy"]["clean"]["value"] == summary["accuracy"]["clean"]["value"]
    with pytest.raises(ValueError, match=r"smoothing must be >= 0"):
        with_objective(config, config.objective.name, smoothing=-1.0)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("trade", r"did you mean trades\?"),
        ("nosuchmodule:X", "cannot be imported"),
        ("mine_too:Absent", "cannot be imported"),
        ("mine_too:nothing", "no subclass"),
        ("pathlib:Path", "no subclass"),
    ],
)
def test_names_of_nothing(module: str, name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        objective_type(name)
    assert objective_label(name) == name.rpartition(":")[2]


def test_the_built_in_ones_are_found_with_what_they_declare() -> None:
    assert set(OBJECTIVES) >= {"arat", "at", "natural", "trades", "mart", "lbgat", "arrest"}
    for name, kind in OBJECTIVES.items():
        assert kind.name == name and kind.label and kind.Settings(name).name == name
        assert kind.paper is not None or name == "natural"
    assert torch.nn.Module in objective_type("arat").__mro__
