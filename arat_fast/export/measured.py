"""What was measured of a saved network, taken from the records that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from arat_fast.evaluation.record import read_record
from arat_fast.report.records import records_of
from arat_fast.report.run import Accuracy, in_order, read_accuracies, read_run
from arat_fast.saved.network import SAFETENSORS, SavedNetwork
from arat_fast.training.checkpoint import CHECKPOINT


@dataclass(frozen=True)
class Measured:
    """Accuracies and how the network came about, as far as its records tell.

    Attributes:
        accuracies: by name; empty where nothing was measured of these weights and this branch.
        summary: of the run; {} where there is none.
        classes: names of the classes; () where unknown.
        sources: names of the files that the accuracies come from.
    """

    accuracies: Mapping[str, Accuracy] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def measured(saved: SavedNetwork, branch: str) -> Measured:
    """What the run's own summary and ``arat-fast eval`` say of a saved network.

    A figure is taken only if it is of these weights, this dataset and this branch: from the summary
    of a finished run, with as many steps as the checkpoint, and of the average if that is what was
    read; from a record of ``arat-fast eval`` with the checksum of the weights. Of two for one
    attack, that in the ball of the training is taken, then that on more images.

    Args:
        saved: the network.
        branch: that is exported.
    """
    folder = saved.path.parent
    summary: Mapping[str, Any] = {}
    classes: tuple[str, ...] = ()
    records: dict[str, Mapping[str, Any]] = {}
    if saved.path.name in (CHECKPOINT, SAFETENSORS) and (folder / "metrics.jsonl").is_file():
        run = read_run(folder)
        summary = read_record(folder / "summary.json")
        classes = run.examples.classes if run.examples is not None else ()
        if (
            summary.get("status") == "finished"
            and summary.get("model") == saved.weights
            and saved.steps in (None, summary.get("steps"))
        ):
            records["summary.json"] = summary
    records |= records_of(saved)[0]
    chosen: dict[str, tuple[Accuracy, str]] = {}
    for source, record in records.items():
        for name, accuracy in _of_branch(
            read_accuracies(record.get("accuracy", {})), branch
        ).items():
            before = chosen.get(name)
            if before is None or _rank(accuracy, saved) > _rank(before[0], saved):
                chosen[name] = accuracy, source
    sources = {source for _, source in chosen.values()}
    return Measured(
        in_order({name: accuracy for name, (accuracy, _) in chosen.items()}),
        summary,
        classes,
        tuple(source for source in records if source in sources),
    )


def _rank(accuracy: Accuracy, saved: SavedNetwork) -> tuple[bool, int]:
    ball = {key: accuracy.details[key] for key in ("norm", "eps") if key in accuracy.details}
    own = all(saved.facts.get(key) in (None, value) for key, value in ball.items())
    return own, accuracy.num_samples


def _of_branch(accuracies: Mapping[str, Accuracy], branch: str) -> dict[str, Accuracy]:
    """Attacks are run on the deployed branch; of the other one only the clean accuracy is known."""
    if branch == "clean":
        return {"clean": accuracies["clean_branch"]} if "clean_branch" in accuracies else {}
    return {name: value for name, value in accuracies.items() if name != "clean_branch"}
