"""Checkpoints: everything a run needs to go on, bit for bit."""

from __future__ import annotations

import io
import re
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arat_fast.files import Lock, check_ratio, link_atomic, write_atomic
from arat_fast.training.memory import is_out_of_memory

FORMAT = 2
CHECKPOINT = "checkpoint.pt"
BEST = "checkpoint-best.pt"
_ARCHIVE = b"PK\x03\x04"
_FOLDER = 0x10
"""The attribute of a folder in a zip archive."""
_KINDS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: run git lfs pull"),
    (b"<", "a web page (HTML or XML), not the file itself: download it again"),
    (b"\x1f\x8b", "compressed with gzip: unpack it with gunzip"),
    (b"BZh", "compressed with bzip2: unpack it with bunzip2"),
    (b"\xfd7zXZ", "compressed with xz: unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it with unzstd"),
    (b"7z\xbc\xaf", "an archive of 7-Zip: unpack it"),
    (b"{", "JSON text, no tensors: give the file of the weights"),
    (b"\x93NUMPY", "an array of NumPy: expected tensors by name"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it: expected one of PyTorch"),
)


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
        OSError: the file cannot be read, whatever is in it.
    """
    return training_state(read_tensor_file(path), path)


def read_tensor_file(path: Path) -> object:
    """Content of a file written by ``torch.save``, on the CPU.

    Only tensors and plain types are unpickled: no code in the file runs. The content is compared
    with its checksums first, which torch does not do.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut, damaged or of another kind, which it names, or holds objects of
            other classes, which are never unpickled.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    # In memory: whatever goes wrong from here on lies in the content, not in the disk.
    return read_tensors(path.read_bytes(), path)


