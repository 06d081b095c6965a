"""Files that are never half-written."""

from __future__ import annotations

import codecs
import fcntl
import itertools
import json
import os
import shutil
import socket
import sys
import time
import uuid
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

MAX_RATIO = 100
"""Bytes that one byte of an archive may unpack to, beyond the first MiB; images are below 20, and
what this package writes is not compressed."""
LOCK = ".lock"
"""Of a folder in which one job writes at a time."""
WAIT_SECONDS = 2.0
"""For another process that writes the same file or folder, before it is said."""


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
        if not _is_at(descriptor, work):
            raise OSError(f"cannot write {path}: {work.name} is gone or another process's")
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
        FileExistsError: there are files in it.
        OSError: it cannot be made.
    """
    with scratch_folder(path) as work:
        # The process that was waited for may have made it.
        check_empty(path)
        yield work
        settle(work, path)


def check_empty(path: Path) -> None:
    """FileExistsError where there is anything at ``path`` but an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} has files in it already: choose another --out or OUT")


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, which is removed in the end; of two processes one waits."""
    work = _beside(path)
    make_folder(path.parent)
    # A file of its own: NFS locks no folders.
    with named(path), alone(path.with_name(f".{path.name}.lock")):
        try:
            _remove(work)
            work.mkdir()
            yield work
        finally:
            _remove(work)


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
def alone(work: Path) -> Iterator[int]:
    """Make a file, or take one that was left, and keep every other process waiting for it until it
    is removed, or renamed, with a word where that takes long; on a file system without locks,
    whoever comes later takes its name.

    Args:
        work: the file.

    Returns:
        Its descriptor.
    """
    while True:
        descriptor = _new_file(work)
        try:
            try:
                _wait(descriptor, work)
            except OSError:
                # Two must not write into one file.
                work.unlink(missing_ok=True)
                left, descriptor = descriptor, _new_file(work, os.O_EXCL)
                os.close(left)
            # Whoever held the lock has removed or renamed it.
            if not _is_at(descriptor, work):
                continue
            try:
                yield descriptor
            finally:
                if _is_at(descriptor, work):
                    work.unlink()
                # A process that was forked meanwhile has the file open too.
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            return
        finally:
            os.close(descriptor)


def _wait(descriptor: int, work: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
    print(
        f"arat-fast: waiting for another process, which writes {work}", file=sys.stderr, flush=True
    )
    fcntl.flock(descriptor, fcntl.LOCK_EX)


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


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or nested so deeply that no writer here made it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut, damaged or something else; names the file.
    """
    content = path.read_bytes()
    try:
        found = parse_json(content)
        if isinstance(found, dict):
            return found
        reason = f"{type(found).__name__}"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{path}: expected a JSON object, got {len(content)} bytes: {reason}")


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
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def check_ratio(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse an archive that unpacks to more than :data:`MAX_RATIO` says.

    Raises:
        ValueError: names ``path``.
    """
    for member in archive.infolist():
        if member.file_size > MAX_RATIO * (member.compress_size + 2**20):
            raise ValueError(
                f"{path}: {member.compress_size:,} bytes unpack to {member.file_size:,}, expected "
                f"at most {MAX_RATIO} times as many"
            )


def set_aside(path: Path) -> Path:
    """Rename a file that is damaged, so that it is neither used nor lost; its new name."""
    names = (path.with_name(f"{path.name}.damaged{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    os.replace(path, aside)
    _sync(path.parent)
    return aside


class OvertakenError(OSError):
    """Another process has taken what this one had locked: it must write nothing more."""


class Lock:
    """The right to write, of one job at a time.

    The lock is the system's (``flock``) and ends with the last process that holds it, killed or
    not. The file names the holder, and goes with a holder that releases it.

    On NFS, Linux passes such a lock on to the server, so that it holds between machines. Where the
    file system has none (``nolock`` and ``local_lock`` mounts, some parallel ones), and
    where a machine that was thought lost comes back, whoever came last is named in the file, and
    :meth:`check` tells the one before.

    Args:
        path: the file, made with its folder if absent.
        holder: of another process of the same job, as :attr:`holder` of its lock, once that has
            called :meth:`share`: this one holds the lock too. A process that does not see its file
            (the folder is on another machine) holds nothing.

    Attributes:
        holder: what the file says of the job.

    Raises:
        BlockingIOError: a process that lives holds the lock.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, holder: str | None = None) -> None:
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
        make_folder(path.parent)
        with named(path):
            while True:
                # For reading too: NFS asks for it.
                self._file = open(path, "a+b")  # noqa: SIM115  # lives as long as the lock
                self._take()
                # Whoever held the lock may have removed the file.
                if _is_at(self._file.fileno(), path):
                    break
                self._file.close()
            try:
                self._file.truncate(0)
                self._file.write(self.holder.encode())
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError:
                # Whoever keeps the error, with its frames, would keep the lock.
                with suppress(OSError):
                    self._file.close()
                raise

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
        with self._file, suppress(OSError):
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

    def _take(self, shared: bool = False) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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
        with suppress(FileNotFoundError):
            return self.path.read_text(encoding="utf-8", errors="replace")
        return ""

    def _leave(self) -> None:
        if self._file is not None:
            self._file.close()


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _after_fork() -> None:
    # A data loader's worker can outlive a run that was killed, which may go on meanwhile.
    for lock in _LOCKS:
        lock._leave()


os.register_at_fork(after_in_child=_after_fork)


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


@contextmanager
def written_here(path: Path) -> Iterator[None]:
    """What fails in here on values that nothing in this package has written into the records at
    ``path`` is a ValueError that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} holds records that arat-fast has not written: {type(error).__name__}: {error}"
        ) from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _new_file(path: Path, flags: int = 0) -> int:
    # Never through a link that another user has put there, nor into the file of another name that
    # a killed link_atomic has left here.
    with suppress(FileNotFoundError):
        if path.lstat().st_nlink > 1:
            path.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags, 0o666)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
