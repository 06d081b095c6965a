"""Pooled features of named layers, as ARAT regularises them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arat_fast.models.batch_norm import PlainBatchNorm2d
from arat_fast.models.split_batch_norm import SplitBatchNorm2d, use_statistics


@contextmanager
def collect_features(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the features of ``layers`` during the forward passes inside the context.

    The feature of a layer is the mean over positions of the ReLU of its output, (N, d) in float32
    (float64 for a float64 network). For a BatchNorm it is taken before the residual is added.

    Args:
        model: any network.
        layers: module paths, as in ``model.named_modules()``; outputs of shape (N, d, H, W),
            (N, tokens, d) or (N, d).

    Yields:
        A dictionary from path to feature, filled by each forward pass.

    Raises:
        ValueError: a path does not exist in the network.
    """
    modules = dict(model.named_modules())
    for path in layers:
        if path not in modules or not path:
            close = difflib.get_close_matches(path, modules, n=3)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise ValueError(f"the network has no layer {path!r}{hint}")
    features: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in layers:
            module, pool = modules[path], partial(_pool, features, path)
            if isinstance(module, SplitBatchNorm2d):
                module.pooled_sink = partial(features.__setitem__, path)
                stack.callback(setattr, module, "pooled_sink", None)
            elif isinstance(module, PlainBatchNorm2d):
                module.sink = pool
                stack.callback(setattr, module, "sink", None)
            else:
                handle = module.register_forward_hook(lambda _m, _x, y, pool=pool: pool(y))
                stack.callback(handle.remove)
        yield features


class _NoFeatureError(ValueError):
    """Of a layer, not of the network that has it."""


def _pool(features: dict[str, Tensor], path: str, output: Tensor) -> None:
    wide = output.double() if output.element_size() == 8 else output.float()
    wide = wide.relu()
    if wide.ndim == 4:
        wide = wide.mean(dim=(2, 3))
    elif wide.ndim == 3:
        wide = wide.mean(dim=1)
    elif wide.ndim != 2:
        raise _NoFeatureError(
            f"the output of {path} must be (N, d, H, W), (N, tokens, d) or (N, d), "
            f"got {tuple(output.shape)}"
        )
    features[path] = wide


class Layer(NamedTuple):
    """A module that ran in a forward pass: its path, itself, and the shape of its output."""

    path: str
    module: nn.Module
    shape: tuple[int, ...]


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """What a network answers, on running statistics; neither its buffers nor its mode change.

    Args:
        model: any network.
        x: images (N, C, H, W), in its dtype and on its device.

    Raises:
        ValueError: the network does not take such images.
    """
    with use_statistics(model, "running"):
        try:
            # Not through its hooks, which are for the loop's own passes.
            logits: Tensor = model.forward(x)
        except (_NoFeatureError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the network's own code runs
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the network takes no images of shape {tuple(x.shape[1:])}: {reason}; pass "
                "images, and an image_shape (C, H, W), that it is built for, or change its layers"
            ) from error
    return logits


def black_images(model: nn.Module, image_shape: tuple[int, int, int]) -> Tensor:
    """Two of them, (2, C, H, W), in the dtype and on the device of a network."""
    reference = next(model.parameters())
    return torch.zeros(2, *image_shape, device=reference.device, dtype=reference.dtype)


def run_layers(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Layer]:
    """The modules of a network in the order in which they end, found by running two black images.

    Args:
        model: any network; neither its buffers nor its mode change.
        image_shape: (C, H, W).

    Raises:
        ValueError: the network does not take such images, or gives no logits (N, classes).
    """
    layers: list[Layer] = []

    def note(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            layers.append(Layer(path, module, tuple(output.shape)))

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path:
                handle = module.register_forward_hook(partial(note, path))
                stack.callback(handle.remove)
        logits = logits_of(model, black_images(model, image_shape))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(model).__name__} is expected to give logits (N, classes), got {got}"
        )
    return layers


def default_layers(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """The layers that ARAT regularises where none are named, for any network.

    They are the BatchNorm layers of the last resolution stage, those whose outputs are as large as
    that of the last one, shortcuts aside, as published for ResNet-18. Without BatchNorm it is the
    pooled feature: the last layer before the classifier whose feature is as wide as the
    classifier's input. Empty where there is neither.

    Args:
        model: any network.
        image_shape: (C, H, W).

    Raises:
        ValueError: as :func:`run_layers`.
    """
    layers = run_layers(model, image_shape)
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm, SplitBatchNorm2d)
    norms = [layer for layer in layers if isinstance(layer.module, kinds)]
    if norms:
        main = [n for n in norms if not any(word in n.path for word in _SHORTCUTS)]
        last = main[-1].shape[2:]
        return tuple(dict.fromkeys(n.path for n in main if n.shape[2:] == last))
    classifiers = [n for n, layer in enumerate(layers) if isinstance(layer.module, nn.Linear)]
    if classifiers:
        classifier = layers[classifiers[-1]].module
        for layer in reversed(layers[: classifiers[-1]]):
            if _width(layer.shape) == classifier.in_features and not isinstance(
                layer.module, nn.Dropout
            ):
                return (layer.path,)
    return ()


def classifier_path(model: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """The module path of the layer that makes the logits: the last linear or convolutional one.

    Args:
        model: any network.
        image_shape: (C, H, W).

    Raises:
        ValueError: as :func:`run_layers`, or there is none.
    """
    for layer in reversed(run_layers(model, image_shape)):
        if isinstance(layer.module, (nn.Linear, nn.Conv2d)):
            return layer.path
    raise ValueError(f"{type(model).__name__} has no linear or convolutional layer")


_SHORTCUTS = ("shortcut", "downsample")
"""In the paths of layers beside the main path, here, in torchvision and in timm."""


def _width(shape: tuple[int, ...]) -> int | None:
    """Of the pooled feature of an output; None where there is none."""
    return {2: shape[-1], 3: shape[-1], 4: shape[1]}.get(len(shape)) if len(shape) > 1 else None
