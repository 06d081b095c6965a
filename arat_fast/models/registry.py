"""Networks by name, with the layers ARAT regularises in the built-in ones."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from arat_fast.models.layers import Activation, Norm
from arat_fast.models.named import (
    Source,
    normalize_inputs,
    own_source,
    timm_source,
    torchvision_source,
)
from arat_fast.models.resnet import BasicBlock, Bottleneck, ResNet
from arat_fast.models.split_batch_norm import convert_split_batch_norm, copy_network
from arat_fast.models.wide_resnet import PreActResNet, WideResNet


@dataclass(frozen=True)
class ModelSpec:
    """How a built-in network is made and which of its layers are regularised.

    Attributes:
        build: constructor; takes num_classes, in_channels, norm, mean and std.
        regularized_layers: module paths, in the order of the forward pass.
        image_size: height and width that it is meant for, in pixels.
        classifier: module path of the last layer, which gives the logits.
    """

    build: Callable[..., nn.Module]
    regularized_layers: tuple[str, ...]
    image_size: int
    classifier: str = "linear"


_LAST_STAGE_18 = tuple(f"layer4.{block}.bn{i}" for block in (0, 1) for i in (1, 2))

MODELS: dict[str, ModelSpec] = {
    "resnet8": ModelSpec(
        partial(ResNet, BasicBlock, (1, 1, 1), (32, 64, 128)),
        ("layer3.0.bn1", "layer3.0.bn2"),
        8,
    ),
    "resnet8-s2": ModelSpec(
        partial(ResNet, BasicBlock, (1, 1, 1), (16, 32, 64), stem="strided"),
        ("layer3.0.bn1", "layer3.0.bn2"),
        28,
    ),
    "resnet18": ModelSpec(
        partial(ResNet, BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512)), _LAST_STAGE_18, 32
    ),
    "preact-resnet18": ModelSpec(PreActResNet, (*_LAST_STAGE_18, "bn"), 32),
    # The published list names relu1 and relu2 of each block: the ReLU of bn1 and bn2, which is the
    # feature taken at bn1 and bn2 here.
    **{
        f"wrn{depth}-{factor}": ModelSpec(
            partial(WideResNet, depth, factor),
            (
                *(f"block3.layer.{n}.bn{i}" for n in range((depth - 4) // 6) for i in (1, 2)),
                "avgpool",
            ),
            32,
            classifier="fc",
        )
        for depth, factor in ((28, 10), (34, 10), (70, 16))
    },
    "resnet50": ModelSpec(
        partial(ResNet, Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), stem="imagenet"),
        tuple(f"layer4.{block}.bn{i}" for block in range(3) for i in (1, 2, 3)),
        224,
    ),
}


LIBRARIES: dict[str, Callable[[str], Source]] = {
    "timm": timm_source,
    "torchvision": torchvision_source,
}
"""Whose networks are named ``LIBRARY:NAME``."""

sources: dict[str, Source] = {}
"""Networks that are not built in, as far as this process knows any, by name."""


def import_model(name: str) -> None:
    """Make a name known to :func:`model_source`; imports the module of one's own network, so that
    it must come from the user.

    Args:
        name: of a built-in network, ``timm:NAME``, ``torchvision:NAME``, which are looked up when
            they are built, or ``package.module:callable``, looked for where Python looks, and in
            the current folder; the callable takes ``num_classes``.

    Raises:
        ValueError: there is no such network.
    """
    if name in MODELS or name in sources:
        return
    place, colon, _ = name.partition(":")
    if not colon:
        model_spec(name)
    if place not in LIBRARIES:
        sources[name] = own_source(name)


def adopt_model(name: str, model: str | nn.Module | Callable[..., nn.Module]) -> None:
    """Let a name that a record holds mean a network that the caller has.

    Args:
        name: of a network that is not built in.
        model: a network, which is copied, a callable that takes ``num_classes``, or another name.
    """
    if isinstance(model, str):
        import_model(model)
        sources[name] = model_source(model)
    elif isinstance(model, nn.Module):
        kept = copy_network(model)
        sources[name] = Source(lambda num_classes, in_channels, image_size: copy_network(kept))
    else:
        sources[name] = Source(
            lambda num_classes, in_channels, image_size: model(num_classes=num_classes)
        )


def is_known(name: str) -> bool:
    """Whether a network can be built without importing anybody's module on a file's word."""
    return name in MODELS or name in sources or name.partition(":")[0] in LIBRARIES


def model_source(name: str) -> Source:
    """Where the network called ``name`` comes from, which is not a built-in one.

    Raises:
        ValueError: its library has none of that name, or it was never imported by the user.
    """
    library, colon, rest = name.partition(":")
    if not colon:
        model_spec(name)
    if name not in sources and library in LIBRARIES:
        sources[name] = LIBRARIES[library](rest)
    if name not in sources:
        raise ValueError(
            f"the network {name} is not imported on a file's word alone: name it yourself, "
            f"--model.name {name} on the command line, arat_fast.load(…, model=…) in Python"
        )
    return sources[name]


def image_size(name: str) -> int | None:
    """Height and width in pixels of the images that a network is meant for; None: any."""
    return MODELS[name].image_size if name in MODELS else model_source(name).image_size


def model_spec(name: str) -> ModelSpec:
    """The built-in network called ``name``; ValueError with the known names otherwise."""
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"unknown model {name!r}, expected one of {', '.join(MODELS)}, timm:NAME, "
            f"torchvision:NAME, or your own as package.module:callable{hint}"
        )
    return MODELS[name]


def create_model(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    norm: Norm = "split",
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    activation: Activation = "relu",
    image_size: int | None = None,
) -> nn.Module:
    """Build a network with fresh weights (PyTorch's default generator).

    Args:
        name: one of :data:`MODELS`, ``timm:NAME`` or ``torchvision:NAME``, or
            ``package.module:callable`` that :func:`import_model` has imported.
        num_classes: number of logits.
        in_channels: channels of the image.
        norm: "split" (two BatchNorm branches) or "shared" (ordinary BatchNorm). A network that is
            not built in is split where it has BatchNorm.
        mean, std: per-channel normalisation inside the network; empty for none, in a network of
            timm or torchvision for its own.
        activation: of the built-in networks.
        image_size: height and width in pixels, for networks that are made for one size.

    Raises:
        ValueError: unknown name; timm is not installed; a norm or an activation that the network
            cannot have.
    """
    options: dict[str, Any] = {"norm": norm, "mean": mean, "std": std}
    if activation != "relu":
        if name not in MODELS:
            raise ValueError(f"{name} has an activation of its own, got activation={activation}")
        options["activation"] = activation
    if name in MODELS:
        return MODELS[name].build(num_classes=num_classes, in_channels=in_channels, **options)
    source = model_source(name)
    model = source.make(num_classes, in_channels, image_size)
    if not mean and len(source.mean) == in_channels:
        mean, std = source.mean, source.std
    return placed(model, norm, mean, std)


def placed(
    model: nn.Module, norm: Norm, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> nn.Module:
    """A network that is not built in, as a run trains it: normalising, and split where it can be.

    Args:
        model: any network, changed in place.
        norm, mean, std: as for :func:`create_model`; empty for no normalisation.
    """
    if mean:
        normalize_inputs(model, mean, std)
    has_batch_norm = any(isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) for m in model.modules())
    return convert_split_batch_norm(model) if norm == "split" and has_batch_norm else model
