"""Analyses during training: they change nothing, and find what the checkpoint gives again."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_config, tiny_trainer
from torch import Tensor

from arat_fast.analysis.run import AnalyzeSettings, analyze_networks
from arat_fast.analysis.snapshot import analyze_training, first_batches
from arat_fast.config import (
    AnalyzeConfig,
    Config,
    ObjectiveConfig,
    config_from_dict,
    config_to_dict,
)
from arat_fast.data.batches import Batch
from arat_fast.display import Display
from arat_fast.objectives import TRADES
from arat_fast.report.run import read_run
from arat_fast.run.loop import Trainer
from arat_fast.stop import InterruptedRun
from arat_fast.training import loop
from arat_fast.training.checkpoint import load_checkpoint


def analysed(every: int, epochs: int = 3, **average: object) -> Config:
    return dataclasses.replace(
        tiny_config(epochs, **average), analyze=AnalyzeConfig(every, num_batches=2)
    )


def analysis_lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "analysis"]


def tensors(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in tensors(item, f"{path}/{key}").items()}
    return {path: value}


def assert_same_state(left: Path, right: Path) -> None:
    states = [tensors(load_checkpoint(run / "checkpoint.pt")) for run in (left, right)]
    differing = ("/train_seconds", "/metrics_bytes", "/config/analyze")
    compared = 0
    for path, value in states[0].items():
        if path.startswith(differing):
            continue
        if isinstance(value, Tensor):
            assert torch.equal(value, states[1][path]), path
            compared += 1
        else:
            assert value == states[1][path], path
    assert compared > 50
    exported = [load_file(run / "model.safetensors") for run in (left, right)]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One run without analyses, one with."""
    folder = tmp_path_factory.mktemp("runs")
    for name, every in (("without", 0), ("with", 1)):
        tiny_trainer(folder / name, analysed(every)).run()
    return folder / "without", folder / "with"


def test_weights_are_the_same_bit_for_bit(runs: tuple[Path, Path]) -> None:
    without, with_analyses = runs
    assert not analysis_lines(without)
    assert [line["epoch"] for line in analysis_lines(with_analyses)] == [0, 1, 2, 3]
    assert_same_state(without, with_analyses)


@pytest.mark.parametrize("steps", [2, 8])
def test_the_same_when_interrupted_and_resumed(
    runs: tuple[Path, Path], tmp_path: Path, steps: int
) -> None:
    without, with_analyses = runs
    trainer = tiny_trainer(tmp_path, analysed(1))
    step, calls = trainer.train_step.from_indices, 0

    def counting(index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return step(index, draws)

    trainer.train_step.from_indices = counting  # type: ignore[method-assign]
    with pytest.raises(InterruptedRun):
        trainer.run()
    tiny_trainer(tmp_path, analysed(1), resume=True).run()
    assert_same_state(without, tmp_path)
    assert analysis_lines(tmp_path) == analysis_lines(with_analyses)


def test_a_finished_run_keeps_its_last_line(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    before = (run / "metrics.jsonl").read_bytes()
    tiny_trainer(run, analysed(1), resume=True).run()
    assert (run / "metrics.jsonl").read_bytes() == before
    # Evaluated in another way, it writes that line again.
    config = analysed(1)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, max_samples=30))
    tiny_trainer(run, config, resume=True).run()
    assert (run / "metrics.jsonl").read_bytes() == before


def test_switched_on_in_the_middle(runs: tuple[Path, Path], tmp_path: Path) -> None:
    without, with_analyses = runs
    trainer = tiny_trainer(tmp_path, analysed(0))
    step, calls = trainer.train_step.from_indices, 0

    def counting(index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(index, draws)

    trainer.train_step.from_indices = counting  # type: ignore[method-assign]
    with pytest.raises(InterruptedRun):
        trainer.run()
    tiny_trainer(tmp_path, analysed(2), resume=True).run()
    assert_same_state(without, tmp_path)
    wanted = [line for line in analysis_lines(with_analyses) if line["epoch"] in (2, 3)]
    assert analysis_lines(tmp_path) == wanted


def test_checkpoint_gives_the_last_line_again(runs: tuple[Path, Path]) -> None:
    _, run = runs
    settings = AnalyzeSettings(("gradient-conflict", "mixture"), num_batches=2, device="cpu")
    (analysis,) = analyze_networks([run], settings)
    last = analysis_lines(run)[-1]
    for part, key in (("gradient-conflict", "gradient_conflict"), ("mixture", "mixture")):
        written = json.loads((run / "analysis" / f"{part}.json").read_text())
        assert last[key].items() <= written.items()
        assert written["epoch"] == 3
    assert not analysis.left_out


@pytest.mark.parametrize("official", [False, True])
def test_no_global_state_moves(tmp_path: Path, official: bool) -> None:
    config = analysed(0)
    if official:
        config = dataclasses.replace(
            config,
            attack=dataclasses.replace(config.attack, bn="batch_update"),
            step=dataclasses.replace(config.step, noisy_clean=True),
        )
    trainer = tiny_trainer(tmp_path, config)
    trainer.model.eval()
    modules = [trainer.model, trainer.objective]
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in modules]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    batches = list(first_batches(trainer.data.train, 2))
    first = analyze_training(config, trainer.model, trainer.objective, batches)
    again = analyze_training(config, trainer.model, trainer.objective, batches)
    assert first == again
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    for module, old in zip(modules, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
    assert not trainer.model.training


def test_of_a_batch_in_parts_the_first_part(tmp_path: Path) -> None:
    config = analysed(0)
    parts = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=3))
    trainer = tiny_trainer(tmp_path, config)
    (x, y), *_ = first_batches(trainer.data.train, 1)
    assert len(x) == 64
    seen: list[int] = []
    trainer.model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    found = analyze_training(parts, trainer.model, trainer.objective, [Batch(x, y)])
    assert max(seen) == 2 * 22
    whole = analyze_training(config, trainer.model, trainer.objective, [Batch(x[:22], y[:22])])
    assert found == whole