def read_tensors(raw: bytes, path: Path) -> object:
    """:func:`read_tensor_file` of a file that is in memory already."""
    file = io.BytesIO(raw)
    members: list[str] = []
    try:
        # What torch takes for an archive; files of before torch 1.6 have no checksums.
        if raw.startswith(_ARCHIVE):
            with zipfile.ZipFile(file) as archive:
                check_ratio(archive, path)
                # torch leaves the memory of what is marked as a folder as it finds it.
                folders = any(info.external_attr & _FOLDER for info in archive.infolist())
                if folders or archive.testzip() is not None:
                    raise ValueError("the content differs from its checksums")
                members = [name.rpartition("/")[2] for name in archive.namelist()]
            if "constants.pkl" in members:
                raise ValueError("a program, which torch.load would run")
        file.seek(0)
        content: object = torch.load(file, map_location="cpu", weights_only=True)
        return content
    # Damaged content can raise anything.
    except Exception as error:
        # What its checksums say is whole is not given up because memory is short just now.
        if members and (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign and members:
            raise ValueError(
                f"{path} is not a whole checkpoint that can be read safely: it holds objects of "
                f"{foreign[1]}; where you trust it, keep the weights alone, content = "
                f"torch.load({path.name!r}, weights_only=False), then torch.save of its state dict "
                '(content["state_dict"], or content.state_dict() of a whole network)'
            ) from error
        raise ValueError(
            f"{path} is not a whole checkpoint: expected a file of tensors written by torch.save, "
            f"got {kind_of(raw, members)}"
        ) from error


def kind_of(content: bytes, members: Sequence[str] = ()) -> str:
    """What a file is that cannot be read as weights, in words, and the way out.

    Args:
        content: of the file.
        members: names in it, of a zip archive that is whole.
    """
    if "constants.pkl" in members:
        return "a TorchScript program: save the state_dict() of what torch.jit.load reads"
    if members and "data.pkl" not in members:
        return f"a zip archive of {members[0] or 'folders'} and others: unpack it"
    if content[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if content[8:9] == b"{" and not content.startswith(b"{"):
        return "a safetensors file: give it the suffix .safetensors"
    for start, kind in _KINDS:
        if content.lstrip().startswith(start):
            return kind
    return f"{len(content)} bytes that were cut, damaged or are of another kind"


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


class Found(NamedTuple):
    """A checkpoint that can be read: its file, its content, and what was wrong with newer ones."""

    path: Path
    state: dict[str, Any]
    problems: tuple[str, ...]


class CheckpointFolder:
    """The checkpoints of one run: ``checkpoint.pt`` is the newest; those before it are numbered in
    the order in which they were written; ``checkpoint-best.pt`` is the best by validation.

    A checkpoint is copied at once and written by a thread, so that training goes on meanwhile. The
    newest one on disk is replaced only by a whole one.

    Args:
        folder: of the run.
        keep_last: checkpoints kept, the newest included; >= 1.
        lock: of the folder; nothing is written once another process has it. None: nobody else is
            there.
    """

    def __init__(self, folder: Path, keep_last: int, lock: Lock | None = None) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.lock = lock
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
        damaged: dict[Path, str] = {}
        for path in self._candidates():
            try:
                state = load_checkpoint(path)
            except ValueError as error:
                damaged[path] = str(error)
                continue
            except OSError as error:
                raise OSError(
                    f"{path} cannot be read: {error.strerror or error}; it was left as it is: try "
                    "again, or move it away to go on from the one before"
                ) from error
            # A newest one that is damaged is not worth keeping.
            self.newest_step = None if damaged else state["progress"]["step"]
            self._damaged = list(damaged)
            return Found(path, state, tuple(damaged.values()))
        if damaged:
            raise ValueError("; ".join(damaged.values()))
        return None

    def save(
        self, step: int, state: dict[str, Any], before: Callable[[], object], best: bool = False
    ) -> None:
        """Copy ``state`` and write it in the background, after the one before it is written.

        Args:
            step: of the state.
            state: as for :func:`save_checkpoint`; may change once this has returned.
            before: called by the thread first, to bring other files to disk.
            best: keep it as the best one too.

        Raises:
            OSError: the checkpoint before could not be written.
        """
        self.wait()
        on_host = _copy(state)

        def write() -> None:
            try:
                before()
                self._check_lock()
                if self.keep_last > 1 and self.newest_step not in (None, step):
                    self._keep_newest()
                # The best one first: a run that ends in between goes on from before it.
                target = self.folder / BEST if best else self.newest
                save_checkpoint(target, on_host())
                if best:
                    link_atomic(target, self.newest)
                self.newest_step = step
                self._remove_old()
            # Whatever it is: training must not go on without checkpoints.
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                wrapped = OSError(f"cannot write {self.newest}: {reason}")
                self._error = error if isinstance(error, OSError) else wrapped

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
        """Raise the OSError of a write that has failed, for whatever reason; does not wait.

        Raises:
            OvertakenError: another process goes on with the run: nothing may be written any more.
        """
        self._check_lock()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _check_lock(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _candidates(self) -> list[Path]:
        newest = [self.newest] if self.newest.exists() else []
        return [*newest, *self._before()]

    def _before(self) -> list[Path]:
        """The checkpoints before the newest, the last one that was written first."""
        found = [p for p in self.folder.glob("checkpoint-*.pt") if p.stem[11:].isdecimal()]
        return sorted(found, key=_number, reverse=True)

    def _keep_newest(self) -> None:
        """Give the newest checkpoint the next number, which neither clocks nor steps decide: steps
        can be numbered anew for another number of processes."""
        before = self._before()
        # A process that was killed before it replaced the newest has left it with two names.
        if self.newest.exists() and not (before and self.newest.samefile(before[0])):
            number = _number(before[0]) + 1 if before else 1
            link_atomic(self.newest, self.folder / f"checkpoint-{number:08}.pt")

    def _remove_old(self) -> None:
        while self._damaged:
            path = self._damaged.pop()
            if path != self.newest:
                path.unlink(missing_ok=True)
        for path in self._before()[self.keep_last - 1 :]:
            path.unlink(missing_ok=True)


def _number(path: Path) -> int:
    return int(path.stem[11:])


def _copy(state: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Copy a state on its device, at once; what is returned brings it to the host, in any thread.

    Called once: the copy on the device is then gone.
    """
    devices: set[torch.device] = set()

    def clone(tensor: Tensor) -> Tensor:
        if tensor.is_cuda:
            devices.add(tensor.device)
        return tensor.detach().clone()

    copy: dict[str, Any] = _map_tensors(state, clone)
    made = {device: torch.cuda.current_stream(device).record_event() for device in devices}

    def on_host() -> dict[str, Any]:
        nonlocal copy
        for device, event in made.items():
            # On a stream of its own: the training's does not wait for the bus.
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_event(event)
            with torch.cuda.stream(stream):
                copy = _map_tensors(copy, Tensor.cpu)
            stream.synchronize()
        return copy

    return on_host


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
