"""The whole training step in one CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., dict[str, Tensor]]

NUM_WARMUP = 3
"""Steps of a batch shape that run eagerly before it is captured: they choose cuDNN's algorithms,
compile kernels and make the optimiser's state, and they are training steps like any other."""

MOST_SHAPES = 2
"""Batch shapes that are captured: the full batch and the last one of an epoch."""


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    names: tuple[str, ...]
    packed: Tensor
    addresses: tuple[int, ...]


class StepGraphs:
    """Runs a step eagerly, then captures it, then replays it; one graph for each batch shape.

    Everything a replay must see is a tensor on the device: the inputs are copied into the graph's
    own, learning rates become tensors, random numbers come from registered generators. If
    parameters, buffers or the optimiser's state are other tensors than at the capture (a state was
    loaded), the step is captured anew.

    Args:
        modules: whose parameters and buffers the step reads and writes.
        optimizer: SGD, or an optimiser with a ``capturable`` mode, which is switched on.
        device: the GPU.
        generator: of the step's random numbers, beside PyTorch's default one.

    Raises:
        ValueError: an optimiser that cannot be captured.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        generator: torch.Generator | None,
    ) -> None:
        self.modules = modules
        self.optimizer = optimizer
        self.device = device
        self.generator = generator
        self.rates = make_capturable(optimizer, device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.num_eager: Counter[Any] = Counter()
        self.captured: dict[Any, _Captured] = {}

    def run(self, function: Function, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """One step of ``function(*inputs)``; its metrics, 0-d tensors that stay as they are."""
        self._set_rates()
        key = (function.__name__, tuple((t.shape, t.stride(), t.dtype) for t in inputs))
        captured = self.captured.get(key)
        if captured is not None and captured.addresses != self._addresses():
            self.captured.clear()
            self.num_eager.clear()
            captured = None
        if captured is None:
            if self.num_eager[key] < NUM_WARMUP or len(self.captured) >= MOST_SHAPES:
                self.num_eager[key] += 1
                return self._eagerly(function, inputs)
            captured = self.captured[key] = self._capture(function, inputs)
        for own, given in zip(captured.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        captured.graph.replay()
        # A copy: the next replay writes over the graph's own.
        return dict(zip(captured.names, captured.packed.clone().unbind(), strict=True))

    def _eagerly(self, function: Function, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        # On the stream of the capture, so that nothing in the graph belongs to another one.
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            metrics = function(*inputs)
        current.wait_stream(self.stream)
        return metrics

    def _capture(self, function: Function, inputs: tuple[Tensor, ...]) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        static = [tensor.clone() for tensor in inputs]
        self.optimizer.zero_grad(set_to_none=True)
        pool = next((c.graph.pool() for c in self.captured.values()), None)
        try:
            # Thread-local, or a data loader's thread ends the capture.
            with torch.cuda.graph(
                graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                metrics = function(*static)
                packed = torch.stack([value.float() for value in metrics.values()])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the step of {type(self.modules[0]).__name__} cannot be captured in a CUDA graph: "
                f'{reason}; set graph to "off" (--step.graph off)'
            ) from error
        return _Captured(graph, static, tuple(metrics), packed, self._addresses())

    def _set_rates(self) -> None:
        """Bring learning rates that were assigned as numbers to where the graph reads them."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate

    def _addresses(self) -> tuple[int, ...]:
        tensors: list[Tensor] = []
        for module in self.modules:
            tensors += [*module.parameters(), *module.buffers()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return tuple(tensor.data_ptr() for tensor in tensors)


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
    """Make an optimiser read its learning rates from tensors, and never wait for the device.

    Args:
        optimizer: changed in place: the fused implementation of SGD, the ``capturable`` one of
            others.
        device: where the learning rates go.

    Returns:
        The learning rate of each parameter group, 0-d float32.

    Raises:
        ValueError: another optimiser.
    """
    rates = []
    for group in optimizer.param_groups:
        if type(optimizer) is torch.optim.SGD:
            group["fused"], group["foreach"] = True, False
        elif "capturable" in group:
            group["capturable"] = True
        else:
            raise ValueError(
                f"{type(optimizer).__name__} cannot be captured in a CUDA graph, expected SGD or "
                'an optimiser with a capturable mode; set graph to "off" (--step.graph off)'
            )
        rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=device).clone()
        group["lr"] = rate
        rates.append(rate)
    return rates
