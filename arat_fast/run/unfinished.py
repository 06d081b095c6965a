"""A step that a signal breaks off, as if it had never begun: on a CPU it can take a minute."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from arat_fast.data.plan import Place
from arat_fast.evaluation.evaluate import LARGE_BATCH
from arat_fast.run.state import RandomStates, Run
from arat_fast.training.values import Values


class _BrokenOff(Exception):
    pass


def interruptible(run: Run, step: Callable[..., Values]) -> Callable[..., Values | None]:
    """The step of a run; it gives None where a signal came and nothing of the step is left.

    The signal is looked for after every layer, forward and backward. Parameters move at the step's
    end, after the last of them; statistics, the objective's buffers and random numbers are put
    back. On a GPU steps are short, several processes end theirs together, and what torch.compile
    makes of a network has no such places: there the step is finished.
    """
    numel = run.config.data.batch_size * prod(run.data.train.image_shape)
    whole = run.device.type != "cpu" or not run.ranks.alone or run.config.step.compile
    if whole or numel < LARGE_BATCH:
        return step

    def check() -> None:
        if run.stop.signal is not None:
            raise _BrokenOff

    def after(module: nn.Module, arguments: object, output: object) -> None:
        check()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: check())  # type: ignore[no-untyped-call]  # in torch

    def broken_off_by_a_signal(*inputs: Tensor, place: Place) -> Values | None:
        buffers = [*run.model.buffers(), *run.objective.buffers()]
        before = [buffer.clone() for buffer in buffers]
        random = RandomStates(run)
        state = random.state_dict()
        hook = register_module_forward_hook(after)
        try:
            return step(*inputs, place=place)
        except _BrokenOff:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
            random.load_state_dict(state)
            return None
        finally:
            hook.remove()

    return broken_off_by_a_signal
