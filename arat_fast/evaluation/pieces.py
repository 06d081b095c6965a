"""Finished pieces of an evaluation on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arat_fast.files import write_atomic, write_text

Tensors = dict[str, Tensor]


class Pieces:
    """Results by name, each computed once and kept in a folder.

    Each piece is one file that is written atomically. A folder that belongs to another evaluation
    is emptied.

    Args:
        folder: where the pieces are kept; made if absent. None keeps nothing.
        checksum: of everything that the pieces depend on, as :func:`checksum` makes it.

    Attributes:
        num_reused: pieces that were found on disk.
    """

    def __init__(self, folder: Path | None = None, checksum: str = "") -> None:
        self.folder = folder
        self.num_reused = 0
        if folder is None:
            return
        label = folder / "checksum"
        with suppress(OSError, UnicodeDecodeError):
            if label.read_text(encoding="utf-8") == checksum:
                return
        self.remove()
        folder.mkdir(parents=True)
        write_text(label, checksum)

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
        # A file that cannot be read is as good as none.
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            with np.load(path, allow_pickle=False) as arrays:
                found = {key: torch.from_numpy(arrays[key]).to(device) for key in arrays.files}
            self.num_reused += 1
            return found
        tensors = compute()
        arrays = {key: value.cpu().numpy() for key, value in tensors.items()}
        write_atomic(path, lambda file: np.savez(file, **arrays))
        return tensors

    def remove(self) -> None:
        """Delete the folder: the evaluation is finished, or it is another one's."""
        if self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)


def checksum(model: nn.Module, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """SHA-256 of a network's weights, of tensors and of settings, as hexadecimal digits.

    Args:
        model: the network.
        tensors: by name, images and labels for example.
        settings: JSON types.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, tensor in sorted({**state, **tensors}.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
