"""The folders that ``arat-fast export`` writes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from arat_fast import __version__, load
from arat_fast.device import versions
from arat_fast.evaluation.evaluate import finite_answers
from arat_fast.export.card import Measured, measured, model_card, paper_of, public_command
from arat_fast.export.programs import ONNX_PACKAGES, save_onnx, save_program
from arat_fast.extras import needed
from arat_fast.files import check_empty, folder_atomic, write_atomic, write_json, write_text
from arat_fast.report.templates import render
from arat_fast.report.words import plain
from arat_fast.saved.naming import NETWORKS, to_scheme
from arat_fast.saved.network import FACTS, RECORD, SavedNetwork, Which, header, read_saved
from arat_fast.saved.plain import save_safetensors
from arat_fast.saved.weights import NORMALIZATION

Format = Literal["hub", "robustbench", "torchvision", "timm", "torch-export", "onnx"]
TOLERANCE = 1e-5
"""Largest difference of a logit that an export may have, relative to the largest logit or to 1."""

ROBUSTBENCH_SAMPLES = 10_000
"""Images that RobustBench evaluates on."""
_TRAINING = (
    *("epochs", "steps", "limit", "max_steps", "seed", "precision"),
    *("device", "versions", "commit"),
)
_ARCHITECTURES = {"resnet18": ("ResNet-18", "RN18"), "wrn34-10": ("WideResNet-34-10", "WRN34-10")}


def export_checkpoint(
    checkpoint: Path,
    format: Format,
    out: Path,
    *,
    branch: Literal["adv", "clean"] | None = None,
    weights: Which = "deployed",
    recipe: str | None = None,
    name: str | None = None,
    license: str = "unknown",
) -> dict[str, Any]:
    """Write a trained network for other software, with what it is and an example that loads it.

    The folder appears under its name only when everything is in it and what was written has been
    read back and gives the logits of the network.

    Args:
        checkpoint: a run's folder, or a file that :func:`arat_fast.load` reads.
        format: "hub" (safetensors and model card), "robustbench", "torchvision", "timm",
            "torch-export" or "onnx".
        out: the folder; absent or empty.
        branch: of a network with split BatchNorm; None is "adv".
        weights: "deployed", the average where the run has one, or "last".
        recipe: gives data and threat model where the file does not hold them.
        name: of the model, on the card or in RobustBench; None makes one.
        license: identifier of the weights' licence, for the card.

    Returns:
        The record, which is ``config.json`` in the folder.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FileExistsError: ``out`` has files in it.
        ValueError: the network, its branch or its data cannot be exported in this format.
    """
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    check_empty(out)
    for package in ONNX_PACKAGES if format == "onnx" else ():
        needed("onnx", package)
    saved = read_saved(checkpoint, recipe=recipe, weights=weights)
    model, exported = saved.plain(branch)
    found = measured(saved, exported)
    record = _record(saved, exported, format, found)
    name = name or _default_name(record)
    if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII):
        raise ValueError(f"--name must be letters, digits, '-', '_' and '.', got {name!r}")
    with folder_atomic(out) as work:
        _write(work, model, record, found, name, license)
    return record


def _default_name(record: Mapping[str, Any]) -> str:
    paper, architecture = paper_of(record), _ARCHITECTURES.get(record["model"])
    if record["format"] == "robustbench" and paper is not None and architecture is not None:
        return f"{paper.key}_{architecture[1]}"
    parts = (record["dataset"], record["model"], record["objective"])
    return re.sub(r"[^\w.-]", "-", "-".join(part for part in parts if part), flags=re.ASCII)


def _record(saved: SavedNetwork, branch: str, format: Format, found: Measured) -> dict[str, Any]:
    facts, summary = saved.facts, found.summary
    given = summary.get("command")
    command = {"command": public_command(given)} if given else {}
    return {
        "format": format,
        "weights_file": None,
        **{key: facts.get(key) for key in FACTS},
        "branch": branch,
        "num_classes": saved.num_classes,
        "classes": facts.get("classes", []),
        "input_range": [0, 1],
        "accuracy": {
            key: {
                "value": value.value,
                "correct": value.correct,
                "num_samples": value.num_samples,
                **value.details,
            }
            for key, value in found.accuracies.items()
        },
        "training": {key: summary[key] for key in _TRAINING if key in summary} | command,
        "source": saved.path.name,
        "exported_with": {"arat_fast": __version__, **versions()},
    }


def _write(
    folder: Path,
    model: nn.Module,
    record: dict[str, Any],
    found: Measured,
    name: str,
    license: str,
) -> None:
    """Write everything; what was written is read back and compared with the network."""
    format, shape = record["format"], tuple(record["image_shape"])
    facts = {key: record[key] for key in FACTS if record[key] is not None}
    file = {
        "torch-export": "model.pt2",
        "onnx": "model.onnx",
        "torchvision": "model.pth",
        "robustbench": f"models/{record['dataset']}/{record['norm']}/{name}.pt",
    }.get(format, "model.safetensors")
    program = None
    if format in ("torch-export", "onnx"):
        save = save_program if format == "torch-export" else save_onnx
        program = save(model, shape, folder / file, facts)
    else:
        if format in NETWORKS and record["activation"] != "relu":
            raise ValueError(
                f"{format} has no class for {record['model']} with {record['activation']}: export "
                "it in the format hub, torch-export or onnx"
            )
        state = to_scheme(model.state_dict(), record["model"], format)
        if format == "robustbench":
            state = _robustbench(folder, state, record, found, name)
        if format in ("torchvision", "robustbench"):
            content = {key: tensor.detach().clone() for key, tensor in state.items()}
            write_atomic(folder / file, lambda opened: torch.save(content, opened))
        else:
            save_safetensors(state, folder / file, header(facts))
    record["weights_file"] = file
    example = render("example.py.j2", **record)
    write_text(folder / "example.py", example)
    if format == "hub":
        write_text(folder / "README.md", model_card(record, found, name, license, example))
    record["sha256"] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    write_json(folder / RECORD, record)
    read_back = program or load(folder)
    record["largest_difference"], record["largest_logit"] = _difference(model, read_back, shape)
    write_json(folder / RECORD, record)


def _difference(model: nn.Module, program: Any, shape: tuple[int, ...]) -> tuple[float, float]:
    """Largest difference of a logit at batch sizes 1 and 7, and largest logit."""
    generator = torch.Generator().manual_seed(0)
    difference = largest = 0.0
    for batch in (1, 7):
        x = torch.rand(batch, *shape, generator=generator)
        with torch.no_grad(), finite_answers(model):
            expected = model(x)
            found = float((program(x) - expected).abs().max())
        size = float(expected.abs().max())
        if not found <= TOLERANCE * max(1.0, size):
            raise ValueError(
                f"what was written gives other logits: they differ by {found:.3g}, expected at "
                f"most {TOLERANCE:g} of the largest, {size:.3g}, or of 1; nothing was exported"
            )
        difference, largest = max(difference, found), max(largest, size)
    return difference, largest


def _robustbench(
    folder: Path, state: dict[str, Tensor], record: dict[str, Any], found: Measured, name: str
) -> dict[str, Tensor]:
    """Write model_info where RobustBench looks for it; the weights as its classes name them."""
    dataset, norm = record["dataset"], record["norm"]
    if dataset not in ("cifar10", "cifar100"):
        raise ValueError(
            f"RobustBench evaluates cifar10 and cifar100, got a network for "
            f"{dataset or 'unknown data (add --recipe NAME)'}: export it in the format hub, "
            "torch-export or onnx"
        )
    # What names the dataset, a run or a recipe, names the ball too.
    assert norm is not None and record["eps"] is not None
    if record["mean"]:
        # The keys of RobustBench's normalize_model around the network.
        state = {f"model.{key}": tensor for key, tensor in state.items()}
        for key in ("mean", "std"):
            state[f"{NORMALIZATION}{key}"] = torch.tensor(record[key]).view(1, -1, 1, 1)
    for kind in ("models", "model_info"):
        (folder / kind / dataset / norm).mkdir(parents=True)
    entry = _model_info(record, found)
    write_json(folder / "model_info" / dataset / norm / f"{name}.json", entry)
    return state


def _model_info(record: Mapping[str, Any], found: Measured) -> dict[str, Any]:
    """RobustBench's entry; an accuracy that was not measured as it asks for stays null."""
    paper = paper_of(record)
    footnote = "Trained with arat_fast; not the weights of the paper's authors."
    if record["additional_data"]:
        footnote += " Additional images were mixed into the training batches."
    return {
        **{key: getattr(paper, key, None) for key in ("link", "name", "authors", "venue")},
        "additional_data": record["additional_data"],
        "number_forward_passes": 1,
        "dataset": record["dataset"],
        "architecture": _ARCHITECTURES[record["model"]][0],
        "eps": plain(record["eps"]),
        "clean_acc": _percent(found, "clean", record),
        "reported": None,
        "autoattack_acc": _percent(found, "autoattack", record),
        "footnote": footnote,
    }


def _percent(found: Measured, key: str, record: Mapping[str, Any]) -> str | None:
    accuracy = found.accuracies.get(key)
    asked = {"version": "standard", "norm": record["norm"], "eps": record["eps"]}
    if (
        accuracy is None
        or accuracy.num_samples != ROBUSTBENCH_SAMPLES
        or (key == "autoattack" and not asked.items() <= accuracy.details.items())
    ):
        return None
    return f"{100 * accuracy.value:.2f}"
