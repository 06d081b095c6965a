"""A run from Python in one call, with a network and data of the caller's where they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from arat_fast.config import Config, ForeignModel
from arat_fast.data.given import Given
from arat_fast.datasets.given import GIVEN
from arat_fast.display import Display
from arat_fast.distributed import ALONE, Ranks
from arat_fast.models.registry import adopt_model
from arat_fast.run import loop
from arat_fast.run.hooks import Hook


class Trained(NamedTuple):
    """A run that has come to its end.

    Attributes:
        out: its folder: checkpoint, model.safetensors, metrics, summary; what
            :func:`arat_fast.load`, ``arat-fast eval`` and the other commands take.
        summary: the content of ``summary.json``.
    """

    out: Path
    summary: dict[str, Any]


def train(
    config: Config,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    train_data: Given | None = None,
    test_data: Given | None = None,
    val_data: Given | None = None,
    hooks: Sequence[Hook] = (),
    resume: bool = False,
    command: str = "",
    display: Display | None = None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Train to the end, evaluate, and write the run's folder.

    Args:
        config: what to train. Of ``config.data`` only batch_size and num_workers count where the
            data is given, of ``config.model`` norm, mean and std where the network is.
        out: folder of the run; ``arat-fast report`` writes the report into it, which this does not.
        model: any network with BatchNorm of PyTorch's, or none: images (N, C, H, W) in [0, 1] →
            logits (N, classes). It is trained itself, with its BatchNorm split in place where the
            method asks for that. Records name its class; another process that reads the run passes
            such a network to ``arat_fast.load(out, model=…)``.
        train_data, test_data: Datasets or DataLoaders of (image, label), both or neither; see
            :data:`arat_fast.data.given.Given`. Class names are the attribute ``classes``.
        val_data: images to validate on between the epochs, for ``config.train.keep_best``; None:
            the test images are looked at there.
        hooks: told of the run's course.
        resume: go on from the folder's checkpoint, bit for bit where the data allows it.
        command: to record.
        display: where progress is shown.
        ranks: the processes that train together.

    Raises:
        ValueError: the network does not take the images, only one of the datasets is given,
            ``config.data.num_val`` with them, or the configuration does not fit; others as
            :func:`arat_fast.run.loop.train`.
    """
    data = None
    if train_data is not None and test_data is not None:
        if config.data.num_val:
            raise ValueError(
                "data.num_val holds out images of a named dataset, not given ones: pass val_data "
                f"and data.num_val 0, got {config.data.num_val}"
            )
        data = train_data, test_data, val_data
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, name=GIVEN))
    elif any(each is not None for each in (train_data, test_data, val_data)):
        raise ValueError("train_data and test_data are expected together, got one, or val_data")
    if model is not None:
        kind = type(model)
        name = f"{kind.__module__}:{kind.__qualname__}"
        adopt_model(name, model)
        values = {**vars(config.model), "name": name, "activation": "relu"}
        config = dataclasses.replace(config, model=ForeignModel(**values))
    summary = loop.train(
        config,
        Path(out),
        resume=resume,
        command=command,
        display=display,
        hooks=hooks,
        ranks=ranks,
        model=model,
        data=data,
    )
    return Trained(Path(out), summary)
