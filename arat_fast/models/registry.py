"""Built-in networks by name, with the layers ARAT regularises in each."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from arat_fast.models.layers import Norm
from arat_fast.models.resnet import BasicBlock, Bottleneck, ResNet
from arat_fast.models.timm_network import TimmNetwork
from arat_fast.models.wide_resnet import WideResNet


@dataclass(frozen=True)
class ModelSpec:
    """How a built-in network is made and which of its layers are regularised.

    Attributes:
        build: constructor; takes num_classes, in_channels, norm, mean and std.
        regularized_layers: module paths, in the order of the forward pass.
        image_size: height and width that it is meant for, in pixels.
        has_batch_norm: whether there is BatchNorm, which ARAT splits; without, it is the invariance
            loss and its predictor only.
        stem: module path of the first convolution, which the image enters.
        classifier: module path of the last layer, which gives the logits.
    """

    build: Callable[..., nn.Module]
    regularized_layers: tuple[str, ...]
    image_size: int
    has_batch_norm: bool = True
    stem: str = "conv1"
    classifier: str = "linear"


_LAST_STAGE_18 = tuple(f"layer4.{block}.bn{i}" for block in (0, 1) for i in (1, 2))

MODELS: dict[str, ModelSpec] = {
    "resnet8": ModelSpec(
        partial(ResNet, BasicBlock, (1, 1, 1), (32, 64, 128)),
        ("layer3.0.bn1", "layer3.0.bn2"),
        8,
    ),
    "resnet8-s2": ModelSpec(
        partial(ResNet, BasicBlock, (1, 1, 1), (32, 64, 128), stem="strided"),
        ("layer3.0.bn1", "layer3.0.bn2"),
        28,
    ),
    "resnet18": ModelSpec(
        partial(ResNet, BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512)), _LAST_STAGE_18, 32
    ),
    # The published list names relu1 and relu2 of each block: the ReLU of bn1 and bn2, which is the
    # feature taken at bn1 and bn2 here.
    "wrn34-10": ModelSpec(
        partial(WideResNet, 34, 10),
        (*(f"block3.layer.{block}.bn{i}" for block in range(5) for i in (1, 2)), "avgpool"),
        32,
        classifier="fc",
    ),
    "resnet50": ModelSpec(
        partial(ResNet, Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), stem="imagenet"),
        tuple(f"layer4.{block}.bn{i}" for block in range(3) for i in (1, 2, 3)),
        224,
    ),
    "convnext-t": ModelSpec(
        partial(TimmNetwork, "convnext_tiny"),
        tuple(f"network.stages.3.blocks.{block}" for block in range(3)),
        224,
        has_batch_norm=False,
        stem="network.stem.0",
        classifier="network.head.fc",
    ),
}


def model_spec(name: str) -> ModelSpec:
    """The built-in network called ``name``; ValueError with the known names otherwise."""
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(MODELS)}{hint}")
    return MODELS[name]


def create_model(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    norm: Norm = "split",
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> nn.Module:
    """Build a network with fresh weights (PyTorch's default generator).

    Args:
        name: resnet8 (8×8 images), resnet8-s2 (28×28), resnet18, wrn34-10 (32×32), resnet50,
            convnext-t (224×224; the latter needs timm).
        num_classes: number of logits.
        in_channels: channels of the image.
        norm: "split" (two BatchNorm branches) or "shared" (ordinary BatchNorm).
        mean, std: per-channel normalisation inside the network; empty for none.

    Raises:
        ValueError: unknown name; timm is not installed; a norm that the network cannot have.
    """
    options: dict[str, Any] = {"norm": norm, "mean": mean, "std": std}
    return model_spec(name).build(num_classes=num_classes, in_channels=in_channels, **options)
