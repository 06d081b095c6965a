"""The model card of a hub folder: what was measured, how it was trained, its limits."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from arat_fast.config import Config
from arat_fast.export.measured import Measured
from arat_fast.export.papers import PAPERS
from arat_fast.report.run import Accuracy
from arat_fast.report.words import metric_name

HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
    "imagenette": "frgfm/imagenette",
}
"""Names that the hub knows the datasets by."""

_NO_ROBUSTNESS = ("corruptions", "aa-torchattacks10")
"""Accuracies that a list of results without words would misrepresent."""


def radius(eps: float) -> str:
    """A radius as it is written in papers: whole multiples of 1/255 as a fraction."""
    steps = round(eps * 255)
    return f"{steps}/255" if steps and abs(eps * 255 - steps) < 1e-6 else f"{eps:.6g}"


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
    sections = [
        _front_matter(record, found, name, licence),
        f"# {name}\n",
        _about(record),
        "## Measured\n",
        _table(record, found),
        "## Use\n",
        f"```python\n{example}```\n",
        "It needs `arat-fast`. `config.json` says what else these weights are.\n",
        "## Training\n",
        _training(record, found.summary),
        "## What robustness means here, and what it does not\n",
        _limits(record),
    ]
    return "\n".join(sections)


def public_command(command: str) -> str:
    """A command line without the options that name folders of the machine it ran on."""
    try:
        words = iter(shlex.split(command))
    except ValueError:
        return ""
    return shlex.join(_without_folders(words))


def _local_options() -> set[str]:
    """The options whose values are paths."""
    found = {"--out"}
    for section, part in get_type_hints(Config).items():
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


def _front_matter(record: Mapping[str, Any], found: Measured, name: str, licence: str) -> str:
    dataset = record.get("dataset")
    lines = ["---", f"license: {json.dumps(licence)}", "library_name: arat-fast"]
    lines += ["pipeline_tag: image-classification", "tags:", "- adversarial-robustness"]
    if dataset:
        lines += ["datasets:", f"- {json.dumps(HUB_DATASETS.get(dataset, dataset))}"]
    lines += ["metrics:", "- accuracy"]
    if found.accuracies and dataset:
        # JSON strings are YAML strings.
        lines += [
            "model-index:",
            f"- name: {json.dumps(name)}",
            "  results:",
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {json.dumps(dataset)}",
            f"      type: {json.dumps(HUB_DATASETS.get(dataset, dataset))}",
            "      split: test",
            "    metrics:",
        ]
        for key, accuracy in found.accuracies.items():
            if key in _NO_ROBUSTNESS:
                continue
            lines += [
                "    - type: accuracy",
                f"      name: {json.dumps(_label(key, accuracy))}",
                f"      value: {100 * accuracy.value:.2f}",
            ]
    return "\n".join([*lines, "---", ""])


def _label(key: str, accuracy: Accuracy) -> str:
    ball = _ball(accuracy.details)
    return f"{metric_name(key)} accuracy{f', {ball}' if ball else ''}"


def _ball(details: Mapping[str, Any]) -> str:
    eps, norm = details.get("eps"), details.get("norm")
    if not isinstance(eps, (int, float)) or not isinstance(norm, str):
        return ""
    return f"{norm} radius {radius(eps)}"


def _about(record: Mapping[str, Any]) -> str:
    channels, height, width = record["image_shape"]
    branch = {
        "adv": "the adversarial BatchNorm branch, the robust one",
        "clean": "the clean BatchNorm branch, an auxiliary of training that is **not robust**",
        "shared": "one BatchNorm for all images",
    }[record["branch"]]
    weights = {
        "last": "the weights of the last step",
        "ema": "the exponential moving average of the weights",
        "swa": "the average of the weights late in training (SWA)",
    }.get(record["weights"], "weights of unknown kind")
    paper = PAPERS.get(str(record.get("objective")))
    of_dataset = f" of {record['dataset']}" if record.get("dataset") else ""
    lines = [
        f"`{record['model']}` for images of {channels}×{height}×{width} (channels, height, width) "
        f"with values in [0, 1]; {record['num_classes']} classes"
        f"{of_dataset}. "
        f"{'Normalisation is part of the network. ' if record['mean'] else ''}"
        f"Exported: {branch}; {weights}.",
        "",
    ]
    if paper is not None:
        lines += [
            f"Method: {paper.authors}, *{paper.name}*, {paper.venue}, {paper.link}. The weights "
            "were trained with arat_fast and are not those of its authors.",
            "",
        ]
    return "\n".join(lines)


def _table(record: Mapping[str, Any], found: Measured) -> str:
    if not found.accuracies:
        return "Nothing was measured of these weights; `arat-fast eval .` does it.\n"
    lines = ["| | accuracy | 95 % interval | n | how |", "|---|---|---|---|---|"]
    for key, accuracy in found.accuracies.items():
        low, high = accuracy.interval
        how = _how(accuracy.details) or "no attack"
        lines.append(
            f"| {metric_name(key)} | {100 * accuracy.value:.2f} % | {100 * low:.2f} to "
            f"{100 * high:.2f} % | {accuracy.num_samples} | {how} |"
        )
    sources = " and ".join(f"`{name}`" for name in found.sources)
    lines += ["", f"Test images of {record.get('dataset')}, from {sources}; Wilson intervals"]
    if "corruptions" in found.accuracies:
        lines[-1] += ", for the corruptions the normal one of the images' means"
    lines[-1] += "; of the choice of test images only, not of the training.\n"
    if "corruptions" in found.accuracies:
        lines.append(
            "The corruptions are arat_fast's own: the figure must not be compared with those of "
            "CIFAR-10-C or ImageNet-C.\n"
        )
    if "aa-torchattacks10" in found.accuracies:
        lines.append(
            "aa-torchattacks10 overstates robustness; it is for comparison with one published "
            "table only.\n"
        )
    return "\n".join(lines)


def _how(details: Mapping[str, Any]) -> str:
    parts = [_ball(details)]
    if details.get("implementation"):
        parts.append(str(details["implementation"]))
    if details.get("version"):
        parts.append(f"version {details['version']}")
    for key, word in (
        ("num_steps", "steps"),
        ("num_restarts", "restarts"),
        ("num_targets", "targets"),
        ("num_queries", "queries"),
    ):
        number = details.get(key)
        if number:
            parts.append(f"{number} {word if number != 1 else word[:-1]}")
    return ", ".join(part for part in parts if part)


def _training(record: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    images = {
        True: "Generated or other additional images were mixed into its batches.",
        False: "No images but those of the dataset.",
    }.get(record["additional_data"], "Whether there were additional images is not known.")
    if not summary:
        recipe = f"recipe `{record['recipe']}`" if record.get("recipe") else "unknown recipe"
        return f"{recipe[0].upper()}{recipe[1:]}; the record of the run was not there. {images}\n"
    lines = [
        f"Recipe `{summary.get('recipe')}`, objective `{summary.get('objective')}`, "
        f"{summary.get('epochs')} epochs ({summary.get('steps')} steps) on "
        f"{summary.get('train_samples')} images, seed {summary.get('seed')}, "
        f"{summary.get('precision')} on {summary.get('device')}. {images}",
        "",
    ]
    command = public_command(str(summary.get("command") or ""))
    if command:
        lines += ["Command, without local folders:", "", f"    {command}", ""]
    versions = summary.get("versions")
    if isinstance(versions, Mapping):
        lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".")
    if summary.get("commit"):
        lines.append(f"Commit of arat_fast: {summary['commit']}.")
    return "\n".join([*lines, ""])


def _limits(record: Mapping[str, Any]) -> str:
    ball = ""
    if record.get("eps") is not None and record.get("norm"):
        ball = f" ({record['norm']}, radius {radius(record['eps'])}, pixels in [0, 1])"
    if record["branch"] == "clean":
        return "This branch never saw an attack. Do not use it where somebody may.\n"
    return (
        f"Intended for research on adversarial robustness, on images like those of its dataset.\n\n"
        f"Robust accuracy is the share of test images for which the attacks above found no "
        f"misclassified image inside the ball{ball}. It is an upper bound on the true robust "
        "accuracy, not a certificate: a stronger attack can lower it. It says nothing about "
        "larger or other perturbations (another norm, rotations, patches, corruptions, weather), "
        "about images of another kind, or about poisoned training data. The network always "
        "names one of its classes, whatever the image shows, and its confidences are not "
        "calibrated.\n"
    )
