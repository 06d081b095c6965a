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


def advise(
    gradients: Callable[[tuple[Tensor, ...]], object],
    inputs: tuple[Tensor, ...],
    modules: Sequence[nn.Module],
    sharing: BatchSharing,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator | None,
) -> str:
    """A large batch that fits, found by bisection in steps of a thirty-second; no parameter is
    touched.

    Args:
        gradients: fills ``.grad`` from the rows of ``inputs`` that it gets.
        inputs: those that did not fit.
        modules: whose buffers are put back, and gradients removed.
        sharing, optimizer: of the step.
        generator: of the step.
    """
    if sharing.sum is not None:
        # The other ranks do not take part in a search.
        return (
            "lower --data.batch-size, which all processes share, or raise --train.accumulate "
            f"above {sharing.accumulate}"
        )
    defaults = optimizer.defaults
    # What the optimiser is going to keep of each parameter is taken before its first step.
    num_kept = (
        0 if optimizer.state else 2 if "betas" in defaults else int(bool(defaults.get("momentum")))
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def fits(num: int) -> bool:
        # A failure is held by its traceback, in a cycle.
        gc.collect()
        if inputs[0].is_cuda:
            torch.cuda.empty_cache()
        try:
            kept = [torch.empty_like(p) for p in parameters for _ in range(num_kept)]
            with rehearsal(modules, generator, inputs[0].device):
                # Memory is cut up otherwise the second time.
                for _ in range(2):
                    gradients(tuple(tensor[:num] for tensor in inputs))
            del kept
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
    # A step less of large batches: the update and a capture cut the memory up once more.
    largest = (largest - (unit > 1)) * unit
    if largest < 2:
        return "no smaller batch fits either: a smaller network or image is needed"
    parts = sharing.accumulate * -(-num_samples // largest)
    return (
        f"the largest batch that fits is {largest} (--data.batch-size {largest}, or "
        f"--train.accumulate {parts} for the same batch in parts)"
    )
