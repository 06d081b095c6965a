"""The naturally trained network that adversarial finetuning starts from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arat_fast.config import Config
from arat_fast.data.fingerprint import class_order
from arat_fast.evaluation.suite import accuracy_lines
from arat_fast.files import parse_json, read_json
from arat_fast.models.split_batch_norm import copy_network
from arat_fast.objectives.adversarial_training import NaturalTraining
from arat_fast.run.state import Run
from arat_fast.saved.weights import fill_branches, load_weights, read_safetensors

FOLDER = "natural"
"""Folder, inside a run's own, of the natural run that it trains first."""


def natural_config(config: Config) -> Config:
    """The natural run that precedes ``config``: same data, network, optimiser and averaging."""
    return dataclasses.replace(
        config,
        objective=NaturalTraining.Settings("natural"),
        train=dataclasses.replace(
            config.train,
            epochs=getattr(config.objective, "teacher_epochs", None)
            or config.train.natural_epochs
            or config.train.epochs,
            natural_epochs=0,
            eval_every=0,
            keep_best=False,
        ),
        eval=dataclasses.replace(config.eval, autoattack=False),
    )


def load_natural(model: nn.Module, path: Path, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Load the weights of a natural run into a network.

    Args:
        model: the network; unchanged where an error is raised.
        path: the run's folder, or weights that a run has exported.
        classes: names of the images' classes, in the order of their labels.

    Returns:
        What is known of the run, as JSON types: "source", and from its folder's summary "epochs",
        "train_seconds" and "clean", the accuracy on the test images; None where it is not known.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: they are damaged, were not trained naturally, or belong to another network.
    """
    weights = path / "model.safetensors" if path.is_dir() else path
    if not weights.is_file():
        raise FileNotFoundError(
            f"no weights at {weights}; expected the folder of a finished natural run, or its "
            "model.safetensors"
        )
    tensors, metadata = read_safetensors(weights)
    objective = metadata.get("objective", "natural")
    if objective != "natural":
        raise ValueError(
            f"{weights} was trained with {objective}, expected a naturally trained model: "
            "arat-fast train RECIPE --objective.name natural makes one"
        )
    known = parse_json(metadata.get("classes", "[]"))
    if class_order(known, classes or known, weights) is not None:
        raise ValueError(
            f"{weights} counts the same classes in another order, got {', '.join(known[:3])}, …: "
            "train the natural model on the same dataset"
        )
    load_weights(model, fill_branches(tensors, model.state_dict()), str(weights))
    summary: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        summary = read_json(weights.parent / "summary.json")
    return {
        "source": str(path),
        "epochs": summary.get("epochs"),
        "train_seconds": summary.get("wall_seconds", {}).get("train"),
        "clean": summary.get("accuracy", {}).get("clean", {}).get("value"),
    }


def start_from(run: Run, path: Path) -> None:
    """Start a run from the natural model of another one, on every process.

    Args:
        run: whose weights, and what the objective keeps of them, are replaced.
        path: as for :func:`load_natural`; rank 0 alone needs to see it.
    """
    content = b""
    if run.ranks.is_main:
        content = json.dumps(load_natural(run.model, path, run.data.train.classes)).encode()
    known: dict[str, Any] = json.loads(run.ranks.broadcast_bytes(content))
    run.progress.natural_model = known
    for tensor in run.model.state_dict().values():
        run.ranks.broadcast_(tensor)
    run.objective.adopt(run.model)
    epochs = known["epochs"]
    ending = "" if epochs == 1 else "s"
    length = f", trained for {epochs} epoch{ending}" if epochs is not None else ""
    run.display.say(f"starting from the natural model in {path}{length}")


def prepare(run: Run, train: Callable[..., object]) -> None:
    """Let a run that has not begun start from a natural network where its configuration or its
    objective wants one: the teacher that is given, or one that is trained first.

    Args:
        run: that is to begin.
        train: :func:`arat_fast.run.loop.train`.
    """
    wanted = run.objective.starts_from_natural or run.config.train.natural_epochs > 0
    if not wanted or run.progress.natural_model is not None:
        return
    teacher = getattr(run.config.objective, "teacher", None)
    if teacher is not None:
        start_from(run, teacher)
        return
    config = natural_config(run.config)
    run.display.say(
        f"epochs of natural training first: {config.train.epochs}; then of "
        f"{run.config.objective.name}: {run.config.train.epochs}"
    )
    folder = run.out / FOLDER
    devices = [run.device] if run.device.type == "cuda" else []
    # What follows must not depend on whether the natural run was made, resumed or found.
    with torch.random.fork_rng(devices):
        train(
            config,
            folder,
            resume=run.resume,
            command=run.command,
            display=run.display,
            ranks=run.ranks,
            bad_images=run.bad_images,
            # A network of its own, which the caller's starts from.
            model=None if run.given_model is None else copy_network(run.given_model),
            data=run.given_data,
        )
    if run.ranks.is_main:
        found = read_json(folder / "summary.json")["accuracy"]
        run.display.say(
            "\n".join(["the natural network, to compare with:", *accuracy_lines(found)])
        )
    start_from(run, folder)
    assert run.progress.natural_model is not None
    run.progress.natural_model["source"] = FOLDER
