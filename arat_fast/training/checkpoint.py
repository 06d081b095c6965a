"""Checkpoints: everything a run needs to go on, bit for bit."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path
from typing import Any

import torch

from arat_fast.files import write_atomic

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
    state = read_checkpoint_file(path)
    if not is_training_checkpoint(state):
        raise ValueError(
            f"{path} is not a training checkpoint, expected one written by arat-fast train"
        )
    assert isinstance(state, dict)
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {state['format']}, expected {FORMAT}")
    return state


def is_training_checkpoint(content: object) -> bool:
    """Whether what a file holds was written by :func:`save_checkpoint`."""
    return isinstance(content, dict) and "format" in content


def read_checkpoint_file(path: Path) -> object:
    """Content of a file of tensors and plain types, on the CPU; nothing else is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut, or is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as e:
        # A zip archive without its end makes torch seek before the start: EINVAL.
        if isinstance(e, OSError) and e.errno != errno.EINVAL:
            raise
        size = path.stat().st_size
        raise ValueError(
            f"{path} is not a whole checkpoint: got an unreadable file of {size} bytes; it was cut "
            "or is of another kind"
        ) from e
