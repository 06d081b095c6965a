"""A network whose batches are shared by threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
            yield _SharedNetwork(network, pool, workers)
    finally:
        torch.set_num_threads(threads)


class _SharedNetwork(nn.Module):
    def __init__(self, network: nn.Module, pool: ThreadPoolExecutor, workers: int) -> None:
        super().__init__()
        self.network = network
        self.pool = pool
        self.workers = workers
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        count = min(self.workers, len(x) // MIN_PART)
        if count < 2:
            whole: Tensor = self.network(x)
            return whole
        if x.requires_grad and torch.is_grad_enabled():
            y: Tensor = _Shared.apply(x, self)  # type: ignore[no-untyped-call]
            return y
        return torch.cat(self.map(self.answer, list(torch.tensor_split(x, count))))

    @torch.no_grad()
    def answer(self, x: Tensor) -> Tensor:
        """The output of one part."""
        y: Tensor = self.network(x)
        return y

    def record(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One part and its output, with the graph between them."""
        with torch.enable_grad():
            part = x.detach().requires_grad_()
            return part, self.network(part)

    def map(self, call: Callable[[Part], Result], parts: list[Part]) -> list[Result]:
        """``call`` of each part, each in a thread of the pool."""
        return list(self.pool.map(call, parts))


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: _SharedNetwork) -> Tensor:
        count = min(shared.workers, len(x) // MIN_PART)
        ctx.shared = shared
        ctx.parts = shared.map(shared.record, list(torch.tensor_split(x, count)))
        return torch.cat([y.detach() for _, y in ctx.parts])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        def gradient(job: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
            (x, y), upstream = job
            return torch.autograd.grad(y, x, upstream, retain_graph=True)[0]

        sizes = [len(x) for x, _ in ctx.parts]
        jobs = list(zip(ctx.parts, torch.split(dy, sizes), strict=True))
        return torch.cat(ctx.shared.map(gradient, jobs)), None
