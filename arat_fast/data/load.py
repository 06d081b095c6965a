"""A dataset by its name, as the splits of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arat_fast.data.bad_images import BadImages
from arat_fast.data.batches import Batches, ResidentBatches, check_samples
from arat_fast.data.dali import DaliBatches, has_dali
from arat_fast.data.fingerprint import Fingerprint, fingerprint, names_below
from arat_fast.data.framing import NO_SHIFT, Framing, Shift
from arat_fast.data.holdout import stratified_split, with_test_images, with_validation_images
from arat_fast.data.loader import LoaderBatches
from arat_fast.data.plan import WHOLE, BatchPlan, MixedPlan, Shard, seeded_generator
from arat_fast.datasets import DATASETS, Content, Dataset
from arat_fast.datasets.base import Samples, without
from arat_fast.datasets.encoded import EncodedImages, decode_all
from arat_fast.datasets.members import told
from arat_fast.datasets.prepared import array_folder, class_names
from arat_fast.datasets.rows import Images, JoinedRows, Rows
from arat_fast.datasets.splits import same_images
from arat_kernels.implementation import Impl

if TYPE_CHECKING:
    from arat_fast.config import DataConfig
    from arat_fast.distributed import Ranks

_EVALUATION_SEED = 21
_PROBE_STREAM = 1
BYTES_PER_PART = 2**26
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
        notes: on what was converted, in words.
        held_out: files that were held out of training, by split, below the dataset's root.
    """

    train: Batches
    probe: Batches
    val: Batches | None
    test: Batches
    fingerprint: Fingerprint
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    held_out: Mapping[str, Sequence[str]] = {}


