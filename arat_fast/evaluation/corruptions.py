"""Accuracy on published images that are corrupted, averaged as published."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import nn

from arat_fast.config import Config, ModelConfig
from arat_fast.datasets.corruptions import FOLDERS, corrupted_images
from arat_fast.device import describe_device, resolve_device, source_commit, versions
from arat_fast.display import Display, SuiteProgress
from arat_fast.evaluation.evaluate import ImageSet, clean_accuracy
from arat_fast.evaluation.pieces import checksum
from arat_fast.files import write_json
from arat_fast.saved.network import read_saved, read_weights


def corruption_accuracy(
    model: nn.Module,
    name: str,
    root: Path,
    *,
    device: torch.device,
    batch_size: int,
    max_samples: int = 0,
    progress: SuiteProgress | None = None,
) -> dict[str, Any]:
    """Accuracy of the ``adv`` branch on CIFAR-10-C or CIFAR-100-C; nothing attacks the images.

    Args:
        model: the network, on ``device``, of the classes in the dataset's order.
        name, root: cifar10-c or cifar100-c, and where it lies.
        device: where the images go.
        batch_size: samples at a time, >= 1.
        max_samples: the first ones of each severity only; 0 for all.
        progress: told after each corruption.

    Returns:
        "mean", the mean over all corruptions and severities, in [0, 1]; "corruptions", by name the
        accuracies by severity, from 1 to 5; "num_samples", images of each severity.

    Raises:
        FileNotFoundError, ValueError: as for
            :func:`arat_fast.datasets.corruptions.corrupted_images`.

    Source: Hendrycks and Dietterich, ICLR 2019 (arXiv 1903.12261): the mean over severities, then
        over corruptions, not divided by another network's as for ImageNet-C.
    """
    found: dict[str, list[float]] = {}
    number = 0
    for corruption, severities in corrupted_images(name, root):
        found[corruption] = []
        for images in severities:
            number = min(max_samples or len(images), len(images))
            pixels = torch.from_numpy(images.rows[np.arange(number)])
            x = pixels.permute(0, 3, 1, 2).contiguous().to(device, torch.float32) / 255
            part = ImageSet(x, images.labels[:number].to(device), ())
            found[corruption].append(clean_accuracy(model, part, batch_size=batch_size).accuracy)
        if progress is not None:
            progress(FOLDERS[name], len(found), 15, "corruptions")
    return {
        "mean": fmean(fmean(severities) for severities in found.values()),
        "corruptions": found,
        "num_samples": number,
    }


def evaluate_corruptions(
    checkpoint: Path,
    name: str,
    *,
    model: ModelConfig | None = None,
    recipe: str | None = None,
    data_root: Path | None = None,
    batch_size: int | None = None,
    max_samples: int = 0,
    device: str = "auto",
    out: Path | None = None,
) -> dict[str, Any]:
    """:func:`corruption_accuracy` of a saved network, whoever wrote it, with a record of it.

    Args:
        checkpoint, model, recipe, device: as for
            :func:`arat_fast.evaluation.checkpoint.evaluate_checkpoint`.
        name, max_samples: as for :func:`corruption_accuracy`.
        data_root, batch_size: where the images lie, and samples at a time; None for the run's.
        out: file for the record; None for none.

    Raises:
        FileNotFoundError: no such checkpoint, or a file of the images is absent.
        ValueError: the network is of another number of classes.
    """
    classes = 100 if name == "cifar100-c" else 10
    config = Config(recipe="", model=model or ModelConfig())
    if model is None:
        saved = read_saved(checkpoint, recipe=recipe)
        config = saved.config or config
    else:
        saved = read_weights(checkpoint, config, classes, (3, 32, 32))
    if (saved.num_classes, saved.image_shape) != (classes, (3, 32, 32)):
        raise ValueError(
            f"{saved.path} is a network of {saved.num_classes} classes for images of "
            f"{saved.image_shape}, expected {classes} and (3, 32, 32) for {name}"
        )
    on = resolve_device(device)
    network = saved.plain()[0].to(on)
    with Display().evaluating() as bar:
        found = corruption_accuracy(
            network,
            name,
            (data_root or config.data.root).expanduser(),
            device=on,
            batch_size=batch_size or config.eval.batch_size,
            max_samples=max_samples,
            progress=bar,
        )
    record = {
        "checkpoint": str(saved.path),
        "model": saved.weights,
        "weights_sha256": checksum(saved.model),
        "dataset": name,
        **found,
        "device": describe_device(on),
        "versions": versions(),
        "commit": source_commit(),
    }
    if out is not None:
        write_json(out, record)
    return record
