"""Checkpoints: everything a run needs to go on, bit for bit."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arat_fast.files import write_atomic

FORMAT = 2
CHECKPOINT = "checkpoint.pt"
BEST = "checkpoint-best.pt"
_CHUNK = 2**24
_FOLDER = 0x10
"""The attribute of a folder in a zip archive."""


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
        ValueError: the file is cut, its content differs from its checksums, or it was not written
            by :func:`save_checkpoint`.
    """
    return training_state(read_tensor_file(path), path)


def read_tensor_file(path: Path) -> object:
    """Content of a file written by ``torch.save``, on the CPU.

    Only tensors and plain types are unpickled: no code in the file runs. The content is compared
    with its checksums first.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut, damaged or of another kind; names the file and its size.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    check_archive(path)
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
        return content
    # Damaged content can raise anything.
    except Exception as error:
        # A zip archive without its end makes torch seek before the start: EINVAL.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(
            f"{path} is not a whole checkpoint: expected a file of tensors written by torch.save, "
            f"got {path.stat().st_size} bytes that cannot be read; it was cut or is of another kind"
        ) from error


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


def check_archive(path: Path) -> None:
    """Compare the content of a file of ``torch.save`` with the checksums in it; torch does not.

    Args:
        path: the file; one that is no such archive at all passes, and is for the reader to refuse.

    Raises:
        ValueError: a part of the file differs from its CRC-32, or its headers are damaged.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # torch leaves the memory of what is marked as a folder as it finds it.
            if any(info.external_attr & _FOLDER for info in archive.infolist()):
                raise ValueError("a tensor is marked as a folder")
    except zipfile.BadZipFile:
        return
    # Damaged headers can raise anything; one that points beyond what a file can be, EINVAL.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(
            f"{path} is not a whole checkpoint: its headers were damaged after it was written"
        ) from error
    if damaged is not None:
        raise ValueError(
            f"{path} is not a whole checkpoint: {damaged!r} differs from its checksum; the file "
            "was damaged after it was written"
        )


class Found(NamedTuple):
    """A checkpoint that can be read: its file, its content, and what was wrong with newer ones."""

    path: Path
    state: dict[str, Any]
    problems: tuple[str, ...]


class CheckpointFolder:
    """The checkpoints of one run: ``checkpoint.pt`` is the newest; those before it have their step
    in their name; ``checkpoint-best.pt`` is the best by validation.

    A checkpoint is copied at once and written by a thread, so that training goes on meanwhile. The
    newest one on disk is replaced only by a whole one.

    Args:
        folder: of the run.
        keep_last: checkpoints kept, the newest included; >= 1.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.newest_step: int | None = None
        self._damaged: list[Path] = []
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    @property
    def newest(self) -> Path:
        """The file of the newest checkpoint."""
        return self.folder / CHECKPOINT

    def exists(self) -> bool:
        """Whether there is a checkpoint, readable or not."""
        return bool(self._candidates())

    def find(self) -> Found | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Those that are passed over as damaged are removed once another one has been written.

        Raises:
            ValueError: none of them is whole; says why, of each.
            OSError: one cannot be read, which may pass: it is no reason to give it up.
        """
        problems: list[str] = []
        damaged: list[Path] = []
        for path in self._candidates():
            try:
                _read_through(path)
                state = load_checkpoint(path)
            except ValueError as error:
                problems.append(str(error))
                damaged.append(path)
                continue
            except OSError as error:
                raise OSError(
                    f"{path} cannot be read: {error.strerror or error}; it was left as it is: try "
                    "again, or move it away to go on from the one before"
                ) from error
            # A newest one that is damaged is not worth keeping.
            self.newest_step = None if damaged else state["progress"]["step"]
            self._damaged = damaged
            return Found(path, state, tuple(problems))
        if problems:
            raise ValueError("; ".join(problems))
        return None

    def save(self, step: int, state: dict[str, Any], before: Callable[[], object]) -> None:
        """Copy ``state`` and write it in the background, after the one before it is written.

        Args:
            step: of the state.
            state: as for :func:`save_checkpoint`; may change once this has returned.
            before: called by the thread first, to bring other files to disk.

        Raises:
            OSError: the checkpoint before could not be written.
        """
        self.wait()
        copied = _Copy(state)

        def write() -> None:
            try:
                before()
                self._keep_the_one_before(step)
                save_checkpoint(self.newest, copied.on_host())
                self.newest_step = step
                self._remove_old()
            except OSError as error:
                self._error = error
            # Whatever it is: training must not go on without checkpoints.
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                self._error = OSError(f"cannot write {self.newest}: {reason}")
                self._error.__cause__ = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
            OSError: it could not be written; the one before is whole.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the OSError of a write that has failed, for whatever reason; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def keep_as_best(self) -> None:
        """Keep the newest checkpoint as the best one."""
        self.wait()
        _link(self.newest, self.folder / BEST)

    def remove_leftovers(self) -> None:
        """Remove what a process that was killed in the middle of writing has left."""
        for path in self.folder.glob(".checkpoint*.pt.*"):
            path.unlink()

    def _candidates(self) -> list[Path]:
        newest = [self.newest] if self.newest.exists() else []
        return newest + self._before()[::-1]

    def _before(self) -> list[Path]:
        """The checkpoints before the newest, in the order in which they were written.

        Another number of processes can number the steps anew: the names do not tell the order.
        """
        found = []
        for path in self.folder.glob("checkpoint-*.pt"):
            match = re.fullmatch(r"checkpoint-(\d+)\.pt", path.name)
            if match:
                found.append((path.stat().st_mtime_ns, int(match[1]), path))
        return [path for *_, path in sorted(found)]

    def _keep_the_one_before(self, step: int) -> None:
        if self.keep_last == 1 or self.newest_step in (None, step) or not self.newest.exists():
            return
        _link(self.newest, self.folder / f"checkpoint-{self.newest_step:08}.pt")

    def _remove_old(self) -> None:
        damaged, self._damaged = self._damaged, []
        for path in damaged:
            if path != self.newest:
                path.unlink(missing_ok=True)
        before = self._before()
        for path in before[: max(0, len(before) - (self.keep_last - 1))]:
            path.unlink(missing_ok=True)


class _Copy:
    """A copy of a state, made on its device at once and brought to the host later."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._device: torch.device | None = None
        self._copy: dict[str, Any] = _map_tensors(state, self._clone)
        self._made: Any = None
        if self._device is not None:
            self._made = torch.cuda.current_stream(self._device).record_event()

    def _clone(self, tensor: Tensor) -> Tensor:
        if tensor.is_cuda:
            self._device = tensor.device
        return tensor.detach().clone()

    def on_host(self) -> dict[str, Any]:
        """The state on the CPU, once, from any thread."""
        copy = self._copy
        self._copy = {}
        if self._device is not None:
            # On a stream of its own: the training's does not wait for the bus.
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_event(self._made)
            with torch.cuda.stream(stream):
                copy = _map_tensors(copy, Tensor.cpu)
            stream.synchronize()
        return copy


def _map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``value`` with every tensor in its dictionaries, lists and tuples changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        # Of whatever kind: a state_dict carries metadata that is not state.
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


def _read_through(path: Path) -> None:
    """OSError where a file cannot be read to its end: zipfile and torch take that for damage."""
    with open(path, "rb") as file:
        while file.read(_CHUNK):
            pass


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, in place of what had it; a copy where the file system has no such
    thing."""
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as content:
            write_atomic(target, lambda file: shutil.copyfileobj(content, file))
        return
    os.replace(temporary, target)
    # Two names of one file stay as they are.
    temporary.unlink(missing_ok=True)