def test_an_analysis_that_does_not_fit_is_left_out(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(loop, "analyze_training", too_large)
    trainer = tiny_trainer(tmp_path, analysed(1))
    said: list[str] = []
    monkeypatch.setattr(trainer.display, "say", said.append)
    trainer.run()
    assert_same_state(runs[0], tmp_path)
    lines = analysis_lines(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert line["left_out"] == "CUDA out of memory"
        assert line["gradient_conflict"] is None and line["mixture"] is None
    assert sum("CUDA out of memory" in text for text in said) == 1
    assert read_run(tmp_path).analyses


def test_other_errors_of_an_analysis_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(loop, "analyze_training", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        tiny_trainer(tmp_path, analysed(1)).run()


def test_swa_that_is_evaluated_again_has_one_last_line(tmp_path: Path) -> None:
    config = analysed(3, kind="swa")
    tiny_trainer(tmp_path, config).run()
    (tmp_path / "summary.json").unlink()
    tiny_trainer(tmp_path, config, resume=True).run()
    assert [line["epoch"] for line in analysis_lines(tmp_path)] == [0, 3]


def test_other_objectives(tmp_path: Path) -> None:
    config = analysed(1, epochs=1)
    for name, has_conflict, has_mixture in (
        ("trades", True, True),
        ("arrest", True, True),
        ("lbgat", False, True),
        ("at", False, True),
        ("natural", False, False),
    ):
        objective = dataclasses.replace(config.objective, name=name)
        tiny_trainer(tmp_path / name, dataclasses.replace(config, objective=objective)).run()
        for line in analysis_lines(tmp_path / name):
            assert (line["gradient_conflict"] is not None) == has_conflict
            assert (line["mixture"] is not None) == has_mixture
    settings = AnalyzeSettings(("gradient-conflict", "mixture"), device="cpu")
    (analysis,) = analyze_networks([tmp_path / "natural"], settings)
    assert set(analysis.left_out) == {"gradient-conflict", "mixture"}
    assert not analysis.records
    (analysis,) = analyze_networks([tmp_path / "lbgat"], settings)
    assert set(analysis.records) == {"mixture"}
    assert analysis.left_out == {
        "gradient-conflict": "the labels of lbgat reach its guide alone, and not the network"
    }


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    config = analysed(1, epochs=1)
    config = dataclasses.replace(config, objective=ObjectiveConfig("custom"))
    Trainer(
        config,
        tmp_path,
        display=Display(Console(quiet=True)),
        objective=lambda model: TRADES(3.0),
    ).run()
    assert all(line["gradient_conflict"] for line in analysis_lines(tmp_path))
    settings = AnalyzeSettings(
        ("gradient-conflict", "mixture", "surface"), num_surfaces=1, points=3, device="cpu"
    )
    (analysis,) = analyze_networks([tmp_path], settings)
    assert set(analysis.records) == {"surface"}
    assert set(analysis.left_out) == {"gradient-conflict", "mixture"}
    assert "given to the trainer in Python" in analysis.left_out["mixture"]


def test_configurations_from_before(tmp_path: Path) -> None:
    values = config_to_dict(tiny_config())
    del values["analyze"]
    assert config_from_dict(values) == tiny_config()


@pytest.mark.parametrize(("field", "value"), [("every", -1), ("num_batches", 0)])
def test_configuration_is_checked(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"analyze.{field} must be"):
        AnalyzeConfig(**{field: value})


def test_no_batch_is_an_error(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="at least one batch"):
        analyze_training(trainer.config, trainer.model, trainer.objective, [])
