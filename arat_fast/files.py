"""Files that are never half-written."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that either the whole new one or the old one is there.

    The content goes to a temporary file in the same folder, is synced to disk and renamed; where
    that fails (a full disk, an interrupt), the temporary file is removed and the old one stays.
    What a killed process has left of one is overwritten by the next; of two processes one waits.

    Args:
        path: the file; its folder exists.
        write: called with the open binary file.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    work = _beside(path)
    with named(path), alone(work) as descriptor:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.truncate(0)
            write(file)
            file.flush()
            os.fsync(descriptor)
        os.replace(work, path)
        _sync(path.parent)


@contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """Make a folder so that either all of it is there or nothing.

    As :func:`write_atomic`: what is written into the folder that is yielded is synced to disk, and
    the folder gets its name; where that fails, it is removed.

    Args:
        path: the folder; absent or empty.

    Raises:
        OSError: it cannot be made, or there are files in it.
    """
    with scratch_folder(path) as work:
        yield work
        settle(work, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, which is removed in the end; of two processes one waits."""
    work = _beside(path)
    make_folder(path.parent)
    with named(path), alone(work, _new_folder):
        for left in work.iterdir():
            _remove(left)
        yield work


def settle(source: Path, path: Path) -> None:
    """Sync a file or a folder with all that is in it to disk, and give it the name ``path``, of
    which there is nothing, a file, or an empty folder."""
    with named(path):
        for folder, _, names in os.walk(source, topdown=False):
            for name in (*names, "."):
                _sync(Path(folder, name))
        if source.is_file():
            _sync(source)
        elif path.is_dir():
            path.rmdir()
        os.replace(source, path)
        _sync(path.parent)


@contextmanager
def alone(work: Path, make: Callable[[Path], int] | None = None) -> Iterator[int]:
    """Make a file, or take one that was left, and keep every other process waiting for it until it
    is removed, or renamed; not on a file system without locks.

    Args:
        work: the file.
        make: opens it, or something else.

    Returns:
        Its descriptor.
    """
    while True:
        descriptor = (make or _new_file)(work)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Whoever held the lock has removed or renamed it.
            if not _is_at(descriptor, work):
                continue
            try:
                yield descriptor
            finally:
                if _is_at(descriptor, work):
                    _remove(work)
            return
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless they are there; they are then on disk."""
    absent = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    with named(path):
        for folder in absent:
            _sync(folder.parent)


def link_atomic(source: Path, target: Path) -> None:
    """Give a file a second name, in place of what had it; a copy where the file system has no such
    thing."""
    with named(target):
        work = _beside(target)
        work.unlink(missing_ok=True)
        try:
            os.link(source, work)
        except OSError:
            with open(source, "rb") as content:
                write_atomic(target, lambda file: shutil.copyfileobj(content, file))
            return
        os.replace(work, target)
        # Two names of one file stay as they are.
        work.unlink(missing_ok=True)
        _sync(target.parent)


def open_log(path: Path) -> BinaryIO:
    """Open a file to append to; where there was none, it is on disk, empty."""
    with named(path):
        file = open(path, "ab")  # noqa: SIM115  # the caller's
        _sync(path.parent)
        return file


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


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the disk name ``path``, and not what stands beside it meanwhile."""
    try:
        yield
    except OSError as error:
        # Without a number it has been worded already.
        if error.errno is None or error.filename not in (None, str(_beside(path))):
            raise
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _new_file(path: Path) -> int:
    # Never through a link that another user has put there.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir(exist_ok=True)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
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
