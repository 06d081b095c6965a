"""Gradients of one batch whose samples are shared by several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arat_kernels.layout import is_batch_dense

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUCKET_BYTES = 25 * 2**20
"""Gradients that travel together: large enough for the bandwidth, small enough to start early."""


class GradientSum:
    """Adds up the gradients of all processes, once a step, in buckets.

    Each process weighs its loss by its share of the samples, so that the sum is the gradient of the
    mean over the whole batch even where the shares differ. Nothing wraps the network: the attack
    runs on the module itself, and any number of forward passes may come before the backward pass.

    Args:
        parameters: those that are trained, the same on every process.
        statistics: running statistics that every process moves by its own samples; their mean,
            weighed by the shares, takes their place.
        group: the processes.
        overlap: send a bucket as soon as the backward pass has filled it, instead of afterwards.
            The numbers are the same.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        statistics: Sequence[Tensor],
        group: ProcessGroup,
        *,
        overlap: bool,
    ) -> None:
        self.group = group
        self.overlap = overlap
        self.statistics = list(statistics)
        self.buckets = [_Bucket(members) for members in in_buckets(parameters)]
        self._statistics_bucket = _Bucket(self.statistics) if self.statistics else None
        self._armed = False
        self._next = 0
        if overlap:
            for bucket in self.buckets:
                for parameter in bucket.members:
                    parameter.register_post_accumulate_grad_hook(partial(self._note, bucket))  # type: ignore[no-untyped-call]

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around the last backward pass of a step: on leaving, ``.grad`` is the sum."""
        self._next = 0
        for bucket in self.buckets:
            bucket.waiting_for = len(bucket.members)
        self._armed = True
        try:
            yield
        finally:
            self._armed = False
        # In the same order everywhere; a parameter without a gradient leaves its bucket unfilled.
        for bucket in self.buckets[self._next :]:
            bucket.send([p.grad for p in bucket.members], self.group)
        for bucket in self.buckets:
            bucket.receive([p.grad for p in bucket.members])

    @torch.no_grad()
    def average_statistics(self, share: float) -> None:
        """Replace the running statistics by their mean over the processes, of which this one has a
        ``share`` of the batch's samples, in [0, 1]."""
        if self._statistics_bucket is None:
            return
        self._statistics_bucket.send([s * share for s in self.statistics], self.group)
        self._statistics_bucket.receive(self.statistics)

    def _note(self, bucket: _Bucket, parameter: Tensor) -> None:
        """One of the gradients has come: send what is full, in the order of the buckets."""
        bucket.waiting_for -= 1
        while self._armed and self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if bucket.waiting_for:
                return
            bucket.send([p.grad for p in bucket.members], self.group)
            self._next += 1


class _Bucket:
    """Tensors of one dtype and device that travel in one piece of memory."""

    def __init__(self, members: Sequence[Tensor]) -> None:
        self.members = list(members)
        sizes = [m.numel() for m in members]
        self.flat = members[0].new_empty(sum(sizes))
        pieces = zip(torch.split(self.flat, sizes), members, strict=True)
        # As the gradients lie in memory, channels_last too, which then are copied as one.
        self.views = [
            piece.as_strided(member.shape, member.stride(), piece.storage_offset())
            if is_batch_dense(member)
            else piece.view(member.shape)
            for piece, member in pieces
        ]
        self.waiting_for = 0
        self._work: Any = None

    @torch.no_grad()
    def send(self, values: Sequence[Tensor | None], group: ProcessGroup) -> None:
        present = [(v, x) for v, x in zip(self.views, values, strict=True) if x is not None]
        if len(present) < len(values):
            self.flat.zero_()
        if present:
            torch._foreach_copy_([view for view, _ in present], [value for _, value in present])
        self._work = dist.all_reduce(self.flat, group=group, async_op=True)

    @torch.no_grad()
    def receive(self, targets: Sequence[Tensor | None]) -> None:
        self._work.wait()
        present = [(t, v) for t, v in zip(targets, self.views, strict=True) if t is not None]
        if present:
            torch._foreach_copy_([target for target, _ in present], [view for _, view in present])


def in_buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in pieces of :data:`BUCKET_BYTES`, each of one dtype, the last layers first: the
    backward pass comes to them first."""
    pieces: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        length = parameter.numel() * parameter.element_size()
        same = bool(pieces) and pieces[-1][0].dtype == parameter.dtype
        if not same or size + length > BUCKET_BYTES:
            pieces.append([])
            size = 0
        pieces[-1].append(parameter)
        size += length
    return pieces
