"""Analyses during training: they change nothing, and find what the checkpoint gives again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tiny import assert_same_end, changed, metric_lines, tiny_config, tiny_trainer
from torch import nn

from arat_fast.analysis.run import AnalyzeSettings, analyze_networks
from arat_fast.analysis.snapshot import analyze_training
from arat_fast.config import AnalyzeConfig, Config
from arat_fast.data.batches import Batch
from arat_fast.objectives import TRADES
from arat_fast.report.run import read_run
from arat_fast.run import hooks
from arat_fast.stop import InterruptedRun


def analysed(every: int, epochs: int = 3, **average: object) -> Config:
    return dataclasses.replace(
        tiny_config(epochs, **average), analyze=AnalyzeConfig(every, num_batches=2)
    )


def analysis_lines(run: Path) -> list[dict[str, Any]]:
    return metric_lines(run, "analysis")


def assert_same_state(left: Path, right: Path) -> None:
    # The numbers of the state say how often the run was analysed.
    assert_same_end(left, right, numbers=False)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "step"),
    [
        pytest.param(1, 1, 2, marks=pytest.mark.slow),
        (1, 1, 8),
        pytest.param(0, 2, 5, marks=pytest.mark.slow),
    ],
)
def test_the_same_when_interrupted_and_resumed(
    runs: tuple[Path, Path], tmp_path: Path, first: int, second: int, step: int
) -> None:
    without, with_analyses = runs
    interrupted = tiny_trainer(tmp_path, analysed(first))
    interrupted.interrupt_at(step)
    with pytest.raises(InterruptedRun):
        interrupted.run()
    tiny_trainer(tmp_path, analysed(second), resume=True).run()
    assert_same_state(without, tmp_path)
    # Switched on in the second epoch, there are those after it.
    epochs = {(1, 1): (0, 1, 2, 3), (0, 2): (2, 3)}[first, second]
    wanted = [line for line in analysis_lines(with_analyses) if line["epoch"] in epochs]
    assert analysis_lines(tmp_path) == wanted


def test_a_finished_run_keeps_its_last_line(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder)
    before = (folder / "metrics.jsonl").read_bytes()
    tiny_trainer(folder, analysed(1), resume=True).run()
    assert (folder / "metrics.jsonl").read_bytes() == before
    # Evaluated in another way, it writes that line again.
    tiny_trainer(folder, changed(analysed(1), "eval", max_samples=30), resume=True).run()
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_checkpoint_gives_the_last_line_again(runs: tuple[Path, Path]) -> None:
    folder = runs[1]
    settings = AnalyzeSettings(("gradient-conflict", "mixture"), num_batches=2, device="cpu")
    (analysis,) = analyze_networks([folder], settings)
    last = analysis_lines(folder)[-1]
    for part, key in (("gradient-conflict", "gradient_conflict"), ("mixture", "mixture")):
        written = json.loads((folder / "analysis" / f"{part}.json").read_text())
        assert last[key].items() <= written.items()
        assert written["epoch"] == 3
    assert not analysis.left_out


@pytest.mark.parametrize("official", [False, True])
def test_no_global_state_moves(tmp_path: Path, official: bool) -> None:
    config = analysed(0)
    if official:
        config = changed(changed(config, "attack", bn="batch_update"), "step", noisy_clean=True)
    this = tiny_trainer(tmp_path, config)
    this.model.eval()
    modules = nn.ModuleList([this.model, this.objective])

    def state() -> tuple[Any, ...]:
        tensors = [value.clone() for value in modules.state_dict().values()]
        return *tensors, torch.get_rng_state(), random.getstate()[1], np.random.get_state()[1]

    before = state()
    batches = list(itertools.islice(this.data.train.epoch(0), 2))
    first = analyze_training(config, this.model, this.objective, batches)
    assert analyze_training(config, this.model, this.objective, batches) == first
    assert all(np.array_equal(x, y) for x, y in zip(before, state(), strict=True))
    assert not this.model.training and all(p.grad is None for p in modules.parameters())
    with pytest.raises(ValueError, match="batch"):
        analyze_training(config, this.model, this.objective, [])


def test_of_a_batch_in_parts_the_first_part(tmp_path: Path) -> None:
    config = analysed(0)
    parts = changed(config, "train", accumulate=3)
    this = tiny_trainer(tmp_path, config)
    (x, y), *_ = this.data.train.epoch(0)
    assert len(x) == 16
    seen: list[int] = []
    this.model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    found = analyze_training(parts, this.model, this.objective, [Batch(x, y)])
    assert max(seen) == 2 * 6
    whole = analyze_training(config, this.model, this.objective, [Batch(x[:6], y[:6])])
    assert found == whole


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("CUDA out of memory. Tried to"), "CUDA out"), (RuntimeError(), None)],
)
def test_an_analysis_that_does_not_fit_is_left_out(
    runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str | None,
) -> None:
    monkeypatch.setattr(hooks, "analyze_training", Mock(side_effect=error))
    this = tiny_trainer(tmp_path, analysed(1))
    if reason is None:
        with pytest.raises(RuntimeError):
            this.run()
        return
    this.run()
    assert_same_state(runs[0], tmp_path)
    lines = analysis_lines(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert all(reason in line["left_out"] for line in lines)
    assert {line[key] for line in lines for key in ("gradient_conflict", "mixture")} == {None}
    assert len(read_run(tmp_path).training_analyses) == 4


@pytest.mark.slow
def test_swa_that_is_evaluated_again_has_one_last_line(tmp_path: Path) -> None:
    config = analysed(3, kind="swa")
    tiny_trainer(tmp_path, config).run()
    (tmp_path / "summary.json").unlink()
    tiny_trainer(tmp_path, config, resume=True).run()
    assert [line["epoch"] for line in analysis_lines(tmp_path)] == [0, 3]


class OwnObjective(TRADES):
    """An objective that is not built in."""


@pytest.mark.parametrize(
    ("name", "has_conflict", "has_mixture"),
    [
        pytest.param("lbgat", False, True, marks=pytest.mark.slow),
        ("natural", False, False),
        (f"{__name__}:OwnObjective", True, True),
    ],
)
def test_other_objectives(tmp_path: Path, name: str, has_conflict: bool, has_mixture: bool) -> None:
    tiny_trainer(tmp_path, analysed(1, epochs=1).with_objective(name)).run()
    for line in analysis_lines(tmp_path):
        assert (line["gradient_conflict"] is not None) == has_conflict
        assert (line["mixture"] is not None) == has_mixture
    settings = AnalyzeSettings(("gradient-conflict", "mixture"), device="cpu")
    (analysis,) = analyze_networks([tmp_path], settings)
    found = {"gradient-conflict": has_conflict, "mixture": has_mixture}
    assert set(analysis.records) == {part for part, is_there in found.items() if is_there}
    assert set(analysis.left_out) == {part for part, is_there in found.items() if not is_there}


@pytest.mark.parametrize(("field", "value"), [("every", -1), ("num_batches", 0)])
def test_configuration_is_checked(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"analyze.{field}"):
        AnalyzeConfig(**{field: value})
