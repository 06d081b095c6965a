"""What was measured of a saved network, taken from the record that belongs to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arat_fast.interop.saved import SAFETENSORS, SavedNetwork
from arat_fast.reporting.run import Accuracy, dig, read_accuracies, read_run
from arat_fast.training.checkpoint import CHECKPOINT


@dataclass(frozen=True)
class Measured:
    """Accuracies and how the network came about, as far as a record tells.

    Attributes:
        accuracies: by name; empty where nothing was measured of these weights and this branch.
        summary: of the run; {} where there is none.
        classes: names of the classes; () where unknown.
        source: name of the file that the accuracies come from; "" for none.
    """

    accuracies: Mapping[str, Accuracy] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    source: str = ""


def measured(saved: SavedNetwork, branch: str) -> Measured:
    """The record of a saved network: the summary of its run, else what ``arat-fast eval`` wrote.

    A figure is taken only if it is of these weights and this branch: of a finished run, with as
    many steps as the checkpoint, and of the average if that is what was read.

    Args:
        saved: the network.
        branch: that is exported.
    """
    folder = saved.path.parent
    if saved.path.name in (CHECKPOINT, SAFETENSORS) and (folder / "metrics.jsonl").is_file():
        run = read_run(folder)
        classes = run.examples.classes if run.examples is not None else ()
        same = (
            run.summary.get("status") == "finished"
            and run.summary.get("model") == saved.weights
            and saved.steps in (None, run.summary.get("steps"))
        )
        found = _of_branch(run.accuracies(), branch) if same else {}
        return Measured(found, run.summary, classes, "summary.json" if found else "")
    record = saved.path.with_name(f"{saved.path.stem}.evaluation.json")
    if branch == "clean" or not _is_newer(record, saved.path):
        return Measured()
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return Measured()
    accuracies = read_accuracies(dig(content, "accuracy"))
    return Measured(_of_branch(accuracies, branch), source=record.name if accuracies else "")


def _is_newer(record: Path, weights: Path) -> bool:
    return record.is_file() and record.stat().st_mtime >= weights.stat().st_mtime


def _of_branch(accuracies: Mapping[str, Accuracy], branch: str) -> dict[str, Accuracy]:
    """Attacks are run on the deployed branch; of the other one only the clean accuracy is known."""
    if branch == "clean":
        return {"clean": accuracies["clean_branch"]} if "clean_branch" in accuracies else {}
    return {name: value for name, value in accuracies.items() if name != "clean_branch"}
