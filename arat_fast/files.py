"""Files that are never half-written."""

from __future__ import annotations

import codecs
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


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text, with or without the mark that some systems put first.

    Raises:
        ValueError: a line is in another encoding.
    """
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line}: expected UTF-8, got another encoding; save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}: line {line}: expected UTF-8 text, got a zero byte")
    return text.replace("\r\n", "\n").split("\n")
