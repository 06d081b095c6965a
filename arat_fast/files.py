"""Files that are never half-written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that either the whole new one or the old one is there.

    The content goes to a temporary file in the same folder, is synced to disk and renamed; where
    that fails (a full disk, an interrupt), the temporary file is removed and the old one stays.

    Args:
        path: the file; its folder exists.
        write: called with the open binary file.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    try:
        _write_atomic(path, write)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def _write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """:func:`write_atomic` for content that is there already."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_atomic(path, write)


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomic` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """:func:`write_atomic` for JSON; NaN is refused with a ValueError, since no reader takes it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
