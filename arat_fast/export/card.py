"""The model card of a hub folder: what was measured, how it was trained, its limits."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from arat_fast.config import Config
from arat_fast.export.measured import Measured
from arat_fast.objectives import OBJECTIVES, Paper
from arat_fast.report.run import Accuracy
from arat_fast.report.templates import render
from arat_fast.report.words import metric_name

HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
    "imagenette": "frgfm/imagenette",
}
"""Names that the hub knows the datasets by."""


def radius(eps: float) -> str:
    """A radius as it is written in papers: whole multiples of 1/255 as a fraction."""
    steps = round(eps * 255)
    return f"{steps}/255" if steps and abs(eps * 255 - steps) < 1e-6 else f"{eps:.6g}"


def paper_of(record: Mapping[str, Any]) -> Paper | None:
    """The paper of a built-in objective; the name in a file is nothing to import a module by."""
    objective = OBJECTIVES.get(str(record["objective"]))
    return objective.paper if objective is not None else None


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
    dataset = record["dataset"]
    return render(
        "card.md.j2",
        record=record,
        title=name,
        license=licence,
        example=example,
        hub_dataset=HUB_DATASETS.get(dataset, dataset),
        paper=paper_of(record),
        radius=radius(record["eps"]) if record["norm"] and record["eps"] is not None else None,
        figures=[_figure(key, accuracy) for key, accuracy in found.accuracies.items()],
        sources=found.sources,
        summary=found.summary,
        command=public_command(str(found.summary.get("command") or "")),
    )


def public_command(command: str) -> str:
    """A command line without the options that name folders of the machine it ran on."""
    try:
        words = iter(shlex.split(command))
    except ValueError:
        return ""
    return shlex.join(_without_folders(words))


def _local_options() -> set[str]:
    """The options whose values are paths."""
    sections = list(get_type_hints(Config).items())
    sections += [("objective", objective.Settings) for objective in OBJECTIVES.values()]
    found = {"--out"}
    for section, part in sections:
        for name, kind in get_type_hints(part).items() if is_dataclass(part) else ():
            if Path in (kind, *get_args(kind)):
                found.add(f"--{section}.{name}".replace("_", "-"))
    return found


def _without_folders(words: Iterator[str]) -> Iterator[str]:
    local = _local_options()
    for word in words:
        option, has_value, _ = word.partition("=")
        if option.replace("_", "-") not in local:
            yield word
        elif not has_value:
            next(words, None)


def _figure(key: str, accuracy: Accuracy) -> dict[str, Any]:
    details = accuracy.details
    ball = (
        f"{details['norm']} radius {radius(details['eps'])}"
        if {"eps", "norm"} <= details.keys()
        else ""
    )
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
