"""Networks as programs that run without their Python code: torch.export and ONNX."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arat_fast.saved.network import header

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What the extra onnx holds, and :func:`save_onnx` needs."""
FACTS = "facts.json"
"""Name of the facts inside a .pt2 archive."""


def save_program(
    model: nn.Module, image_shape: tuple[int, int, int], path: Path, facts: Mapping[str, Any]
) -> Callable[[Tensor], Tensor]:
    """Write a network with :func:`torch.export.save`, for batches of any size.

    Args:
        model: the network, in eval mode.
        image_shape: (C, H, W); fixed in the program.
        path: the file, .pt2.
        facts: JSON types, kept in the archive as ``facts.json``.

    Returns:
        What the file holds, read back: images (N, C, H, W) → logits (N, num_classes).
    """
    example, shapes = _batches(model, image_shape)
    with _quiet():
        program = torch.export.export(model, example, dynamic_shapes=shapes)
        torch.export.save(program, path, extra_files={FACTS: json.dumps(facts)})
        read: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return read


def save_onnx(
    model: nn.Module, image_shape: tuple[int, int, int], path: Path, facts: Mapping[str, Any]
) -> Callable[[Tensor], Tensor]:
    """Write a network as ONNX, input ``image``, output ``logits``, for batches of any size.

    Args:
        model: the network, in eval mode, float32.
        image_shape: (C, H, W); fixed in the file.
        path: the file; the weights are inside.
        facts: JSON types, kept as the model's metadata.

    Returns:
        What the file computes in onnxruntime on the CPU: images (N, C, H, W) → logits.
    """
    import onnxruntime

    example, shapes = _batches(model, image_shape)
    with _quiet():
        program = torch.onnx.export(
            model,
            example,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["image"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(header(facts))
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        (logits,) = session.run(None, {"image": x.numpy()})
        return torch.from_numpy(logits)

    return run


def _batches(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Two images, since torch.export takes a batch of one for a constant; any size after that."""
    images = torch.zeros(2, *image_shape, dtype=next(model.parameters()).dtype)
    return (images,), ({0: torch.export.Dim("batch", min=1)},)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about torch's own deprecated calls."""
    with warnings.catch_warnings():
        for category in (FutureWarning, UserWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield
