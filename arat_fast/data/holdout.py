"""Images held out of training: the same ones in every run."""

from __future__ import annotations

import torch
from torch import Tensor

from arat_fast.data.plan import seeded_generator
from arat_fast.datasets import Content
from arat_fast.datasets.base import without
from arat_fast.datasets.splits import same_images

_VAL_SEED = 20


def with_test_images(content: Content) -> Content:
    """A dataset with the test images that it has; where it has none, a tenth is held out of the
    others, or fewer where classes are small.

    Raises:
        ValueError: there are too few images.
    """
    if content.test is not None:
        return content
    train = content.train
    counts = torch.bincount(train.labels)
    number = min(max(len(train) // 10, 1), _most_held_out(counts))
    if not number:
        raise ValueError(
            f"without test images a tenth of the others is held out, but {len(train)} images of "
            f"{int((counts > 0).sum())} classes are too few to leave two of them and one of each "
            "class; add images, or a split val or test"
        )
    chosen, tenth = stratified_split(train.labels, number)
    return _held_out(content, chosen, tenth, "test")


def _held_out(content: Content, chosen: Tensor, held: Tensor, split: str) -> Content:
    """A dataset with some of its training images held out, but for copies of those left."""
    train, others = content.train.subset(chosen), content.train.subset(held)
    copies = {index for index, _ in same_images(train, others)}
    if len(copies) == len(others):
        raise ValueError(
            f"expected images to hold out, got copies of others, "
            f"{content.train.name(int(held[0]))} the first: take the copies out"
        )
    note = f"{split}: {len(copies)} of the images held out are copies of others: left out"
    left = {"train": train, split: without(others, copies)}
    return content.with_parts(left, note if copies else "")


def with_validation_images(content: Content, num_val: int) -> Content:
    """A dataset of whose training images ``num_val`` are held out to validate with; 0 for none.

    Raises:
        ValueError: it has validation images of its own; as for :func:`stratified_split`.
    """
    if not num_val:
        return content
    if content.val is not None:
        raise ValueError(
            f"the dataset has validation images of its own, expected data.num_val 0, got {num_val}"
        )
    chosen, held_out = stratified_split(content.train.labels, num_val)
    return _held_out(content, chosen, held_out, "val")


def stratified_split(labels: Tensor, num_val: int) -> tuple[Tensor, Tensor]:
    """Choose a fixed held-out set with the class shares of the whole, as nearly as counts allow;
    one image of each class, at least, is left to train on.

    Args:
        labels: (num_samples,), int64, >= 0.
        num_val: images to hold out, >= 0.

    Returns:
        sorted indices of the images to train on and of those held out, int64.

    Raises:
        ValueError: a label is negative, or num_val leaves fewer than two images to train on, or
            none of a class.
    """
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels must be >= 0, got {int(labels.min())}")
    if not num_val:
        return torch.arange(len(labels)), torch.empty(0, dtype=torch.int64)
    counts = torch.bincount(labels)
    most = _most_held_out(counts)
    if num_val > most:
        raise ValueError(
            f"data.num_val must be at most {most} to leave two of the {len(labels)} training "
            f"images, and one of each class, got {num_val}"
        )
    exact = counts * num_val
    quota = exact // len(labels)
    rest = num_val - int(quota.sum())
    largest = torch.argsort(exact % len(labels), descending=True, stable=True)[:rest]
    quota[largest] += 1
    quota = torch.minimum(quota, (counts - 1).clamp(min=0))
    for _ in range(num_val - int(quota.sum())):
        quota[torch.argmax(counts - quota)] += 1
    generator = seeded_generator(_VAL_SEED)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, number in enumerate(quota.tolist()):
        members = torch.nonzero(labels == label)[:, 0]
        chosen = torch.randperm(len(members), generator=generator)[:number]
        held_out[members[chosen]] = True
    return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]


def _most_held_out(counts: Tensor) -> int:
    """Images that can be held out so that two are left, and one of each class."""
    return max(int(counts.sum()) - max(int((counts > 0).sum()), 2), 0)
