"""What ``arat-fast eval`` writes: where it goes, and what it may replace."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from arat_fast.config import OWN_IMAGES, DataConfig
from arat_fast.evaluation.evaluate import ImageSet
from arat_fast.evaluation.pieces import read_arrays
from arat_fast.files import read_json, set_aside, write_atomic

_NEVER_REPLACED = ("dataset", "root", "split", "norm", "eps", "seed")
"""Where these differ, results are others, however many images they are of."""

_KNOWN_BY = 16
"""Images by which a set is known."""


def root_of_own_images(data: DataConfig) -> str | None:
    """Where images of one's own lie; None for a dataset that has the same images everywhere."""
    return str(data.root) if data.name in OWN_IMAGES else None


def checksum_of_images(images: ImageSet) -> str:
    """SHA-256, as hexadecimal digits, of the first images of the first process, by which they are
    known where they were moved."""
    pixels = (255 * images.x[:_KNOWN_BY]).round().to("cpu", torch.uint8)
    labels = images.y[:_KNOWN_BY].cpu()
    return hashlib.sha256(pixels.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


def record_path(
    checkpoint: Path,
    norm: str | None = None,
    eps: float | None = None,
    data: str | None = None,
) -> Path:
    """Where the record of a checkpoint goes unless another file is asked for.

    Args:
        checkpoint: a folder or a file.
        norm, eps: another ball than its own, which is part of the name; None for its own.
        data: other images than its own, likewise: a dataset's name, or where it lies.
    """
    if data is not None and "/" in data:
        data = Path(data).stem
    parts = (data, norm, eps and f"{eps:.6g}")
    ball = "".join(f"-{part}" for part in parts if part is not None)
    if checkpoint.is_dir():
        return checkpoint / f"evaluation{ball}.json"
    return checkpoint.with_name(f"{checkpoint.stem}.evaluation{ball}.json")


def record_paths(checkpoint: Path) -> list[Path]:
    """Where :func:`record_path` has put records of any ball, that of its own first."""
    own = record_path(checkpoint)
    return [own, *sorted(own.parent.glob(f"{glob.escape(own.stem)}-*.json"))]


def read_record(path: Path) -> dict[str, Any]:
    """The content of a record; {} where there is none that can be read."""
    with suppress(OSError, ValueError):
        return read_json(path)
    return {}


def set_damaged_aside(path: Path) -> list[str]:
    """Move a record, if there is one, and the results image by image beside it out of the way where
    they are damaged: the new ones would replace them. Says what was moved."""
    moved = []
    for file, read in ((path, read_record), (path.with_suffix(".npz"), read_arrays)):
        if file.exists() and not read(file):
            moved.append(f"{file} is damaged and was moved to {set_aside(file)}")
    return moved


def earlier_record(
    path: Path, facts: Mapping[str, Any], attacks: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The record at ``path`` if a new one can be added to it; {} if it is to be replaced.

    It is replaced where it is of other weights, or of the same images or the first of them, the
    same ball and the same seed, and every attack in it is run again.

    Args:
        path: the file; there need be none.
        facts: what the new record says for all of its results.
        attacks: names of the results that the new one will hold beside the clean accuracy, each
            with the settings that must be those of a result of that name.

    Raises:
        ValueError: it holds results of the same weights that the new one would lose.
    """
    before = read_record(path)
    if before.get("weights_sha256") != facts["weights_sha256"]:
        return {}
    accuracy = before.get("accuracy", {})
    held = [name for name in accuracy if name not in ("clean", "clean_branch")]
    moved = before.get("images_sha256") == facts["images_sha256"]
    other = [k for k in facts if before.get(k) != facts[k] and not (moved and k == "root")]
    decisive = [key for key in other if key in _NEVER_REPLACED]
    if before.get("num_samples", 0) > facts["num_samples"]:
        decisive.append("num_samples")
    lost = held if decisive else [name for name in held if name not in attacks]
    if decisive or (other and lost):
        key = (decisive or other)[0]
        raise _refusal(path, lost or ["clean"], key, before.get(key), facts[key])
    for name in held:
        for key, value in attacks.get(name, {}).items():
            if accuracy[name].get(key) != value:
                raise _refusal(path, [name], key, accuracy[name].get(key), value)
    return {} if other else before


def _refusal(path: Path, names: list[str], key: str, before: Any, got: Any) -> ValueError:
    return ValueError(
        f"{path} holds {', '.join(names)} of these weights with {key}={before}, got {got}: name "
        "another file with --out, or remove it"
    )


def save_per_example(path: Path, arrays: Mapping[str, NDArray[Any]], keep: bool = False) -> None:
    """Write what :func:`arat_fast.evaluation.suite.per_example` found (.npz); ``keep`` leaves in
    what the file holds of other attacks on the same images."""
    content: dict[str, Any] = {**(read_arrays(path) or {} if keep else {}), **arrays}
    write_atomic(path, lambda file: np.savez(file, **content))
