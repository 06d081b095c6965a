"""The records that ``arat-fast eval`` writes: where they are, and what a new one may replace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from arat_fast.config import DataConfig

_OWN_IMAGES = ("folder", "webdataset", "arrays")


def root_of_own_images(data: DataConfig) -> str | None:
    """Where images of one's own lie; None for a dataset that has the same images everywhere."""
    return str(data.root) if data.name in _OWN_IMAGES else None


def record_path(checkpoint: Path) -> Path:
    """Where the record of a checkpoint goes unless another file is asked for.

    Args:
        checkpoint: a folder or a file.
    """
    if checkpoint.is_dir():
        return checkpoint / "evaluation.json"
    return checkpoint.with_name(f"{checkpoint.stem}.evaluation.json")


def read_record(path: Path) -> dict[str, Any]:
    """The content of a record; {} where there is none that can be read."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def earlier_record(path: Path, facts: Mapping[str, Any], attacks: Sequence[str]) -> dict[str, Any]:
    """The record at ``path`` if a new one can be added to it; {} if it is to be replaced.

    Args:
        path: the file; there need be none.
        facts: what the new record says for all of its results.
        attacks: names of the results that the new one will hold beside the clean accuracy.

    Raises:
        ValueError: it holds results of the same weights that the new one would lose.
    """
    before = read_record(path)
    if before.get("weights_sha256") != facts["weights_sha256"]:
        return {}
    other = [key for key in facts if before.get(key) != facts[key]]
    if not other:
        return before
    held = [name for name in before.get("accuracy", {}) if name not in ("clean", "clean_branch")]
    lost = [name for name in held if name not in attacks]
    if lost or before.get("num_samples", 0) > facts["num_samples"]:
        raise ValueError(
            f"{path} holds {', '.join(lost or held or ['clean'])} of these weights with "
            f"{other[0]}={before.get(other[0])}, got {facts[other[0]]}: name another file with "
            "--out, or remove it"
        )
    return {}
