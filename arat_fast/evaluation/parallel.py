"""A network whose batches are shared by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

MAX_WORKERS = 4
MIN_PART = 32
"""Images below which a part is not worth a thread."""

Part = TypeVar("Part")
Result = TypeVar("Result")


@contextmanager
def shared_batches(network: nn.Module, x: Tensor) -> Iterator[nn.Module]:
    """On the CPU, the network with its batches split over threads; elsewhere the network itself.

    PyTorch splits every operation over its threads and waits for all of them after each; here each
    thread runs the whole network on its own part of the batch, forward and backward. A small
    network on small images spends much of its time waiting otherwise.

    Args:
        network: in eval mode, without gradients of parameters; each image's output depends on that
            image alone.
        x: images such as it will see; where they are too few, the network is left as it is.

    Yields:
        A module that maps images (N, C, H, W) to what the network maps them to. Inside the
        context, PyTorch's own threads are divided among the workers.
    """
    threads = torch.get_num_threads()
    workers = min(threads, MAX_WORKERS, len(x) // MIN_PART)
    if x.device.type != "cpu" or workers < 2:
        yield network
        return
    each = threads // workers
    try:
        torch.set_num_threads(each)
        with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(each)) as pool:
            shared = SharedNetwork(network, pool, workers)
            try:
                yield shared
            finally:
                # Before the pool waits for its threads: after Ctrl-C they would go on for long.
                shared.stopped.set()
    finally:
        torch.set_num_threads(threads)


class SharedNetwork(nn.Module):
    """What :func:`shared_batches` yields.

    Attributes:
        network: the one that all threads run.
        stopped: set when no result is wanted any more.
    """

    def __init__(self, network: nn.Module, pool: ThreadPoolExecutor, workers: int) -> None:
        super().__init__()
        self.network = network
        self.pool = pool
        self.workers = workers
        self.stopped = threading.Event()
        self.training = False

    def count(self, x: Tensor) -> int:
        """The number of threads among which a batch is shared, >= 1."""
        return max(min(self.workers, len(x) // MIN_PART), 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.count(x) < 2:
            y = self.network(x)
        elif x.requires_grad and torch.is_grad_enabled():
            y = _Shared.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            y = self.map_parts(torch.no_grad()(self.network.__call__), x)
        return y

    def record(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One part and its output, with the graph between them."""
        with torch.enable_grad():
            part = x.detach().requires_grad_()
            return part, self.network(part)

    def map_parts(self, call: Callable[..., Tensor], /, *tensors: Tensor) -> Tensor:
        """``call`` of the tensors, each thread on its own part of them, concatenated.

        Args:
            call: maps tensors of n rows to a result of n rows, each row's depending on that row
                alone.
            tensors: of N rows each; the first is a batch of images.
        """
        count = self.count(tensors[0])
        parts = zip(*(t.tensor_split(count) for t in tensors), strict=True)
        return torch.cat(self.map(lambda part: call(*part), list(parts)))

    def map(self, call: Callable[[Part], Result], parts: list[Part]) -> list[Result]:
        """``call`` of each part, each in a thread of the pool; an error of one stops the others.

        A call that takes long looks at :attr:`stopped` from time to time.
        """
        jobs = [self.pool.submit(call, part) for part in parts]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            self.stopped.set()
            raise
        return [job.result() for job in jobs]


class Stopped(Exception):
    """Raised in a thread whose result is not wanted any more."""


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedNetwork) -> Tensor:
        ctx.shared = shared
        ctx.parts = shared.map(shared.record, list(torch.tensor_split(x, shared.count(x))))
        return torch.cat([y.detach() for _, y in ctx.parts])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        def gradient(job: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
            (x, y), upstream = job
            return torch.autograd.grad(y, x, upstream, retain_graph=True)[0]

        sizes = [len(x) for x, _ in ctx.parts]
        jobs = list(zip(ctx.parts, torch.split(dy, sizes), strict=True))
        return torch.cat(ctx.shared.map(gradient, jobs)), None
