"""Runs with a second network: LBGAT's guide, ARREST's natural network, trained first or given."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_trainer
from torch import Tensor

from arat_fast.config import Config, ObjectiveConfig, config_from_dict, config_to_dict
from arat_fast.models import create_model
from arat_fast.objectives import ARREST, LBGAT
from arat_fast.report import write_report
from arat_fast.run.loop import Trainer
from arat_fast.stop import InterruptedRun
from arat_fast.training.checkpoint import load_checkpoint


def config_for(epochs: int = 2, kind: str = "ema", **options: Any) -> Config:
    config = tiny_config(epochs=epochs, kind=kind, start=0.0, every=2)
    return dataclasses.replace(config, objective=ObjectiveConfig(**options))


def interrupt_after(trainer: Trainer, steps: int) -> None:
    step = trainer.train_step.from_indices
    calls = 0

    def counting(index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return step(index, draws)

    trainer.train_step.from_indices = counting  # type: ignore[method-assign]


def tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = dict(enumerate(value)).items()
    else:
        return {path: value} if isinstance(value, Tensor) else {}
    return {k: v for key, item in pairs for k, v in tensors(item, f"{path}/{key}").items()}


def assert_same_end(left: Path, right: Path) -> None:
    states = [tensors(load_checkpoint(run / "checkpoint.pt")) for run in (left, right)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 50
    assert [n for n, value in states[0].items() if not torch.equal(value, states[1][n])] == []
    exported = [load_file(run / "model.safetensors") for run in (left, right)]
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())


RUNS = {
    "lbgat": {"name": "lbgat"},
    "lbgat6": {"name": "lbgat", "alpha": 6.0},
    "own": {"name": "lbgat", "guide": "clean-branch"},
    "arrest": {"name": "arrest", "teacher_epochs": 1},
}


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_equals_uninterrupted(tmp_path: Path, name: str, kind: str) -> None:
    config = config_for(kind=kind, **RUNS[name])
    tiny_trainer(tmp_path / "whole", config).run()
    trainer = tiny_trainer(tmp_path / "cut", config)
    interrupt_after(trainer, 6)
    with pytest.raises(InterruptedRun, match="step 6 of 8"):
        trainer.run()
    torch.rand(3)  # what else happens in the process must not matter
    tiny_trainer(tmp_path / "cut", config, resume=True).run()
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    # The deployed network alone, under its own names.
    expected = create_model("resnet8", 10, 1, norm="shared").state_dict()
    exported = load_file(tmp_path / "whole" / "model.safetensors")
    assert {n: t.shape for n, t in exported.items()} == {n: t.shape for n, t in expected.items()}


def test_the_optimiser_has_the_parameters_that_are_trained_once(tmp_path: Path) -> None:
    for name in ("lbgat", "arrest"):
        trainer = tiny_trainer(tmp_path / name, config_for(**RUNS[name]))
        listed = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
        wanted = [*trainer.model.parameters()]
        if isinstance(trainer.objective, LBGAT):
            assert trainer.objective.guide is not None
            wanted += trainer.objective.guide.parameters()
        assert sorted(listed) == sorted(map(id, wanted)) and len(set(listed)) == len(listed)


def test_the_guide_is_chosen_by_name(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", config_for(name="lbgat", guide="resnet18"))
    assert isinstance(trainer.objective, LBGAT) and trainer.objective.guide is not None
    names = dict(trainer.objective.guide.named_modules())
    assert "layer4.1.bn2" in names and "layer4" not in dict(trainer.model.named_modules())
    with pytest.raises(ValueError, match="unknown model 'resnet19', expected one of"):
        ObjectiveConfig("lbgat", guide="resnet19")


def test_the_natural_run_is_a_run_of_its_own_and_is_counted(tmp_path: Path) -> None:
    config = config_for(name="arrest", teacher_epochs=1)
    summary = tiny_trainer(tmp_path / "run", config).run()
    natural = json.loads((tmp_path / "run" / "natural" / "summary.json").read_text())
    assert natural["objective"] == "natural" and natural["epochs"] == 1
    assert natural["status"] == "finished" and "autoattack" not in natural["accuracy"]
    assert summary["epochs"] == 2
    assert summary["natural_model"] == {
        "source": "natural",
        "epochs": 1,
        "train_seconds": natural["wall_seconds"]["train"],
        "clean": natural["accuracy"]["clean"]["value"],
    }
    report = write_report(tmp_path / "run").read_text()
    assert "trained for 2 epochs, after 1 of natural training, on" in report
    assert "Natural training before" in report
    weights = load_file(tmp_path / "run" / "natural" / "model.safetensors")
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    for name, tensor in weights.items():
        assert torch.equal(state["objective"][f"natural.{name}"], tensor), name
    assert not torch.equal(state["model"]["conv1.weight"], weights["conv1.weight"])


def test_a_given_teacher_makes_the_same_run(tmp_path: Path) -> None:
    """A natural run's folder, or its weights, in the place of natural training."""
    own = config_for(name="arrest", teacher_epochs=1)
    tiny_trainer(tmp_path / "own", own).run()
    folder = tmp_path / "own" / "natural"
    for source in (folder, folder / "model.safetensors"):
        out = tmp_path / source.name
        given = config_for(name="arrest", teacher=source)
        summary = tiny_trainer(out, given).run()
        assert not (out / "natural").exists() or out == folder
        assert summary["natural_model"]["epochs"] == 1
        assert_same_end(tmp_path / "own", out)
        assert config_from_dict(config_to_dict(given)) == given


