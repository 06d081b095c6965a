"""The library examples of README and docs run as they are printed."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import torchvision
from tiny import tiny_config

from arat_fast.attacks import PGD
from arat_fast.config import ObjectiveConfig, config_from_dict
from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.models import convert_split_batch_norm
from arat_fast.objectives import ARAT, AdversarialTraining
from arat_fast.run.loop import Trainer
from arat_fast.training.step import TrainStep, make_train_step

README = Path(__file__).parent.parent / "README.md"
FILES = [README, *sorted((README.parent / "docs").glob("*.md"))]


def snippet(path: Path) -> str:
    """The only Python block of a file."""
    (found,) = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    return str(found)


def test_library_example() -> None:
    library = snippet(README)
    assert len(library.strip().splitlines()) <= 8
    generator = torch.Generator().manual_seed(0)
    loader = [
        (
            torch.rand(4, 3, 32, 32, generator=generator),
            torch.randint(10, (4,), generator=generator),
        )
    ]
    names = {
        "ARAT": ARAT,
        "PGD": PGD,
        "convert_split_batch_norm": convert_split_batch_norm,
        "device": "cpu",
        "loader": loader,
        "make_train_step": make_train_step,
        "torch": torch,
        "torchvision": torchvision,
    }
    exec(library, names)
    exec(snippet(README.parent / "docs" / "step.md"), names)
    step, metrics = names["step"], names["metrics"]
    assert isinstance(step, TrainStep) and isinstance(metrics, dict)
    assert step.folded_network is not None and step.num_calls == 1
    assert set(metrics) == {
        "loss",
        "ce_adv",
        "ce_clean",
        "invariance/layer4.1.bn1",
        "invariance/layer4.1.bn2",
        "accuracy_clean",
        "accuracy_adv",
    }
    assert metrics["loss"].isfinite()


def test_objective_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file as it is printed, started as a program, on fewer digits; then its folder is read."""
    (tmp_path / "pairing.py").write_text(snippet(README.parent / "docs" / "objectives.md"))
    monkeypatch.chdir(tmp_path)
    tiny = tiny_config(epochs=1)
    monkeypatch.setattr("arat_fast.recipes.recipe", lambda name: tiny)
    runpy.run_path("pairing.py", run_name="__main__")
    run = tmp_path / "runs" / "pairing"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["objective"] == "logit pairing"
    assert summary["accuracy"]["clean"]["num_samples"] == 40
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = next(line for line in lines if line["kind"] == "train")
    assert train["pairing"] > 0
    assert train["loss"] == pytest.approx(train["ce_adv"] + train["pairing"], rel=1e-6)
    config = config_from_dict(json.loads((run / "config.json").read_text())["config"])
    assert config.attack.num_steps == 7 and config.objective.name == "custom"
    assert "logit pairing" in (run / "report.html").read_text()
    record = evaluate_checkpoint(run, attacks=["pgd"], max_samples=40, device="cpu")
    assert record["accuracy"]["clean"]["value"] == summary["accuracy"]["clean"]["value"]
    # Again: the run is finished, and nothing is trained.
    before = (run / "checkpoint.pt").stat().st_mtime_ns
    runpy.run_path("pairing.py", run_name="__main__")
    assert (run / "checkpoint.pt").stat().st_mtime_ns == before


def test_an_objective_of_your_own_and_its_name_go_together(tmp_path: Path) -> None:
    custom = dataclasses.replace(tiny_config(), objective=ObjectiveConfig("custom"))
    with pytest.raises(ValueError, match="objective.name=custom and no objective of your own"):
        Trainer(custom, tmp_path / "a")
    with pytest.raises(ValueError, match="objective.name=arat and an objective of your own"):
        Trainer(tiny_config(), tmp_path / "b", objective=lambda model: AdversarialTraining())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
