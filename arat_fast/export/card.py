"""The model card of a hub folder: what was measured, how it was trained, its limits."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from arat_fast.config import Config
from arat_fast.evaluation.record import read_record
from arat_fast.files import written_here
from arat_fast.objectives import OBJECTIVES, Paper
from arat_fast.report.records import records_of
from arat_fast.report.run import Accuracy, in_order, read_accuracies
from arat_fast.report.templates import render
from arat_fast.report.words import metric_name, plain
from arat_fast.saved.network import SAFETENSORS, SavedNetwork
from arat_fast.training.checkpoint import CHECKPOINT

HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
    "imagenette": "frgfm/imagenette",
}
"""Names that the hub knows the datasets by."""


@dataclass(frozen=True)
class Measured:
    """Accuracies and how the network came about, as far as its records tell.

    Attributes:
        accuracies: by name; empty where nothing was measured of these weights and this branch.
        summary: of the run; {} where there is none.
        sources: names of the files that the accuracies come from.
    """

    accuracies: Mapping[str, Accuracy] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
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
    records: dict[str, Mapping[str, Any]] = {}
    if saved.path.name in (CHECKPOINT, SAFETENSORS) and (folder / "metrics.jsonl").is_file():
        summary = read_record(folder / "summary.json")
        if (
            summary.get("status") == "finished"
            and summary.get("model") == saved.weights
            and saved.steps in (None, summary.get("steps"))
        ):
            records["summary.json"] = summary
    records |= records_of(saved)[0]
    chosen: dict[str, tuple[Accuracy, str]] = {}
    for source, record in records.items():
        with written_here(folder / source):
            accuracies = read_accuracies(record.get("accuracy", {}))
            other = accuracies.pop("clean_branch", None)
            if branch == "clean":
                # Attacks are run on the deployed branch.
                accuracies = {"clean": other} if other is not None else {}
            for name, accuracy in accuracies.items():
                before = chosen.get(name)
                if before is None or _rank(accuracy, saved) > _rank(before[0], saved):
                    chosen[name] = accuracy, source
    sources = {source for _, source in chosen.values()}
    return Measured(
        in_order({name: accuracy for name, (accuracy, _) in chosen.items()}),
        summary,
        tuple(source for source in records if source in sources),
    )


def _rank(accuracy: Accuracy, saved: SavedNetwork) -> tuple[bool, int]:
    ball = {key: accuracy.details[key] for key in ("norm", "eps") if key in accuracy.details}
    own = all(saved.facts.get(key) in (None, value) for key, value in ball.items())
    return own, accuracy.num_samples


def paper_of(record: Mapping[str, Any]) -> Paper | None:
    """The paper of a built-in objective; the name in a file is nothing to import a module by."""
    objective = OBJECTIVES.get(str(record["objective"]))
    return objective.paper if objective is not None else None


STARTS = ("--init", "--objective.teacher")
"""Options that name the weights a training starts from."""


def model_card(
    record: Mapping[str, Any], found: Measured, name: str, licence: str, example: str
) -> str:
    """README.md of a hub folder.

    Args:
        record: of the export.
        found: accuracies and summary; what is not there is said to be unknown.
        name: of the model.
        licence: identifier of the weights' licence.
        example: Python that loads the network from the folder.
    """
    dataset, command = record["dataset"], str(found.summary.get("command") or "")
    return render(
        "card.md.j2",
        record=record,
        title=name,
        license=licence,
        example=example,
        hub_dataset=HUB_DATASETS.get(dataset, dataset),
        paper=paper_of(record),
        radius=plain(record["eps"]) if record["norm"] and record["eps"] is not None else None,
        figures=[_figure(key, accuracy) for key, accuracy in found.accuracies.items()],
        sources=found.sources,
        summary=found.summary,
        command=public_command(command),
        started_from=next((word for word in re.split("[ =]", command) if word in STARTS), None),
    )


def public_command(command: str) -> str:
    """A command line without the options that name folders of the machine it ran on."""
    try:
        words = iter(shlex.split(command))
    except ValueError:
        return ""
    local, kept = _local_options(), []
    for word in words:
        option, has_value, _ = word.partition("=")
        if option.replace("_", "-") not in local:
            kept.append(word)
        elif not has_value:
            next(words, None)
    return shlex.join(kept)


def _local_options() -> set[str]:
    """The options whose values are paths."""
    sections = list(get_type_hints(Config).items())
    sections += [("objective", objective.Settings) for objective in OBJECTIVES.values()]
    found = {"--out", "--init"}
    for section, part in sections:
        for name, kind in get_type_hints(part).items() if is_dataclass(part) else ():
            if Path in (kind, *get_args(kind)):
                found.add(f"--{section}.{name}".replace("_", "-"))
    return found


def _figure(key: str, accuracy: Accuracy) -> dict[str, Any]:
    details, ball = accuracy.details, ""
    if {"eps", "norm"} <= details.keys():
        ball = f"{details['norm']} radius {plain(details['eps'])}"
    how = [ball, details.get("implementation")]
    if "version" in details:
        how.append(f"version {details['version']}")
    for count in ("steps", "restarts", "targets", "queries"):
        number = details.get(f"num_{count}")
        if number:
            how.append(f"{number} {count if number != 1 else count[:-1]}")
    low, high = accuracy.interval
    return {
        "key": key,
        "name": metric_name(key),
        "value": accuracy.value,
        "low": low,
        "high": high,
        "num_images": accuracy.num_samples,
        "ball": ball,
        "how": ", ".join(str(part) for part in how if part),
    }
