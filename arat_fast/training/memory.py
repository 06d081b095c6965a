"""What to do where the memory does not suffice."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arat_fast.training.sharing import BatchSharing


class BatchTooLargeError(torch.OutOfMemoryError):
    """The step ran out of memory; the message says what would fit."""


def is_out_of_memory(error: Exception) -> bool:
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


@contextmanager
def undone_updates(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put weights and the optimiser's state back, from copies on the host.

    Args:
        optimizer: may take its steps inside of the context.
    """
    state = {parameter: dict(own) for parameter, own in optimizer.state.items()}
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [v for own in state.values() for v in own.values() if isinstance(v, Tensor)]
    copies = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    try:
        yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(state)
        with torch.no_grad():
            for tensor, old in zip(tensors, copies, strict=True):
                tensor.copy_(old)


def advise(
    attempt: Callable[[tuple[Tensor, ...]], object],
    inputs: tuple[Tensor, ...],
    modules: Sequence[nn.Module],
    sharing: BatchSharing,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator | None,
) -> str:
    """A large batch that fits, found by bisection in steps of a thirty-second, each tried as a
    training would take it; no parameter changes.

    Args:
        attempt: the first steps of a training on the rows of ``inputs`` that it gets.
        inputs: those that did not fit.
        modules: network and objective.
        sharing, optimizer, generator: of the step.
    """
    if sharing.sum is not None:
        # The other ranks do not take part in a search.
        return (
            "lower --data.batch-size, which all processes share, or raise --train.accumulate "
            f"above {sharing.accumulate}"
        )

    def fits(num: int) -> bool:
        # A failure is held by its traceback, in a cycle.
        gc.collect()
        try:
            with undone_updates(optimizer), rehearsal(modules, generator, inputs[0].device):
                attempt(tuple(tensor[:num] for tensor in inputs))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    num_samples = len(inputs[0])
    unit = max(1, num_samples // 32)
    # BatchNorm cannot train on one sample.
    largest, fails = int(unit == 1), -(-num_samples // unit)
    while fails - largest > 1:
        middle = (largest + fails) // 2
        if fits(middle * unit):
            largest = middle
        else:
            fails = middle
    largest *= unit
    if largest < 2:
        return "no smaller batch fits either: a smaller network or image is needed"
    parts = sharing.accumulate * -(-num_samples // largest)
    return (
        f"the largest batch that was tried and fits is {largest} (--data.batch-size {largest}, or "
        f"--train.accumulate {parts} for the same batch in parts)"
    )
