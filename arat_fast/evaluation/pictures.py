"""What a trained network offers beside its logits: class names, decoding, answers to pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from arat_fast.data.framing import Framing
from arat_fast.data.loader import cut_out
from arat_fast.datasets.decoding import decode_image
from arat_fast.datasets.members import files_below, is_image
from arat_fast.device import resolve_device
from arat_fast.display import Display
from arat_fast.evaluation.evaluate import evaluation_mode
from arat_fast.saved.network import SavedNetwork, Which, read_saved

Picture: TypeAlias = Any
"""The path of an image file, a PIL image, or an array (H, W) or (H, W, 3) of uint8."""

_BATCH = 64
"""Pictures that are decoded and answered at once."""
_LUMA = np.array([299, 587, 114]) / 1000
"""Weights of red, green and blue in grey: ITU-R BT.601."""


class Answer(NamedTuple):
    """The most probable class by its name, or its number, and its softmax probability."""

    label: str
    confidence: float


@dataclass(frozen=True)
class Prediction:
    """The answer to one file, as in :class:`Answer`; where it cannot be read ``label`` is empty and
    ``problem`` says why in a sentence."""

    file: Path
    label: str = ""
    confidence: float = 0.0
    problem: str = ""


class LoadedNetwork(nn.Module):
    """A network that :func:`arat_fast.load` has read.

    Attributes:
        classes: names in the order of the logits; empty where the file has none.
        image_shape: (C, H, W) of the images it is for.
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    _saved: SavedNetwork

    def preprocess(self, images: Sequence[Picture]) -> Tensor:
        """Pictures as the network was tested on them: decoded, framed, (N, C, H, W) in [0, 1].

        Args:
            images: of any sizes.

        Raises:
            FileNotFoundError: a file is absent.
            ValueError: a file is no readable image, or an array of another kind.
        """
        pixels = [_framed(self._saved, _decoded(image)) for image in images]
        device = next(self.parameters()).device
        return torch.stack(pixels).to(device, torch.float32) / 255

    @torch.no_grad()
    def predict(self, images: Tensor | Sequence[Picture] | str | Path) -> list[Answer]:
        """The class of each image, in eval mode.

        Args:
            images: (N, C, H, W) in [0, 1], pictures for :meth:`preprocess`, or the path of one.
        """
        if isinstance(images, (str, Path)):
            images = [images]
        answers: list[Answer] = []
        was_training = self.training
        self.eval()
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH]
            x = part if isinstance(part, Tensor) else self.preprocess(part)
            best = self(x).softmax(dim=1).max(dim=1)
            for confidence, number in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                label = self.classes[number] if self.classes else str(number)
                answers.append(Answer(label, confidence))
        self.train(was_training)
        return answers


def usable(saved: SavedNetwork, model: nn.Module) -> LoadedNetwork:
    """The network with the methods of :class:`LoadedNetwork`, in place.

    Args:
        saved: what its file says.
        model: the network that is used, as :meth:`SavedNetwork.plain` gives it.
    """
    kind = type(model)
    model.__class__ = type(kind.__name__, (LoadedNetwork, kind), {})
    assert isinstance(model, LoadedNetwork)
    model.classes, model.image_shape = saved.classes, saved.image_shape
    # Without the network, which would be a part of itself.
    model._saved = dataclasses.replace(saved, model=nn.Identity())
    return model


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
        checkpoint, branch, weights, recipe: as for :func:`arat_fast.load`.
        pictures: image files, and folders, of which all image files are taken, hidden ones aside.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        one prediction a file, folders' files sorted.

    Raises:
        FileNotFoundError: a path is absent.
        ValueError: a folder without an image, or as :func:`arat_fast.load`.
    """
    files = [file for path in pictures for file in _files(path)]
    saved = read_saved(checkpoint, recipe=recipe, weights=weights)
    if saved.unfinished and saved.config and saved.steps_per_epoch:
        epoch, epochs = saved.unfinished[0] // saved.steps_per_epoch, saved.config.train.epochs
        Display().say(f"the run has not come to its end: epoch {epoch} of {epochs} is done")
    model = usable(saved, saved.plain(branch)[0].to(resolve_device(device)))
    found: dict[Path, Prediction] = {}
    with evaluation_mode(model):
        for start in range(0, len(files), _BATCH):
            seen: dict[Path, Tensor] = {}
            for file in files[start : start + _BATCH]:
                try:
                    seen[file] = model.preprocess([file])
                except (ValueError, OSError) as error:
                    found[file] = Prediction(file, problem=str(error))
            answers = model.predict(torch.cat([*seen.values()])) if seen else []
            found |= {f: Prediction(f, *answer) for f, answer in zip(seen, answers, strict=True)}
    return [found[file] for file in files]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no picture at {path}")
    files = [file for file in files_below(path) if is_image(file.name)]
    if not files:
        raise ValueError(f"{path}: expected a folder with images, got none in it")
    return files


def _decoded(image: Picture) -> npt.NDArray[np.uint8]:
    if isinstance(image, (str, Path)):
        return decode_image(Path(image).read_bytes(), str(image))
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"a picture is expected as (H, W) or (H, W, 3) uint8, got {pixels.dtype} of shape "
            f"{pixels.shape}"
        )
    return pixels


def _framed(saved: SavedNetwork, image: npt.NDArray[np.uint8]) -> Tensor:
    """What the network sees of a picture (height, width, 3), uint8: (C, H, W), uint8."""
    channels, rows, columns = saved.image_shape
    height, width = image.shape[:2]
    kind = saved.facts.get("crop")
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