def load_data(
    config: DataConfig,
    *,
    device: torch.device,
    seed: int,
    eval_batch_size: int,
    memory_format: torch.memory_format = torch.contiguous_format,
    shard: Shard = WHOLE,
    bad_images: BadImages | None = None,
    impl: Impl | None = None,
    all_to_test: bool = False,
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
        impl: implementation of the cropping; None: the fastest for the device.
        all_to_test: of a dataset without test images all are tested, rather than a tenth: nothing
            is trained on it.

    Raises:
        FileNotFoundError: the dataset is absent, or could not be downloaded.
        ValueError: a file is not the published one, an image or a label does not fit, or
            ``num_val`` leaves too few images to train on.
    """
    content = _read(config)
    own = content.parts.keys()
    try:
        content = _chosen(content, config, bad_images or BadImages(), all_to_test)
        num_original = len(content.train)
        if config.unsup is not None:
            content = _with_generated(content, config.unsup.expanduser())
        root = config.root.expanduser()
        identity = fingerprint(content.train.labels, names_below(content.train, root))
        taken = {
            split: sorted(name.lstrip("/") for name in names_below(part, root))
            for split, part in content.parts.items()
            if split not in own and isinstance(part, EncodedImages)
        }
        framing: Shift | Framing = Shift(config.padding, config.flip)
        still: Shift | Framing = NO_SHIFT
        if isinstance(content.train, EncodedImages):
            kind = config.crop
            if kind == "auto":
                kind = DATASETS[config.name].crop or "pad"
            changes = (config.padding, config.flip, config.augment)
            framing = Framing(config.image_size, kind, True, *changes)
            still = Framing(config.image_size, kind)
        loader = _loader(config, content, framing, device)
        if loader == "resident":
            expected = f"with data.image_size {config.image_size} data.loader resident needs"
            content = _in_arrays(content, config.image_size, expected)

        def plan(seed: int) -> BatchPlan:
            size = config.batch_size
            if config.unsup is None:
                return BatchPlan(num_original, size, shuffle=True, seed=seed, shard=shard)
            generated = len(content.train) - num_original
            fraction = config.unsup_fraction
            return MixedPlan(num_original, generated, size, fraction, seed=seed, shard=shard)

        def batches(
            part: Samples,
            plans: list[BatchPlan],
            framing: Shift | Framing,
            memory_format: torch.memory_format = torch.contiguous_format,
        ) -> list[Batches]:
            """As often as there are plans; the images lie on the device once."""
            make: Callable[..., Any]
            if loader == "resident":
                assert isinstance(part, Images)
                # On a CPU in the format of the batches, as ResidentBatches keeps it.
                stored = memory_format if device.type == "cpu" else torch.contiguous_format
                x, y = _on_device(part.rows, device, stored), part.labels.to(device)
                make = partial(ResidentBatches, x, y)
            else:
                streamed = DaliBatches if loader == "dali" else LoaderBatches
                make = partial(streamed, part, device=device, num_workers=config.num_workers)
            made: list[Batches] = []
            for plan in plans:
                each = make(
                    content.classes,
                    plan,
                    framing,
                    max_value=content.max_value,
                    memory_format=memory_format,
                )
                each.impl = impl
                made.append(each)
            return made

        plans = [plan(seed), plan(seeded_generator(seed, _PROBE_STREAM).initial_seed())]
        train, probe = batches(content.train, plans, framing, memory_format)
        held_out = {
            split: batches(part, [BatchPlan(len(part), eval_batch_size)], still)[0]
            for split, part in content.parts.items()
            if split != "train"
        }
    except ValueError as error:
        raise ValueError(f"dataset {config.name}: {error}") from error
    val, test = held_out.get("val"), held_out["test"]
    return DataSplits(train, probe, val, test, identity, content.bad, content.notes, taken)


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
    if not config.download or DATASETS[config.name].fetch is None or ranks.alone:
        return
    local_ranks = ranks.gather(torch.tensor(ranks.local_rank)).tolist()
    for rank, local_rank in enumerate(local_ranks):
        if rank > 0 and local_rank > 0:
            continue
        if rank == ranks.rank:
            DATASETS[config.name].load(config.root, download=True)
        ranks.meet()


def _read(config: DataConfig) -> Content:
    """What the files hold."""
    dataset = DATASETS[config.name]
    try:
        return dataset.load(config.root, config.download, config.follow_links)
    except FileNotFoundError as error:
        if not dataset.own:
            raise
        raise FileNotFoundError(
            f"{error}; where it was moved, pass its folder: --data.root of train, --data-root of "
            "eval and analyze"
        ) from error


def _chosen(
    content: Content, config: DataConfig, bad_images: BadImages, all_to_test: bool
) -> Content:
    """Its readable images as they are trained on, validated and tested with."""
    dataset = DATASETS[config.name]
    if dataset.image_size is not None:
        content = _in_arrays(content, dataset.image_size, f"{dataset.name} has")
    check_arrays(dataset, content)
    content = _readable(content, config, bad_images)
    if all_to_test and content.test is None:
        content = content.with_parts({"test": content.train})
    content = with_validation_images(with_test_images(content), config.num_val)
    content = _limited(content, config.limit)
    # Folders are sorted by class, and evaluation takes the first images where it is asked for
    # fewer than all.
    order = {
        split: part.subset(torch.randperm(len(part), generator=seeded_generator(_EVALUATION_SEED)))
        for split, part in content.parts.items()
        if split != "train" and isinstance(part, EncodedImages)
    }
    return content.with_parts(order)


def _loader(
    config: DataConfig, content: Content, framing: Shift | Framing, device: torch.device
) -> str:
    """Which loader is asked for; "auto" is the fastest of them."""
    if config.augment and not (
        isinstance(framing, Framing) and config.loader in ("auto", "dataloader")
    ):
        raise ValueError(
            "data.augment is for image files, which the dataloader augments: leave --data.augment "
            "out, or set --data.loader dataloader"
        )
    if isinstance(framing, Framing):
        if config.loader == "resident" and framing.kind == "resized":
            raise ValueError(
                "data.loader resident keeps images of one size: it needs --data.crop pad with "
                f"images of {config.image_size} x {config.image_size} pixels"
            )
        streamed = "dali" if has_dali() and not config.augment else "dataloader"
        return streamed if config.loader == "auto" else config.loader
    if config.loader != "auto":
        return config.loader
    arrays = [part for part in content.parts.values() if isinstance(part, Images)]
    if sum(math.prod(part.rows.shape) for part in arrays) <= free_bytes(device):
        return "resident"
    # On a CPU PyTorch copies and crops arrays faster than DALI.
    return "dali" if device.type == "cuda" and has_dali() else "dataloader"


def _in_arrays(content: Content, size: int, expected: str) -> Content:
    """With every encoded image decoded; ``expected`` says who demands their size."""
    decoded = {
        split: Images(decode_all(part, size, expected), part.labels)
        for split, part in content.parts.items()
        if isinstance(part, EncodedImages)
    }
    return content.with_parts(decoded)


def check_arrays(dataset: Dataset, content: Content) -> None:
    """Raise a ValueError unless images in memory are of the size and range of their dataset, each
    with a label."""
    for part in content.parts.values():
        if isinstance(part, Images) and isinstance(part.rows, np.ndarray):
            shape = (dataset.image_size, dataset.image_size, dataset.channels)
            if dataset.image_size is not None and part.rows.shape[1:] != shape:
                raise ValueError(
                    f"expected images of {'x'.join(map(str, shape))}, got "
                    f"{'x'.join(map(str, part.rows.shape[1:]))}"
                )
            images = torch.from_numpy(part.rows).permute(0, 3, 1, 2)
            check_samples(images, part.labels, len(content.classes), content.max_value)


def _readable(content: Content, config: DataConfig, bad_images: BadImages) -> Content:
    """Without the files that cannot be decoded, which are told with what else is bad."""
    if config.bad_images == "stop" and content.bad:
        raise ValueError(f"{told(content.bad)}; remove it, or pass --data.bad-images skip-strays")
    if config.bad_images != "skip":
        return content
    readable, skipped = {}, list(content.bad)
    for split, part in content.parts.items():
        if isinstance(part, Images):
            continue
        bad = bad_images.among(part, config.root.expanduser())
        readable[split] = left = without(part, bad)
        for label in set(part.labels.tolist()) - set(left.labels.tolist()):
            first = next(index for index in bad if int(part.labels[index]) == label)
            raise ValueError(f"no image with label {label} can be read; {bad[first]}")
        skipped += bad.values()
    return content.with_parts(readable)._replace(bad=tuple(skipped))


def _limited(content: Content, limit: int) -> Content:
    """With so many of the training images; 0 for all."""
    if not 0 < limit < len(content.train):
        return content
    counts = torch.bincount(content.train.labels, minlength=len(content.classes))
    if limit < len(counts):
        raise ValueError(
            f"data.limit must leave an image of each of the {len(counts)} classes, got {limit}"
        )
    # The rest, rather than these, is what leaves none of a class without images.
    chosen, _ = stratified_split(content.train.labels, len(content.train) - limit)
    note = f"a trial: {limit:,} of {len(content.train):,} training images"
    return content.with_parts({"train": content.train.subset(chosen)}, note)


def _with_generated(content: Content, folder: Path) -> Content:
    train = content.train
    if not isinstance(train, Images):
        raise ValueError(
            "data.unsup is mixed with images in arrays (cifar10, …), got images in files"
        )
    generated = array_folder(folder)
    num_classes = len(content.classes)
    if int(generated.labels.max()) >= num_classes:
        raise ValueError(
            f"{folder}: pseudo-labels must lie in [0, {num_classes - 1}], got "
            f"{int(generated.labels.max())}"
        )
    if content.max_value != 255:
        raise ValueError(
            f"{folder}: white is 255 in generated images, expected {content.max_value} as in the "
            "training images: give both as your own arrays, scaled to 255"
        )
    class_names(folder, content.classes, "the training images")
    for split, part in content.parts.items():
        shared = [] if split == "train" else [i for i, _ in same_images(part, generated)]
        if shared:
            raise ValueError(
                f"{generated.name(shared[0])}: expected images to train on, got one of the {split} "
                f"images; {len(shared):,} are found in both: take them out"
            )
    rows = JoinedRows([train.rows, generated.rows])
    labels = torch.cat([train.labels, generated.labels])
    note = f"{folder}: read from {generated.note}" if generated.note else ""
    return content.with_parts({"train": Images(rows, labels)}, note)


def _on_device(rows: Rows, device: torch.device, memory_format: torch.memory_format) -> Tensor:
    """All images on the device, (num_samples, C, H, W), uint8; a memory map is copied in parts, so
    that it is never in the memory of the host as a whole beside its copy."""
    if device.type == "cpu" and isinstance(rows, np.ndarray):
        return torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    number, height, width, channels = rows.shape
    copied = torch.empty(
        (number, channels, height, width),
        dtype=torch.uint8,
        device=device,
        memory_format=memory_format,
    )
    rows_per_part = max(BYTES_PER_PART // (height * width * channels), 1)
    for start in range(0, number, rows_per_part):
        part = rows[np.arange(start, min(start + rows_per_part, number))]
        copied[start : start + len(part)] = torch.from_numpy(part).to(device).permute(0, 3, 1, 2)
    return copied


def free_bytes(device: torch.device) -> int:
    """Bytes that a dataset may take on a device: half of what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError):
        return 2**32
