"""Checkpoints: everything a run needs to go on, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from arat_fast.files import write_atomic
from arat_fast.interop.weights import read_tensor_file

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the previous one stays whole until the new one is on disk.

    Args:
        path: the file.
        state: tensors, numbers, strings, and lists and dictionaries of them.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    content = {"format": FORMAT, **state}
    try:
        write_atomic(path, lambda file: torch.save(content, file))
    except RuntimeError as error:
        # torch's archive writer reports a failed write as a RuntimeError.
        cause = error.__context__
        reason = cause if isinstance(cause, OSError) else error
        raise OSError(f"cannot write {path}: {reason}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without unpickling anything but tensors and plain types.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut, or was not written by :func:`save_checkpoint`.
    """
    return training_state(read_tensor_file(path), path)


def training_state(content: object, path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` was given, from the content of its file.

    Args:
        content: of the file.
        path: the file, for the error.

    Raises:
        ValueError: the content is another, or of another version's format.
    """
    if not is_training_checkpoint(content):
        raise ValueError(
            f"{path} is not a training checkpoint, expected one written by arat-fast train"
        )
    assert isinstance(content, dict)
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {content['format']}, expected {FORMAT}")
    return content


def is_training_checkpoint(content: object) -> bool:
    """Whether what a file holds was written by :func:`save_checkpoint`."""
    return isinstance(content, dict) and "format" in content
