"""What to do where the memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arat_fast.training.sharing import BatchSharing


class BatchTooLargeError(torch.OutOfMemoryError):
    """The step ran out of memory; the message says what would fit."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device's memory did not suffice."""
    # PyTorch has no type of its own for the CPU.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def rehearsal(
    modules: Sequence[nn.Module], generator: torch.Generator | None, device: torch.device
) -> Iterator[None]:
    """Put back what a step without its update changes: buffers, gradients, random numbers.

    Args:
        modules: network and objective.
        generator: of the step, beside PyTorch's default one.
        device: whose default generator that is.
    """
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    drawn = None if generator is None else generator.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        if generator is not None and drawn is not None:
            generator.set_state(drawn)
        for module in modules:
            module.zero_grad(set_to_none=True)
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)


def advise(
    gradients: Callable[[tuple[Tensor, ...]], object],
    inputs: tuple[Tensor, ...],
    modules: Sequence[nn.Module],
    sharing: BatchSharing,
    generator: torch.Generator | None,
) -> str:
    """The largest batch whose gradients fit, found by bisection; no parameter is touched.

    Args:
        gradients: fills ``.grad`` from the rows of ``inputs`` that it gets.
        inputs: those that did not fit.
        modules: whose buffers are put back, and gradients removed.
        sharing: of the step.
        generator: of the step.
    """
    if sharing.sum is not None:
        # The other ranks do not take part in a search.
        return (
            "lower --data.batch-size, which all processes share, or raise --train.accumulate "
            f"above {sharing.accumulate}"
        )
    # BatchNorm cannot train on one sample.
    fits, fails = 1, len(inputs[0])
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if inputs[0].is_cuda:
            torch.cuda.empty_cache()
        try:
            with rehearsal(modules, generator, inputs[0].device):
                gradients(tuple(tensor[:middle] for tensor in inputs))
            fits = middle
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fails = middle
    if fits == 1:
        return "no smaller batch fits either: a smaller network or image is needed"
    parts = sharing.accumulate * -(-len(inputs[0]) // fits)
    return (
        f"the largest batch that fits is {fits} (--data.batch-size {fits}, or "
        f"--train.accumulate {parts} for the same batch in parts)"
    )
