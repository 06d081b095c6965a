"""A disk that fails: what a program does to the files below a folder, call by call, with what a
crash or a power loss at each of them leaves, and with errors at any of them.

Everything that Python does to files goes through ``os`` and ``open``, which :class:`Disk` stands in
for. It follows POSIX to the letter: content is on disk once its file is synced, a name once its
folder is.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Tree = dict[str, "bytes | None"]
"""Content of files by path; None for a folder."""

MODES = ("killed", "lost", "torn", "mixed")
"""killed: the process alone ends. lost: nothing that was not synced is there. torn: every name is
there, and of content that was not synced a half. mixed: of what was not synced, any part."""


class _File:
    def __init__(self, content: bytes = b"", durable: bytes | None = None) -> None:
        self.content = content
        self.durable = durable


class _Folder:
    def __init__(self) -> None:
        self.names: dict[str, _File | _Folder] = {}
        self.durable: dict[str, _File | _Folder] = {}
        self.pending: list[dict[str, _File | _Folder | None]] = []

    def change(self, **names: _File | _Folder | None) -> None:
        """Give names, or take them away: None."""
        self.pending.append(names)
        _change(self.names, names)

    def sync(self) -> None:
        """What was changed is on disk."""
        self.durable, self.pending = dict(self.names), []

    def some(self, chance: random.Random) -> dict[str, _File | _Folder]:
        """As it is where some of the changes came to the disk."""
        names = dict(self.durable)
        for change in self.pending:
            if chance.random() < 0.5:
                _change(names, change)
        return names


def _change(names: dict[str, _File | _Folder], change: dict[str, _File | _Folder | None]) -> None:
    names.update({name: node for name, node in change.items() if node is not None})
    for name in [name for name, node in change.items() if node is None]:
        names.pop(name, None)


@dataclass
class Disk:
    """Records what happens below ``root``; at call ``fail_at`` and, with ``stays``, at all after it
    raises OSError ``error`` instead, once half of a write is done.

    Attributes:
        calls: what was done, in words.
        crashes: for each call, what is left by a crash in the middle of it, by mode.
    """

    root: Path
    fail_at: int | None = None
    error: int = errno.ENOSPC
    stays: bool = False
    record: bool = True
    calls: list[str] = field(default_factory=list)
    crashes: list[dict[str, Tree]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._top = _Folder()
        for path in sorted(self.root.rglob("*")):
            folder, name = self._place(path)
            content = path.read_bytes() if path.is_file() else b""
            folder.names[name] = _Folder() if path.is_dir() else _File(content, content)
            folder.durable[name] = folder.names[name]

    # What the program calls.

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """Stand in for the system's calls."""
        self.real_open, real = builtins.open, {name: getattr(os, name) for name in _CALLS}
        real_start = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            # Calls come in one order.
            real_start(thread)
            if thread.name == "checkpoint":
                thread.join()

        with pytest.MonkeyPatch.context() as patch:
            for name, method in _CALLS.items():
                patch.setattr(os, name, self._standing_in(real[name], getattr(self, method)))
            patch.setattr(builtins, "open", self._open)
            patch.setattr(io, "open", self._open)
            patch.setattr(threading.Thread, "start", start)
            yield self
        known, found = self.tree(), read_tree(self.root)
        assert known == found, "files were written by other means than os and open"

    def _standing_in(self, real: Callable[..., Any], method: Callable[..., Any]) -> Any:
        return lambda *values, **keywords: method(real, *values, **keywords)

    def _open(self, file: Any, mode: str = "r", *values: Any, **keywords: Any) -> Any:
        path = self._path(file)
        if path is None or not set(mode) & set("wax+"):
            return self.real_open(file, mode, *values, **keywords)
        assert "b" in mode, "text files are written by write_text"
        if isinstance(file, int):
            opened = os.dup(file)
            if keywords.get("closefd", True):
                os.close(file)
        else:
            flags = {"w": os.O_TRUNC, "a": os.O_APPEND, "x": os.O_EXCL}[mode[0]]
            opened = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        return _Opened(self, opened, self._node(path), path)

    def _os_open(self, real: Any, path: Any, flags: int, mode: int = 0o777, **keywords: Any) -> int:
        inside = self._path(path, keywords.get("dir_fd"))
        if inside is None or not flags & os.O_CREAT:
            return int(real(path, flags, mode, **keywords))
        folder, name = self._place(inside)
        new = name not in folder.names

        def apply() -> int:
            # Without O_APPEND, which forbids to write at a place.
            opened = int(real(path, flags & ~os.O_APPEND, mode, **keywords))
            if new:
                folder.change(**{name: _File()})
            if flags & os.O_TRUNC:
                self._file(inside).content = b""
            return opened

        if new or (flags & os.O_TRUNC and self._file(inside).content):
            return int(self._call(f"create {inside}", apply))
        return apply()

    def _fsync(self, real: Any, descriptor: int) -> None:
        path = self._path(descriptor)
        if path is None:
            real(descriptor)
            return
        folder, name = self._place(path)
        if path != self.root and name not in folder.names:
            # Written past Python, as below.
            folder.change(**{name: _File()})
        node = self._node(path)

        def apply() -> None:
            if isinstance(node, _Folder):
                node.sync()
            else:
                # Some write past Python.
                node.content = node.durable = path.read_bytes()

        self._call(f"sync {path}", apply)

    def _rename(self, real: Any, source: Any, target: Any) -> None:
        def change(inside: Path, outside: Path) -> None:
            before, name = self._place(inside)
            after, new = self._place(outside)
            node = before.names[name]
            if node is after.names.get(new):
                return
            if before is after:
                before.change(**{name: None, new: node})
            else:
                after.change(**{new: node})
                before.change(**{name: None})

        self._two(real, "rename", source, target, change)

    def _link(self, real: Any, source: Any, target: Any, **keywords: Any) -> None:
        def change(inside: Path, outside: Path) -> None:
            folder, name = self._place(outside)
            folder.change(**{name: self._node(inside)})

        self._two(real, "link", source, target, change)

    def _two(
        self, real: Any, words: str, source: Any, target: Any, change: Callable[[Path, Path], None]
    ) -> None:
        before, after = self._path(source), self._path(target)
        if before is None and after is None:
            real(source, target)
            return
        assert before is not None and after is not None

        def apply() -> None:
            real(source, target)
            change(before, after)

        self._call(f"{words} {before} {after}", apply)

    def _remove(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        inside = self._path(path, dir_fd)
        if inside is None:
            real(path, dir_fd=dir_fd)
            return
        folder, name = self._place(inside)

        def apply() -> None:
            real(path, dir_fd=dir_fd)
            folder.change(**{name: None})

        if name in folder.names:
            self._call(f"remove {inside}", apply)
        else:
            real(path, dir_fd=dir_fd)

    def _mkdir(self, real: Any, path: Any, mode: int = 0o777, **keywords: Any) -> None:
        inside = self._path(path)
        if inside is None or inside.exists() or not inside.parent.exists():
            real(path, mode, **keywords)
            return
        folder, name = self._place(inside)

        def apply() -> None:
            real(path, mode, **keywords)
            folder.change(**{name: _Folder()})

        self._call(f"mkdir {inside}", apply)

    # The model.

    def _call(
        self, words: str, apply: Callable[[], Any], half: Callable[[], None] | None = None
    ) -> Any:
        with self._lock:
            number = len(self.calls)
            self.calls.append(words.replace(f"{self.root}/", ""))
            if self.fail_at is not None:
                # A full disk lets go of files.
                spared = self.error == errno.ENOSPC and words.startswith("remove")
                failing = number == self.fail_at or (self.stays and number > self.fail_at)
                if failing and not spared:
                    if half is not None:
                        half()
                    # As the system: what is done to an open file has no name.
                    kind, path = words.split()[:2]
                    name = None if kind in ("sync", "write") else os.path.relpath(path)
                    raise OSError(self.error, os.strerror(self.error), name)
            elif self.record:
                if half is not None:
                    half()
                chance = random.Random(number)
                self.crashes.append({mode: self.tree(mode, chance) for mode in MODES})
            return apply()

    def written(self, path: Path, node: _File, content: bytes, descriptor: int) -> None:
        """``content`` is to be that of an open file."""
        start = len(os.path.commonprefix([node.content, content]))

        def put(new: bytes) -> None:
            os.ftruncate(descriptor, min(len(node.content), len(new)))
            os.pwrite(descriptor, new[start:], start)
            node.content = new

        middle = start + (len(content) - start) // 2
        if content != node.content:
            self._call(f"write {path}", lambda: put(content), lambda: put(content[:middle]))

    def tree(self, mode: str = "killed", chance: random.Random | None = None) -> Tree:
        """What a crash now leaves."""
        found: Tree = {}

        def walk(folder: _Folder, prefix: str) -> None:
            names = folder.durable if mode == "lost" else folder.names
            if mode == "mixed":
                assert chance is not None
                names = folder.some(chance)
            for name, node in names.items():
                path = f"{prefix}{name}"
                if isinstance(node, _Folder):
                    if name != "tensorboard":
                        found[path] = None
                        walk(node, f"{path}/")
                else:
                    found[path] = _content(node, mode, chance)

        walk(self._top, "")
        return found

    def _path(self, file: Any, dir_fd: int | None = None) -> Path | None:
        """The file, if it is one below the root and no log of TensorBoard's."""
        if isinstance(file, int):
            path = Path(os.readlink(f"/proc/self/fd/{file}"))
        elif dir_fd is not None:
            path = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / os.fsdecode(file)
        else:
            path = Path(os.path.abspath(os.fsdecode(file)))
        inside = path.is_relative_to(self.root) and "tensorboard" not in path.parts
        return path if inside else None

    def _place(self, path: Path) -> tuple[_Folder, str]:
        folder = self._top
        for part in path.relative_to(self.root).parts[:-1]:
            node = folder.names[part]
            assert isinstance(node, _Folder)
            folder = node
        return folder, path.name

    def _node(self, path: Path) -> _File | _Folder:
        if path == self.root:
            return self._top
        folder, name = self._place(path)
        return folder.names[name]

    def _file(self, path: Path) -> _File:
        node = self._node(path)
        assert isinstance(node, _File)
        return node


_CALLS = {
    "open": "_os_open",
    "fsync": "_fsync",
    "replace": "_rename",
    "rename": "_rename",
    "link": "_link",
    "unlink": "_remove",
    "remove": "_remove",
    "rmdir": "_remove",
    "mkdir": "_mkdir",
}


class _Opened(io.BufferedIOBase):
    """A file that is written when it is flushed, synced or closed."""

    def __init__(self, disk: Disk, descriptor: int, node: Any, path: Path) -> None:
        self._disk, self._descriptor, self._node = disk, descriptor, node
        self._content = bytearray(node.content)
        self._at = len(self._content)
        self.name = str(path)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        self._content[self._at : self._at + len(content)] = content
        self._at += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._content))[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        del self._content[size:]
        self.flush()
        return size

    def fileno(self) -> int:
        return self._descriptor

    def flush(self) -> None:
        if not self.closed and bytes(self._content) != self._node.content:
            path = Path(self.name)
            try:
                self._disk.written(path, self._node, bytes(self._content), self._descriptor)
            except OSError:
                # What could not be written is not tried again when the file is closed.
                self._content = bytearray(self._node.content)
                raise

    def close(self) -> None:
        if self.closed:
            return
        try:
            super().close()
        finally:
            os.close(self._descriptor)


def _content(node: _File, mode: str, chance: random.Random | None) -> bytes:
    durable = node.durable or b""
    if mode == "killed" or node.content == node.durable:
        return node.content
    if mode == "lost":
        return durable
    start = len(os.path.commonprefix([node.content, durable]))
    middle = start + (len(node.content) - start) // 2
    torn = node.content[:middle] + bytes(len(node.content) - middle)
    if mode == "torn":
        return torn
    assert chance is not None
    return chance.choice([node.content, durable, torn, node.content[:middle]])


def read_tree(root: Path) -> Tree:
    """What is below a folder, but for TensorBoard's logs."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
        if "tensorboard" not in path.parts
    }


def write_tree(root: Path, tree: Tree) -> None:
    """Make the files of a tree below a folder."""
    root.mkdir(parents=True)
    for name, content in sorted(tree.items()):
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
