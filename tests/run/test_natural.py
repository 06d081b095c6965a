"""Runs with a second network: LBGAT's guide, ARREST's natural network, trained first or given."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import assert_same_end, changed, metric_lines, tiny_config, tiny_trainer, with_objective

from arat_fast.config import Config, config_from_dict, config_to_dict
from arat_fast.objectives import ARREST, LBGAT
from arat_fast.run.hooks import Hook
from arat_fast.run.state import Run
from arat_fast.stop import InterruptedRun
from arat_fast.training.checkpoint import load_checkpoint


def config_for(name: str, epochs: int = 2, **settings: Any) -> Config:
    return with_objective(tiny_config(epochs, kind="ema", start=0.0, every=2), name, **settings)


@pytest.fixture(scope="module")
def arrest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains its natural network first."""
    out = tmp_path_factory.mktemp("arrest") / "run"
    tiny_trainer(out, config_for("arrest", teacher_epochs=1)).run()
    return out


def test_the_natural_network_is_told_to_compare_with(tmp_path: Path) -> None:
    text = io.StringIO()
    config = config_for("arrest", teacher_epochs=1)
    tiny_trainer(tmp_path / "run", config, console=Console(file=text)).run()
    _, found, rest = text.getvalue().partition("the natural network, to compare with:\n")
    assert found and rest.startswith("clean ")


def test_the_natural_run_is_a_run_of_its_own_and_is_counted(arrest: Path) -> None:
    summary, natural = (
        json.loads((folder / "summary.json").read_text()) for folder in (arrest, arrest / "natural")
    )
    assert natural["objective"] == "natural" and natural["epochs"] == 1
    assert natural["status"] == "finished" and "autoattack" not in natural["accuracy"]
    assert metric_lines(arrest / "natural", "eval") == []
    assert summary["epochs"] == 2
    assert summary["natural_model"] == {
        "source": "natural",
        "epochs": 1,
        "train_seconds": natural["wall_seconds"]["train"],
        "clean": natural["accuracy"]["clean"]["value"],
    }
    weights = load_file(arrest / "natural" / "model.safetensors")
    state = load_checkpoint(arrest / "checkpoint.pt")
    for name, tensor in weights.items():
        assert torch.equal(state["objective"][f"natural.{name}"], tensor), name
    assert not torch.equal(state["model"]["conv1.weight"], weights["conv1.weight"])


class AtTheStart(Hook):
    """Keeps the weights that training starts with."""

    def begin(self, run: Run) -> None:
        assert isinstance(run.objective, ARREST)
        networks = (run.model, run.objective.natural)
        self.states = [{k: v.clone() for k, v in net.state_dict().items()} for net in networks]


def test_a_given_teacher_makes_the_same_run(arrest: Path, tmp_path: Path) -> None:
    """The weights of a natural run in the place of natural training."""
    source = arrest / "natural" / "model.safetensors"
    given, hook = config_for("arrest", teacher=source), AtTheStart()
    summary = tiny_trainer(tmp_path, given, hooks=[hook]).run()
    assert not (tmp_path / "natural").exists()
    assert summary["natural_model"]["epochs"] == 1
    assert_same_end(arrest, tmp_path, numbers=False)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(given)))) == given
    weights = load_file(source)
    for state in hook.states:
        assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_natural_training_is_resumed(
    arrest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for("arrest", teacher_epochs=1)
    set_rate, calls = Run.set_rate, []

    def interrupting(run: Run) -> None:
        calls.append(run.out.name)
        if len(calls) == 2:
            run.stop.signal = signal.SIGTERM
        set_rate(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "set_rate", interrupting)
        with pytest.raises(InterruptedRun, match="step 2 of 4; .*natural"):
            tiny_trainer(tmp_path, config).run()
    assert set(calls) == {"natural"} and not (tmp_path / "checkpoint.pt").exists()
    with pytest.raises(FileExistsError, match="--resume"):
        tiny_trainer(tmp_path, config).run()
    tiny_trainer(tmp_path, config, resume=True).run()
    assert_same_end(arrest, tmp_path)


@pytest.mark.parametrize("name", ["lbgat", "arrest"])
def test_the_optimiser_has_the_parameters_that_are_trained_once(tmp_path: Path, name: str) -> None:
    settings = {"guide": "resnet18"} if name == "lbgat" else {}
    run = tiny_trainer(tmp_path, config_for(name, **settings))
    listed = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    wanted = [*run.model.parameters()]
    if isinstance(run.objective, LBGAT):
        assert run.objective.guide is not None
        assert "layer4.1.bn2" in dict(run.objective.guide.named_modules())
        wanted += run.objective.guide.parameters()
    assert sorted(listed) == sorted(map(id, wanted)) and len(set(listed)) == len(listed)


@pytest.mark.parametrize("name", [pytest.param("lbgat", marks=pytest.mark.slow), "arrest"])
def test_bf16_keeps_both_networks_in_float32(arrest: Path, tmp_path: Path, name: str) -> None:
    settings = {"teacher": arrest / "natural"} if name == "arrest" else {}
    config = changed(config_for(name, 1, **settings), "step", precision="bf16")
    run = tiny_trainer(tmp_path, config)
    assert run.run()["precision"] == "bfloat16"
    for module in (run.model, run.objective):
        floating = [t for t in module.state_dict().values() if t.is_floating_point()]
        assert all(tensor.dtype == torch.float32 for tensor in floating)


def test_bad_teachers(arrest: Path, tmp_path: Path) -> None:
    def refused(teacher: Path, match: str, **model: Any) -> None:
        config = changed(config_for("arrest", teacher=teacher), "model", **model)
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            tiny_trainer(tmp_path / "run", config).run()
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
        if (tmp_path / "run").exists():
            shutil.rmtree(tmp_path / "run")

    refused(tmp_path / "nowhere", "no weights at")
    refused(arrest, "was trained with arrest")
    refused(arrest / "natural", "does not fit", name="resnet18")
    refused(arrest / "natural", r"model\.norm", norm="split")


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("arrest", {"teacher_epochs": 0}, "teacher_epochs must be >= 1"),
        ("arrest", {"teacher_epochs": 3, "teacher": Path("x")}, "got both"),
        ("lbgat", {"guide": "resnet19"}, "unknown model 'resnet19'"),
        ("lbgat", {"guide": "clean-branch"}, r"model\.norm"),
    ],
)
def test_bad_settings(tmp_path: Path, name: str, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_trainer(tmp_path, changed(config_for(name, **settings), "model", norm="shared"))
