"""What a trained network offers beside its logits: class names, decoding, answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from arat_fast.datasets.decoding import decode_image
from arat_fast.evaluation.pictures import framed
from arat_fast.saved.network import SavedNetwork

Picture: TypeAlias = Any
"""The path of an image file, a PIL image, or an array (H, W) or (H, W, 3) of uint8."""

_BATCH = 64


class Answer(NamedTuple):
    """The most probable class by its name, or its number, and its softmax probability."""

    label: str
    confidence: float


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
        pixels = [framed(self._saved, _decoded(image)) for image in images]
        device = next(self.parameters()).device
        return torch.stack(pixels).to(device, torch.float32) / 255

    @torch.no_grad()
    def predict(self, images: Tensor | Sequence[Picture]) -> list[Answer]:
        """The class of each image, in eval mode.

        Args:
            images: (N, C, H, W) in [0, 1], or pictures for :meth:`preprocess`.
        """
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


def _decoded(image: Picture) -> Any:
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
