"""Files that are never half-written."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""Of a folder in which one job writes at a time."""


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


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or nested so deeply that no writer here made it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut, damaged or no JSON; names the file.
    """
    content = path.read_bytes()
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(
            f"{path} is not whole: expected JSON, got {len(content)} bytes ({error})"
        ) from error


class OvertakenError(OSError):
    """Another process has taken what this one had locked: it must write nothing more."""


class Lock:
    """The right to write, of one job at a time.

    The lock is the system's (``flock``) and ends with the last process that holds it, killed or
    not. The file names the holder, and goes with a holder that releases it.

    On NFS, Linux passes such a lock on to the server, so that it holds between machines. Where the
    file system has none (``nolock`` and ``local_lock`` mounts, some parallel ones, Windows), and
    where a machine that was thought lost comes back, whoever came last is named in the file, and
    :meth:`check` tells the one before.

    Args:
        path: the file, made with its folder if absent.
        wait: for as long as others hold it, instead of refusing.
        holder: of another process of the same job, as :attr:`holder` of its lock, once that has
            called :meth:`share`: this one holds the lock too. A process that does not see its file
            (the folder is on another machine) holds nothing.

    Attributes:
        holder: what the file says of the job.

    Raises:
        BlockingIOError: a process that lives holds the lock.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, *, wait: bool = False, holder: str | None = None) -> None:
        self.path = path
        self.holder = holder or f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4()}"
        self._file: IO[bytes] | None = None
        self._made_folder = False
        _LOCKS.add(self)
        if holder is not None:
            if self._content() == holder:
                self._file = open(path, "rb")  # noqa: SIM115  # lives as long as the lock
                self._take(shared=True)
            return
        self._made_folder = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            # For reading too: NFS asks for it.
            self._file = open(path, "a+b")  # noqa: SIM115  # lives as long as the lock
            self._take(wait=wait)
            # Whoever held the lock has removed the file; others may have made and locked a new one.
            if self._is_in_place():
                break
            self._file.close()
        self._file.truncate(0)
        self._file.write(self.holder.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def share(self) -> None:
        """Let other processes of the same job hold the lock too."""
        self._take(shared=True)

    def check(self) -> None:
        """Whether the lock is still this job's.

        Raises:
            OvertakenError: another process has taken it, or the file is gone.
        """
        if (content := self._content()) != self.holder:
            taker = content.partition(",")[0] or "whoever has removed that file"
            raise OvertakenError(
                f"{self.path.parent} was taken over by {taker}: this process ends, and leaves it "
                "as it is"
            )

    def fileno(self) -> int:
        """The descriptor by which a child process can hold the lock too."""
        assert self._file is not None
        return self._file.fileno()

    def release(self) -> None:
        """Give the lock up; the last one that holds it removes the file."""
        if self._file is None or self._file.closed:
            return
        with self._file, contextlib.suppress(OSError):
            self._take()
            self.check()
            self.path.unlink()
            if self._made_folder:
                self.path.parent.rmdir()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _take(self, *, shared: bool = False, wait: bool = False) -> None:
        if fcntl is None:
            return
        assert self._file is not None
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(self._file, kind | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = self._content().partition(",")[0]
            self._file.close()
            raise BlockingIOError(
                f"another process is at work in {self.path.parent} ({holder or 'unknown'}): wait "
                "for it, or choose another folder with --out"
            ) from None
        except OSError:
            # No locks here.
            return

    def _content(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.path.read_text(encoding="utf-8", errors="replace")
        return ""

    def _is_in_place(self) -> bool:
        assert self._file is not None
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        return False

    def _leave(self) -> None:
        if self._file is not None:
            self._file.close()


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _after_fork() -> None:
    # A data loader's worker can outlive a run that was killed, which may go on meanwhile.
    for lock in _LOCKS:
        lock._leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
