"""Weights that a run starts from: ``--init``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arat_fast.models.features import classifier_path
from arat_fast.models.registry import model_source
from arat_fast.saved.naming import to_own
from arat_fast.saved.network import read_content
from arat_fast.saved.weights import fill_branches, load_weights

if TYPE_CHECKING:
    from arat_fast.run.state import Run

PRETRAINED = "timm"
"""As ``--init``: the weights that timm publishes for the network."""


def start_from_weights(run: Run, source: str) -> None:
    """Take the weights of a file, or of timm, into a new run, on every process.

    BatchNorm of one branch goes into both of a split network; of two branches the adversarial one
    into a network with one. A classifier of another size, or of other classes, stays fresh.

    Args:
        run: whose network is changed; nothing is where an error is raised.
        source: a run's folder, a file as :func:`arat_fast.load` reads it, or "timm"; rank 0 alone
            needs to see it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another network, its normalisation is another one, or
            timm's weights cannot be fetched.
    """
    content = b""
    if run.ranks.is_main:
        content = _load(run, source).encode()
    run.display.say(run.ranks.broadcast_bytes(content).decode())
    for tensor in run.model.state_dict().values():
        run.ranks.broadcast_(tensor)


def _load(run: Run, source: str) -> str:
    classes: tuple[str, ...] = ()
    if source == PRETRAINED:
        tensors = _pretrained(run)
    else:
        found = read_content(Path(source))
        tensors, classes = dict(found.tensors), tuple(found.facts.get("classes", ()))
        settings = run.config.model
        for key, own in (("mean", settings.mean), ("std", settings.std)):
            if key in found.facts and not _close(found.facts[key], own):
                raise ValueError(
                    f"{source} normalises with {key} {tuple(found.facts[key])}, got "
                    f"model.{key}={own}: set --model.mean and --model.std to the file's"
                )
    own_tensors = run.model.state_dict()
    tensors = fill_branches(to_own(tensors, own_tensors), own_tensors)
    head = f"{classifier_path(run.model, run.data.train.image_shape)}."
    other = [n for n in tensors if n.startswith(head) and not _same_shape(tensors, own_tensors, n)]
    of_others = bool(classes) and classes != run.data.train.classes
    kept = ""
    if other or of_others:
        number = len(classes) or len(tensors[other[0]])
        for name, tensor in own_tensors.items():
            if name.startswith(head):
                tensors[name] = tensor
        kept = f"; its classifier, {head.removesuffix('.')}, is of {number} other classes: a fresh "
        kept += f"one of {run.data.train.num_classes} takes its place"
    load_weights(run.model, tensors, source)
    return f"starting from the weights of {source}{kept}"


def _pretrained(run: Run) -> dict[str, Tensor]:
    name, data = run.config.model.name, run.data.train
    library, _, rest = name.partition(":")
    if library != "timm":
        raise ValueError(f"--init timm is for a network timm:NAME, got model.name={name}")
    fetch = model_source(name).pretrained
    assert fetch is not None
    try:
        with torch.random.fork_rng(devices=[]):
            return fetch(data.num_classes, data.image_shape[0], data.image_shape[1]).state_dict()
    except Exception as error:  # of the libraries that fetch
        reason = " ".join(str(error).split())
        raise ValueError(f"timm's weights of {rest} could not be fetched: {reason}") from error


def _same_shape(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str) -> bool:
    return name in own and own[name].shape == tensors[name].shape


def _close(found: list[float], own: tuple[float, ...]) -> bool:
    return len(found) == len(own) and all(map(math.isclose, found, own))
