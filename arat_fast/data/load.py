"""The datasets by name, as the splits of a run."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arat_fast.config import DataConfig
from arat_fast.data.arrays import ArrayRows, JoinedRows, StreamedBatches
from arat_fast.data.bad_images import BadImages
from arat_fast.data.batches import Batches, ResidentBatches, check_samples
from arat_fast.data.dali import DaliBatches, has_dali
from arat_fast.data.datasets import (
    Arrays,
    Images,
    hold_out_a_tenth,
    list_tiny_imagenet,
    read_arrays,
    read_imagenette,
    stratified_split,
)
from arat_fast.data.fingerprint import Fingerprint, fingerprint, names_below
from arat_fast.data.formats import array_folder, class_folders, decode_all, tar_shards
from arat_fast.data.framing import Framing, Kind
from arat_fast.data.images import LoaderBatches
from arat_fast.data.plan import WHOLE, BatchPlan, MixedPlan, Shard, seeded_generator
from arat_fast.data.sources import EncodedImages

if TYPE_CHECKING:
    from arat_fast.distributed import Ranks

_CROPS: dict[str, Kind] = {"imagenette": "pad"}
_EVALUATION_SEED = 21
_PROBE_STREAM = 1
_PART = 2**26
"""Bytes that are copied to the device at a time."""


class DataSplits(NamedTuple):
    """The splits of a run.

    Attributes:
        train: shuffled and augmented.
        probe: the same images, in another order and with other augmentation.
        val: images held out of training, in a fixed order, not augmented; None for none.
        test: the test images of the dataset, in a fixed order, not augmented. The first images of
            either are a sample of all classes.
        fingerprint: of the training images, generated ones included.
        skipped: files that were left out, and why.
    """

    train: Batches
    probe: Batches
    val: Batches | None
    test: Batches
    fingerprint: Fingerprint
    skipped: tuple[str, ...] = ()


def load_data(
    config: DataConfig,
    *,
    device: torch.device,
    seed: int,
    eval_batch_size: int,
    memory_format: torch.memory_format = torch.contiguous_format,
    shard: Shard = WHOLE,
    bad_images: BadImages | None = None,
) -> DataSplits:
    """Read a dataset and split it.

    Args:
        config: which dataset, where it is and how training augments it.
        device: where the batches go; images in arrays stay there as a whole where they fit.
        seed: of order and augmentation, >= 0; the held-out images do not depend on it.
        eval_batch_size: samples in a batch of ``val`` and ``test``.
        memory_format: of the training images that stay on the device.
        shard: this process; all ranks share every batch of ``train`` and ``probe``, while ``val``
            and ``test`` are whole on each, which reads the batches that it evaluates.
        bad_images: finds the files to leave out, where ``config.bad_images`` is "skip".

    Raises:
        FileNotFoundError: the dataset is absent, or could not be downloaded.
        ValueError: a file is not the published one, an image or a label does not fit, or
            ``num_val`` leaves too few images to train on.
    """
    arguments = (config, device, seed, eval_batch_size, memory_format, shard)
    if config.name in ("imagenette", "folder", "webdataset"):
        return _encoded_splits(*arguments, bad_images or BadImages())
    return _array_splits(*arguments)


def download_data(config: DataConfig, ranks: Ranks) -> None:
    """Fetch a published dataset where it is absent and asked for, so that all processes find it.

    Rank 0 first, then the first processes of the other machines, one after the other: whatever
    disks they share, files are fetched once for each, and never by two at once.

    Args:
        config: which dataset, and where it is.
        ranks: the processes; each calls this. One of its own leaves it to :func:`load_data`.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_data`.
    """
    if not config.download or ranks.alone:
        return
    local_ranks = ranks.gather(torch.tensor(ranks.local_rank)).tolist()
    for rank, local_rank in enumerate(local_ranks):
        if rank > 0 and local_rank > 0:
            continue
        if rank == ranks.rank:
            _fetch(config)
        ranks.meet()


def _fetch(config: DataConfig) -> None:
    if config.name == "imagenette":
        read_imagenette(config)
    elif config.name == "tiny-imagenet":
        list_tiny_imagenet(config)
    elif config.name not in ("folder", "webdataset"):
        read_arrays(config)


def _array_splits(
    config: DataConfig,
    device: torch.device,
    seed: int,
    eval_batch_size: int,
    memory_format: torch.memory_format,
    shard: Shard,
) -> DataSplits:
    dataset = read_arrays(config)
    try:
        for part in (dataset.train, dataset.val, dataset.test):
            if part is not None and isinstance(part.rows, ArrayRows):
                check_samples(
                    part.rows.images, part.labels, len(dataset.classes), dataset.max_value
                )
        return _make_array_splits(
            dataset, config, device, seed, eval_batch_size, memory_format, shard
        )
    except ValueError as error:
        raise ValueError(f"dataset {config.name}: {error}") from error


def _make_array_splits(
    dataset: Arrays,
    config: DataConfig,
    device: torch.device,
    seed: int,
    eval_batch_size: int,
    memory_format: torch.memory_format,
    shard: Shard,
    framing: Framing | None = None,
) -> DataSplits:
    train, val = dataset.train, dataset.val
    if config.num_val:
        chosen, held_out = stratified_split(train.labels, _num_val(config, val))
        train, val = train.subset(chosen), train.subset(held_out)
    num_original = train.rows.shape[0]
    if config.unsup is not None:
        train = _with_generated(train, config.unsup.expanduser(), len(dataset.classes))

    def plan(training_seed: int) -> BatchPlan:
        if config.unsup is None:
            return BatchPlan(
                num_original, config.batch_size, shuffle=True, seed=training_seed, shard=shard
            )
        return MixedPlan(
            num_original,
            train.rows.shape[0] - num_original,
            config.batch_size,
            config.unsup_fraction,
            seed=training_seed,
            shard=shard,
        )

    parts = [part for part in (train, val, dataset.test) if part is not None]
    num_bytes = sum(math.prod(part.rows.shape) for part in parts)
    loader: str = config.loader
    if loader == "auto":
        # On a CPU PyTorch copies and crops arrays faster than DALI.
        streamed = "dali" if device.type == "cuda" and has_dali() else "dataloader"
        loader = "resident" if num_bytes <= _room(device) else streamed

    def make(images: Images, plans: list[BatchPlan], training: bool) -> list[Batches]:
        padding = config.padding if training else 0
        flip = config.flip and training
        layout = memory_format if training else torch.contiguous_format
        if loader != "resident":
            return [
                StreamedBatches(
                    images.rows,
                    images.labels,
                    dataset.classes,
                    one,
                    device=device,
                    loader=loader,
                    max_value=dataset.max_value,
                    padding=padding,
                    flip=flip,
                    memory_format=layout,
                    num_workers=config.num_workers,
                )
                for one in plans
            ]
        # Once for all: on a CPU in the format of the batches, as ResidentBatches keeps it.
        stored = layout if device.type == "cpu" else torch.contiguous_format
        x, y = _on_device(images, device, stored), images.labels.to(device)
        return [
            ResidentBatches(
                x,
                y,
                dataset.classes,
                batch_size=one.batch_size,
                max_value=dataset.max_value,
                padding=padding,
                flip=flip,
                memory_format=layout,
                plan=one,
                framing=framing if training else None,
            )
            for one in plans
        ]

    def evaluated(images: Images) -> Batches:
        one = BatchPlan(images.rows.shape[0], eval_batch_size)
        return make(images, [one], False)[0]

    training = make(train, [plan(seed), plan(_probe_seed(seed))], True)
    return DataSplits(
        train=training[0],
        probe=training[1],
        val=evaluated(val) if val is not None else None,
        test=evaluated(dataset.test),
        fingerprint=fingerprint(train.labels),
    )


def _num_val(config: DataConfig, val: object | None) -> int:
    """How many images to hold out, which a dataset with validation images does without."""
    if config.num_val and val is not None:
        raise ValueError(
            "the dataset has validation images of its own, expected data.num_val 0, got "
            f"{config.num_val}"
        )
    return config.num_val


def _with_generated(train: Images, folder: Path, num_classes: int) -> Images:
    rows, labels = array_folder(folder)
    if int(labels.max()) >= num_classes:
        raise ValueError(
            f"{folder}: pseudo-labels must lie in [0, {num_classes - 1}], got {int(labels.max())}"
        )
    return Images(JoinedRows([train.rows, rows]), torch.cat([train.labels, labels]))


def _on_device(images: Images, device: torch.device, memory_format: torch.memory_format) -> Tensor:
    """All images on the device, (num_samples, C, H, W), uint8; a memory map is copied in parts, so
    that it is never in the memory of the host as a whole beside its copy."""
    rows = images.rows
    number, height, width, channels = rows.shape
    if device.type == "cpu" and isinstance(rows, ArrayRows):
        return rows.images.contiguous(memory_format=memory_format)
    copied = torch.empty(
        (number, channels, height, width),
        dtype=torch.uint8,
        device=device,
        memory_format=memory_format,
    )
    rows_per_part = max(_PART // (height * width * channels), 1)
    for start in range(0, number, rows_per_part):
        part = rows.take(np.arange(start, min(start + rows_per_part, number)))
        copied[start : start + len(part)] = torch.from_numpy(part).to(device).permute(0, 3, 1, 2)
    return copied


def _room(device: torch.device) -> int:
    """Bytes that a dataset may take on a device: half of what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 2**32


def _probe_seed(seed: int) -> int:
    return seeded_generator(seed, _PROBE_STREAM).initial_seed()


def _encoded_splits(
    config: DataConfig,
    device: torch.device,
    seed: int,
    eval_batch_size: int,
    memory_format: torch.memory_format,
    shard: Shard,
    bad_images: BadImages,
) -> DataSplits:
    if config.unsup is not None:
        raise ValueError(
            f"data.unsup is mixed with images in arrays (cifar10, …), got data.name {config.name}"
        )
    root = config.root.expanduser()
    if config.name == "imagenette":
        dataset = read_imagenette(config)
    else:
        dataset = class_folders(root) if config.name == "folder" else tar_shards(root)
    train, val, test, skipped = dataset.train, dataset.val, dataset.test, list(dataset.bad)
    if config.bad_images == "skip":
        train, reasons = _readable(train, root, bad_images)
        skipped += reasons
        if val is not None:
            val, reasons = _readable(val, root, bad_images)
            skipped += reasons
        if test is not None:
            test, reasons = _readable(test, root, bad_images)
            skipped += reasons
    elif skipped:
        more = f" (and {len(skipped) - 1:,} files more)" if len(skipped) > 1 else ""
        raise ValueError(f"{skipped[0]}{more}; remove it, or pass --data.bad-images skip")
    if test is None:
        chosen, tenth = hold_out_a_tenth(train.labels)
        train, test = train.subset(chosen), train.subset(tenth)
    if config.num_val:
        chosen, held_out = stratified_split(train.labels, _num_val(config, val))
        train, val = train.subset(chosen), train.subset(held_out)
    test, val = _mixed(test), None if val is None else _mixed(val)
    identity = fingerprint(train.labels, names_below(train, root))
    cut = config.crop if config.crop != "auto" else _CROPS.get(config.name, "resized")
    evaluated = Framing(config.image_size, cut)
    trained = Framing(config.image_size, cut, True, config.padding, config.flip)
    loader = config.loader
    if loader == "auto":
        loader = "dali" if has_dali() else "dataloader"
    if loader == "resident":
        if cut == "resized":
            raise ValueError(
                "data.loader resident keeps images of one size: it needs --data.crop pad with "
                f"images of {config.image_size} x {config.image_size} pixels"
            )
        arrays = Arrays(
            _decode_all(train, config.image_size),
            _decode_all(test, config.image_size),
            dataset.classes,
            val=None if val is None else _decode_all(val, config.image_size),
        )
        splits = _make_array_splits(
            arrays,
            dataclasses.replace(config, num_val=0),
            device,
            seed,
            eval_batch_size,
            memory_format,
            shard,
            trained,
        )
        return splits._replace(fingerprint=identity, skipped=tuple(skipped))

    def batches(source: EncodedImages, training_seed: int | None = None) -> Batches:
        training = training_seed is not None
        kind = DaliBatches if loader == "dali" else LoaderBatches
        return kind(
            source,
            dataset.classes,
            trained if training else evaluated,
            batch_size=config.batch_size if training else eval_batch_size,
            device=device,
            shuffle=training,
            seed=training_seed or 0,
            shard=shard if training else WHOLE,
            num_workers=config.num_workers,
        )

    return DataSplits(
        train=batches(train, seed),
        probe=batches(train, _probe_seed(seed)),
        val=None if val is None else batches(val),
        test=batches(test),
        fingerprint=identity,
        skipped=tuple(skipped),
    )


def _readable(
    source: EncodedImages, root: Path, bad_images: BadImages
) -> tuple[EncodedImages, list[str]]:
    """The images that can be decoded, and what is wrong with the others."""
    bad = bad_images.among(source, root)
    readable = [index for index in range(len(source)) if index not in bad]
    kept = torch.tensor(readable, dtype=torch.int64)
    for label in set(source.labels.tolist()) - set(source.labels[kept].tolist()):
        first = next(index for index in bad if int(source.labels[index]) == label)
        raise ValueError(f"no image with label {label} can be read; {bad[first]}")
    return source.subset(kept), list(bad.values())


def _decode_all(source: EncodedImages, size: int) -> Images:
    expected = f"with data.image_size {size} data.loader resident needs"
    return Images(ArrayRows(decode_all(source, size, expected)), source.labels)


def _mixed(source: EncodedImages) -> EncodedImages:
    """The samples in another fixed order: the folders are sorted by class, and evaluation takes
    the first images where it is asked for fewer than all."""
    return source.subset(torch.randperm(len(source), generator=seeded_generator(_EVALUATION_SEED)))
