"""A run's numbers for TensorBoard, as a table, and for Weights & Biases, offline."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from tiny import changed, metric_lines, tiny_config, tiny_trainer
from wandb.proto import wandb_internal_pb2


def offline_records(folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """What Weights & Biases keeps of one run for later: how it began, and what was logged."""
    (path,) = folder.glob("offline-run-*/*.wandb")
    data, records = path.read_bytes()[7:], []
    while data:
        end = 7 + int.from_bytes(data[4:6], "little")
        records.append(wandb_internal_pb2.Record.FromString(data[7:end]))
        data = data[end:]
    (run,) = (r.run for r in records if r.HasField("run"))
    history = [r.history.item for r in records if r.HasField("history")]
    return run, [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
        for items in history
    ]


@pytest.mark.slow
def test_every_logger_has_the_numbers_of_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    config = changed(tiny_config(2), "train", loggers=("csv", "wandb"), eval_every=1, log_every=2)
    summary = tiny_trainer(tmp_path, config).run()
    wandb.teardown()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = metric_lines(tmp_path, "train")
    table = [row for row in rows if row["train/loss"]]
    assert [float(row["train/loss"]) for row in table] == [line["loss"] for line in lines]
    evaluated = [(row["step"], row["val/last/pgd"]) for row in rows if row["val/last/pgd"]]
    assert evaluated and evaluated[0][0] == "4"
    started, logged = offline_records(tmp_path / "wandb")
    assert started.run_id == summary["run"] and started.project == "arat-fast"
    settings = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert settings["train"]["loggers"] == ["csv", "wandb"]
    told = [(n["_step"], n["train/loss"]) for n in logged if "train/loss" in n]
    assert told == [(line["step"], line["loss"]) for line in lines]
    assert not (tmp_path / "tensorboard").exists()


def test_weights_and_biases_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"\[wandb\]"):
        tiny_trainer(tmp_path, changed(tiny_config(1), "train", loggers=("wandb",)))
