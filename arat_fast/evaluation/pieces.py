"""Finished pieces of an evaluation on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from arat_fast.files import check_ratio, make_folder, write_atomic

NOT_NPZ = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What a damaged .npz file raises, wherever the damage is."""

Tensors = dict[str, Tensor]


class Pieces:
    """Results by name, each computed once and kept in a folder.

    Each piece is one file that is written atomically, in a folder that has the first 16 digits of
    the checksum for its name: evaluations that differ do not meet, and two of the same write the
    same files.

    Args:
        folder: where the folders of evaluations are; made if absent. None keeps nothing.
        checksum: of everything that the pieces depend on, as :func:`checksum` makes it.
    """

    def __init__(self, folder: Path | None = None, checksum: str = "") -> None:
        self.folder = None if folder is None else folder / checksum[:16]
        self._own: list[Path] = []

    def get(self, name: str, compute: Callable[[], Tensors], device: torch.device) -> Tensors:
        """The piece called ``name``, from disk or from ``compute``.

        Args:
            name: letters, digits, "-" and "_".
            compute: makes the tensors of the piece.
            device: where tensors read from disk go.

        Raises:
            OSError: the piece cannot be written.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.npz"
        self._own.append(path)
        found = read_arrays(path)
        if found is not None:
            return {key: torch.from_numpy(array).to(device) for key, array in found.items()}
        tensors = compute()
        arrays: dict[str, Any] = {key: value.cpu().numpy() for key, value in tensors.items()}
        # The same evaluation in another process may have come to its end and removed the folder.
        make_folder(self.folder)
        write_atomic(path, lambda file: np.savez(file, **arrays))
        return tensors

    def remove(self) -> None:
        """Delete the pieces that were asked for, once the results are on disk; others stay."""
        if self.folder is None:
            return
        for path in self._own:
            path.unlink(missing_ok=True)
        # Another evaluation may have pieces there.
        with suppress(OSError):
            self.folder.rmdir()
            self.folder.parent.rmdir()


def read_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """The content of an .npz file; None where there is none that can be read."""
    with suppress(*NOT_NPZ), np.load(path, allow_pickle=False) as arrays:
        check_ratio(arrays.zip, path)
        return dict(arrays)
    return None


def checksum(
    model: nn.Module,
    tensors: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """SHA-256, as hexadecimal digits, of a network's weights and buffers, tensors and settings.

    Args:
        model: the network.
        tensors, settings: by name, images and labels for example, and JSON types.
    """
    digest = hashlib.sha256(json.dumps(settings or {}, sort_keys=True).encode())
    # What normalises the images is a buffer that no file keeps.
    state = {**model.state_dict(), **dict(model.named_buffers())}
    state = {f"model.{name}": tensor for name, tensor in state.items()}
    for name, tensor in sorted({**state, **(tensors or {})}.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
