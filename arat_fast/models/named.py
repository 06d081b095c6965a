"""Networks that are not built in: those of timm and torchvision, and one's own, by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from arat_fast.extras import install_command
from arat_fast.models.layers import Normalize


class Source(NamedTuple):
    """Where a network comes from, and what it is meant for.

    Attributes:
        make: number of classes, channels and size of the images in pixels → the network with fresh
            weights.
        image_size: height and width in pixels; None where the network does not say.
        mean, std: normalisation of its channels; empty for none.
        pretrained: as ``make``, with the weights that its library publishes; None where there are
            none to fetch.
    """

    make: Callable[[int, int, int | None], nn.Module]
    image_size: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    pretrained: Callable[[int, int, int | None], nn.Module] | None = None


def timm_source(name: str) -> Source:
    """A network of timm, with the configuration of its published weights.

    Args:
        name: as ``timm.create_model`` takes it; names that fetch code or files are refused.

    Raises:
        ValueError: timm is not installed, or has no such network.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"timm:{name} needs timm, which is not installed: {install_command('timm')}"
        ) from error
    if not timm.is_model(name):
        raise ValueError(_unknown("timm", name, timm.list_models()))
    own: Any = timm.get_pretrained_cfg(name)

    def make(
        num_classes: int, in_channels: int, image_size: int | None, pretrained: bool = False
    ) -> nn.Module:
        options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
        if own.fixed_input_size and image_size is not None:
            options["img_size"] = image_size
        network: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        return network

    def fetch(num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
        return make(num_classes, in_channels, image_size, True)

    return Source(make, own.input_size[-1], tuple(own.mean), tuple(own.std), fetch)


def torchvision_source(name: str) -> Source:
    """A classification network of torchvision, with the transforms of its published weights.

    Raises:
        ValueError: torchvision has no such network.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(_unknown("torchvision", name, models.list_models(module=models)))
    own = models.get_model_weights(name).DEFAULT.transforms()
    # Both give a tuple in training otherwise.
    fixed = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}

    def make(num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
        options: dict[str, Any] = {"num_classes": num_classes, **fixed}
        if name.startswith("vit_") and image_size is not None:
            options["image_size"] = image_size
        network: nn.Module = models.get_model(name, weights=None, **options)
        if in_channels != 3:
            _replace_stem(network, in_channels)
        return network

    return Source(make, own.crop_size[0], tuple(own.mean), tuple(own.std))


def own_source(name: str) -> Source:
    """What ``package.module:callable`` makes, called with ``num_classes``; imports the module, so
    that the name must come from the user.

    Raises:
        ValueError: it cannot be imported or called.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model.name={name} cannot be imported: {error}") from error
    try:
        inspect.signature(found).bind(num_classes=10)
    except TypeError as error:
        raise ValueError(
            f"{name} must be callable with num_classes alone, as def make(num_classes): {error}"
        ) from error
    return Source(lambda num_classes, in_channels, image_size: found(num_classes=num_classes))


def normalize_inputs(model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Let a network normalise its images itself, in place; module paths and state-dict names stay.

    Args:
        model: any network.
        mean, std: per channel.
    """
    kind, own = type(model), Normalize(mean, std)

    class Normalized(kind):  # type: ignore[valid-type, misc]  # a class of the moment
        def forward(self, x: Tensor) -> Any:
            return super().forward((x - self._image_mean) / self._image_std)

    Normalized.__name__ = Normalized.__qualname__ = kind.__name__
    model.__class__ = Normalized
    # Not as a module: a Sequential would run it.
    model.register_buffer("_image_mean", own.mean, persistent=False)
    model.register_buffer("_image_std", own.std, persistent=False)


def _replace_stem(network: nn.Module, in_channels: int) -> None:
    """A first convolution for images of another number of channels, in place."""
    path, stem = next((p, m) for p, m in network.named_modules() if isinstance(m, nn.Conv2d))
    parent, _, name = path.rpartition(".")
    new = nn.Conv2d(
        in_channels,
        stem.out_channels,
        stem.kernel_size,  # type: ignore[arg-type]  # two numbers
        stem.stride,  # type: ignore[arg-type]
        stem.padding,  # type: ignore[arg-type]
        bias=stem.bias is not None,
    )
    setattr(network.get_submodule(parent), name, new)


def _unknown(library: str, name: str, known: Iterable[str]) -> str:
    close = ", ".join(difflib.get_close_matches(name, known, n=3))
    return f"{library} has no network {name!r}" + (f"; close: {close}" if close else "")
