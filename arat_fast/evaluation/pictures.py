"""What a trained network says of image files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arat_fast.data.framing import Framing, Kind
from arat_fast.data.loader import cut_out
from arat_fast.datasets import DATASETS
from arat_fast.datasets.decoding import decode_image
from arat_fast.datasets.members import files_below, is_image
from arat_fast.device import resolve_device
from arat_fast.evaluation.evaluate import evaluation_mode
from arat_fast.saved.network import SavedNetwork, Which, read_saved

_BATCH = 64
"""Pictures that are decoded and answered at once."""
_LUMA = np.array([299, 587, 114]) / 1000
"""Weights of red, green and blue in grey: ITU-R BT.601."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one file.

    Attributes:
        file: the image.
        label: name of the most probable class, its number where the network has no names; "" for a
            file that cannot be read.
        confidence: its softmax probability, in [0, 1].
        problem: why it cannot be read, in a sentence; "" where it can.
    """

    file: Path
    label: str = ""
    confidence: float = 0.0
    problem: str = ""


def predict_pictures(
    checkpoint: Path,
    pictures: Sequence[Path],
    *,
    branch: Literal["adv", "clean"] | None = None,
    weights: Which = "deployed",
    recipe: str | None = None,
    device: str = "auto",
) -> list[Prediction]:
    """The class of each picture.

    Decoded and framed as the test images of the run were. Where those were arrays of one size, a
    picture of another size is cut to their shape in its middle and scaled; where they were grey, it
    becomes grey.

    Args:
        checkpoint: as :func:`arat_fast.load` takes it.
        pictures: image files, and folders, of which all image files are taken, hidden ones aside.
        branch, weights, recipe: as :func:`arat_fast.load`.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        one prediction a file, folders' files sorted.

    Raises:
        FileNotFoundError: a path is absent.
        ValueError: a folder without an image, or as :func:`arat_fast.load`.
    """
    files = [file for path in pictures for file in _files(path)]
    saved = read_saved(checkpoint, recipe=recipe, weights=weights)
    on = resolve_device(device)
    model = saved.plain(branch)[0].to(on)
    found: list[Prediction] = []
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(files), _BATCH):
            found += _answers(saved, model, files[start : start + _BATCH], on)
    return found


def _answers(
    saved: SavedNetwork, model: torch.nn.Module, files: Sequence[Path], device: torch.device
) -> Iterable[Prediction]:
    pixels: dict[Path, Tensor] = {}
    problems: dict[Path, str] = {}
    for file in files:
        try:
            pixels[file] = framed(saved, decode_image(file.read_bytes(), str(file)))
        except (ValueError, OSError) as error:
            problems[file] = str(error)
    answers = {}
    if pixels:
        x = torch.stack(list(pixels.values())).to(device, torch.float32) / 255
        best = model(x).softmax(1).max(1)
        answers = dict(zip(pixels, zip(*map(Tensor.tolist, best), strict=True), strict=True))
    for file in files:
        if file in problems:
            yield Prediction(file, problem=problems[file])
        else:
            confidence, number = answers[file]
            label = saved.classes[number] if saved.classes else str(number)
            yield Prediction(file, label, confidence)


def framed(saved: SavedNetwork, image: npt.NDArray[np.uint8]) -> Tensor:
    """What the network sees of a picture (height, width, 3), uint8: (C, H, W), uint8."""
    channels, rows, columns = saved.image_shape
    height, width = image.shape[:2]
    kind: Kind | None = None
    if saved.config is not None and DATASETS[saved.config.data.name].image_size is None:
        kind = DATASETS[saved.config.data.name].crop
        if kind is not None and saved.config.data.crop != "auto":
            kind = saved.config.data.crop
    if kind is None:
        # The largest part in the middle of the shape of the network's images.
        scale = min(height / rows, width / columns)
        part = [round(rows * scale), round(columns * scale)]
        box = [(height - part[0]) // 2, (width - part[1]) // 2, *part]
    else:
        nothing = torch.zeros(1, Framing.NUM_DRAWS, dtype=torch.float64)
        boxes, _ = Framing(rows, kind).place([height], [width], nothing)
        box = boxes[0].tolist()
    picture = torch.empty(3, rows, columns, dtype=torch.uint8)
    cut_out(image, box, False, picture)
    if channels == 1:
        grey = np.tensordot(_LUMA, picture.numpy(), 1).round()
        return torch.from_numpy(grey.astype(np.uint8))[None]
    return picture


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no picture at {path}")
    files = [file for file in files_below(path) if is_image(file.name)]
    if not files:
        raise ValueError(f"{path}: expected a folder with images, got none in it")
    return files