def test_the_network_starts_with_the_natural_weights(tmp_path: Path) -> None:
    natural = tmp_path / "own"
    tiny_trainer(natural, config_for(1, name="natural")).run()
    trainer = tiny_trainer(tmp_path / "run", config_for(name="arrest", teacher=natural))
    assert isinstance(trainer.objective, ARREST)
    weights = load_file(natural / "model.safetensors")
    for network in (trainer.model, trainer.objective.natural):
        state = network.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_natural_training_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(name="arrest", teacher_epochs=2)
    tiny_trainer(tmp_path / "whole", config).run()
    trainer = tiny_trainer(tmp_path / "cut", config)
    original = Trainer.run

    def interrupted(self: Trainer) -> dict[str, Any]:
        if self.out.name == "natural":
            interrupt_after(self, 5)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", interrupted)
        with pytest.raises(InterruptedRun, match=r"step 5 of 8; .*natural.*--resume"):
            trainer.run()
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()
    with pytest.raises(FileExistsError, match="natural holds a run already; add --resume"):
        tiny_trainer(tmp_path / "cut", config).run()
    tiny_trainer(tmp_path / "cut", config, resume=True).run()
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("name", ["lbgat", "arrest"])
def test_bf16(tmp_path: Path, name: str) -> None:
    config = config_for(1, **RUNS[name])
    config = dataclasses.replace(config, step=dataclasses.replace(config.step, precision="bf16"))
    trainer = tiny_trainer(tmp_path / "run", config)
    summary = trainer.run()
    assert summary["precision"] == "bfloat16" and summary["status"] == "finished"
    assert all(
        tensor.dtype == torch.float32
        for module in (trainer.model, trainer.objective)
        for tensor in module.state_dict().values()
        if tensor.is_floating_point()
    )


def test_bad_teachers(tmp_path: Path) -> None:
    def message(teacher: Path, **changes: Any) -> str:
        config = config_for(name="arrest", teacher=teacher)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            tiny_trainer(tmp_path / "run", dataclasses.replace(config, **changes))
        assert not (tmp_path / "run").exists() and "\n" not in str(error.value)
        return str(error.value)

    assert "no weights at" in message(tmp_path / "nowhere")
    tiny_trainer(tmp_path / "at", config_for(1, name="at")).run()
    assert "was trained with at, expected a naturally trained model" in message(tmp_path / "at")
    tiny_trainer(tmp_path / "ok", config_for(1, name="natural")).run()
    other = dataclasses.replace(config_for().model, name="resnet18")
    assert "does not fit the network" in message(tmp_path / "ok", model=other)
    split = dataclasses.replace(config_for().model, norm="split")
    assert "leave --model.norm out" in message(tmp_path / "ok", model=split)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_epochs": 0}, "teacher_epochs must be >= 1, got 0"),
        ({"teacher_epochs": 3, "teacher": Path("x")}, "got both: leave one out"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig("arrest", **options)


def test_a_clean_branch_needs_split_batch_norm(tmp_path: Path) -> None:
    config = config_for(name="lbgat", guide="clean-branch")
    assert config.norm == "split"
    shared = dataclasses.replace(config, model=dataclasses.replace(config.model, norm="shared"))
    with pytest.raises(ValueError, match=r"needs split BatchNorm, got model\.norm=shared"):
        tiny_trainer(tmp_path / "run", shared)
