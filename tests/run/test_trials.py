"""Runs of few steps or few images: where they end, what their records say, how they go on."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import assert_same_end, changed, metric_lines, tiny_config, tiny_trainer

from arat_fast.config import DataConfig, ScheduleConfig
from arat_fast.data import load_data
from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.training.schedule import learning_rate


@pytest.mark.slow
def test_a_run_ends_within_an_epoch_and_goes_on(tmp_path: Path) -> None:
    """With more steps the weights are those of a run that was never limited."""
    config = changed(tiny_config(2), "train", epochs=2, eval_every=0, device="cpu", log_every=3)
    console = Console(file=io.StringIO(), width=200)
    few = changed(config, "train", max_steps=5)
    short = tiny_trainer(tmp_path / "a", few, console=console).run()
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "\nepoch 2/2 " in shown
    assert (short["steps"], short["epochs"], short["max_steps"]) == (5, 5 / 4, 5)
    assert "limit" not in short
    assert metric_lines(tmp_path / "a", "train")[-1]["step"] == 5
    found = evaluate_checkpoint(tmp_path / "a", attacks=(), device="cpu", max_samples=9)
    assert "interrupted" not in found
    tiny_trainer(tmp_path / "a", config, resume=True).run()
    whole = tiny_trainer(tmp_path / "b", config).run()
    assert whole["steps"] == 8 and "max_steps" not in whole
    assert_same_end(tmp_path / "a", tmp_path / "b", numbers=False)


def test_a_part_of_the_images_has_the_shares_of_all() -> None:
    def load(limit: int) -> object:
        config = DataConfig("digits", limit=limit, num_val=100)
        return load_data(config, device=torch.device("cpu"), seed=0, eval_batch_size=9)

    some = load(50)
    assert some.train.num_samples == 50 and some.val.num_samples == 100  # type: ignore[attr-defined]
    (note,) = some.notes  # type: ignore[attr-defined]
    assert "50 of 1,337" in note
    labels = torch.cat([batch.y for batch in some.train.epoch(0)])  # type: ignore[attr-defined]
    assert torch.bincount(labels, minlength=10).tolist() == pytest.approx([5] * 10, abs=1)
    assert load(0).train.num_samples == load(5000).train.num_samples == 1337  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="each of the 10 classes, got 9"):
        load(9)


def test_the_rates_of_a_range_test_grow_by_equal_factors() -> None:
    rates = [learning_rate(ScheduleConfig("range"), 2.0, step, 5, 2) for step in range(10)]
    assert rates[-1] == pytest.approx(2.0) and rates[0] == pytest.approx(2.0 * 1e-3**0.9)
    assert np.diff(np.log(rates)) == pytest.approx(np.full(9, np.log(1000) / 10))
