"""The whole training step in one CUDA graph."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from arat_fast.data.plan import Place
from arat_fast.training.memory import BatchTooLargeError, rehearsal
from arat_fast.training.values import Values

Function: TypeAlias = Callable[..., Values]
Shape: TypeAlias = tuple[Place, tuple[Tensor, ...]]

NUM_WARMUP = 3
"""Steps of a batch shape that run eagerly before it is captured: they choose cuDNN's algorithms,
compile kernels and make the optimiser's state, and they are training steps like any other. The
shape of the last batch, where it is known, is rehearsed once."""

MAX_NUM_SHAPES = 2
"""Batch shapes that are captured, the full batch and the last one of an epoch; more run eagerly."""


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    values: Values
    state: object


def is_capturable(device: torch.device) -> bool:
    """Whether the device can replay a step."""
    return device.type == "cuda"


class StepGraphs:
    """Runs a step eagerly, then captures it, then replays it; one graph for each batch shape.

    What a replay must see is a tensor on the device: the inputs are copied into the graph's own,
    learning rates become tensors, random numbers come from registered generators. The rest is part
    of the graph. If any of it changes (other tensors, because a state was loaded; another momentum;
    another attack), the step is captured anew.

    Args:
        modules: whose parameters and buffers the step reads and writes.
        optimizer: SGD, or an optimiser with a ``capturable`` mode, which is switched on.
        device: the GPU.
        generator: of the step's random numbers, beside PyTorch's default one.
        required: a step that cannot be captured is an error; else it goes on eagerly.
        say: told in one sentence why steps run eagerly for good.
        last: samples and place of a smaller batch that will come, captured with the first one.

    Raises:
        ValueError: an optimiser that cannot be captured.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        generator: torch.Generator | None,
        required: bool,
        say: Callable[[str], object],
        last: tuple[int, Place] | None = None,
    ) -> None:
        self.modules = modules
        self.optimizer = optimizer
        self.device = device
        self.generator = generator
        self.required = required
        self.last = last
        self.say = say
        self.failed = self.full = False
        self.num_replayed = 0
        self.lrs = make_capturable(optimizer, device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool: Any = None
        self.num_eager: Counter[Any] = Counter()
        self.captured: dict[Any, _Captured] = {}

    def run(
        self,
        function: Function,
        place: Place,
        inputs: tuple[Tensor, ...],
        settings: object,
    ) -> Values:
        """One step of ``function(place, True, *inputs)``; its metrics, which stay as they are.

        Args:
            function: the step; with False it stops before the optimiser's.
            place: of the inputs in the batch of all processes.
            inputs: tensors on the device, a row for each sample.
            settings: everything else the step depends on; compared with ``==``.

        Raises:
            ValueError: the step cannot be captured.
            BatchTooLargeError: it can run, but not be captured in the memory there is.
        """
        self._set_lrs()
        key = self._key(place, inputs)
        captured = self.captured.get(key)
        state = (settings, self._state())
        if captured is not None and captured.state != state:
            self.forget()
            captured = None
        if captured is None:
            if self.num_eager[key] >= NUM_WARMUP and not self.failed:
                if len(self.captured) < MAX_NUM_SHAPES:
                    self._capture_or_go_on(function, place, inputs, settings)
                    captured = self.captured.get(key)
                elif not self.full:
                    self.full = True
                    self.say(f"batches of more than {MAX_NUM_SHAPES} shapes: others run eagerly")
            if captured is None:
                self.num_eager[key] += 1
                return self._eagerly(function, place, True, *inputs)
        for own, given in zip(captured.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        captured.graph.replay()
        self.num_replayed += 1
        # A copy: the next replay writes over the graph's own.
        return Values(captured.values.names, captured.values.packed.clone())

    def forget(self) -> None:
        """Give the graphs and their memory back; the next steps run eagerly again."""
        self.captured.clear()
        self.num_eager.clear()
        self.pool = None
        # Gradients lie in the memory of a graph, which holds on to all of it.
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()

    @staticmethod
    def _key(place: Place, inputs: Sequence[Tensor]) -> object:
        return place, tuple((t.shape, t.stride(), t.dtype) for t in inputs)

    def _eagerly(self, function: Function, *arguments: Any) -> Values:
        # On the stream of the capture, so that nothing in the graph belongs to another one.
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            values = function(*arguments)
        current.wait_stream(self.stream)
        return values

    def capture(self, function: Function, batches: Sequence[Shape], settings: object) -> None:
        """Capture batches of some shapes, the first of which ran before.

        Args:
            function, settings: as for :meth:`run`.
            batches: a place and inputs for each.

        Raises:
            ValueError, BatchTooLargeError: as :meth:`run`.
        """
        for place, inputs in batches[1:]:
            # Before there is a graph, beside whose memory this would have to fit.
            with rehearsal(self.modules, self.generator, self.device):
                self._eagerly(function, place, False, *inputs)
        state = (settings, self._state())
        for place, inputs in batches:
            self.captured[self._key(place, inputs)] = self._capture(function, place, inputs, state)

    def attempt(self, function: Function, batches: Sequence[Shape], settings: object) -> None:
        """Do what the first steps of a training do, up to the captures; as :meth:`capture`."""
        place, inputs = batches[0]
        for _ in range(NUM_WARMUP):
            self._eagerly(function, place, True, *inputs)
        if not self.failed:
            self.capture(function, batches, settings)

    def _capture_or_go_on(
        self, function: Function, place: Place, inputs: tuple[Tensor, ...], settings: object
    ) -> None:
        """Capture this batch and the smaller one that will come, so that what does not fit shows
        at once."""
        batches = [(place, inputs)]
        if self.last is not None and self.last[1].total < place.total:
            num, last_place = self.last
            batches.append((last_place, tuple(tensor[:num] for tensor in inputs)))
        try:
            self.capture(function, batches, settings)
        except (ValueError, BatchTooLargeError) as error:
            if self.required:
                raise
            self.failed = True
            self.say(f"{error}; it goes on without one")
        if self.failed:
            # Only now: the error held what had been computed.
            self.forget()

    def _capture(
        self, function: Function, place: Place, inputs: tuple[Tensor, ...], state: object
    ) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        static = [tensor.clone() for tensor in inputs]
        self.optimizer.zero_grad(set_to_none=True)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self.device)
        try:
            # Thread-local, or a data loader's thread ends the capture.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                values = function(place, True, *static)
        except RuntimeError as error:
            # The end of a broken capture raises an error of its own over the cause.
            cause = error.__context__ or error
            end_broken_capture(self.device, self.pool, self.generator)
            self.forget()
            reason = str(cause).splitlines()[0]
            if isinstance(cause, torch.OutOfMemoryError):
                raise BatchTooLargeError(
                    f"{reason.partition('. ')[0]}, while capturing a batch of {len(inputs[0])} in "
                    'a CUDA graph, without which it fits: graph "off" (--step.graph off)'
                ) from error
            raise ValueError(
                f"the step of {type(self.modules[0]).__name__} cannot be captured in a CUDA graph: "
                f'{reason}; set graph to "off" (--step.graph off)'
            ) from error
        finally:
            # Which a broken capture leaves switched.
            torch.cuda.set_stream(current)
        return _Captured(graph, static, values, state)

    def _set_lrs(self) -> None:
        """Bring learning rates that were assigned as numbers to where the graph reads them."""
        groups = self.optimizer.param_groups
        # Loading a state replaces the groups' settings.
        if len(groups) != len(self.lrs) or not all(map(_is_capturable, groups)):
            self.lrs = make_capturable(self.optimizer, self.device)
            self.forget()
        for group, lr in zip(groups, self.lrs, strict=True):
            if group["lr"] is not lr:
                lr.fill_(group["lr"])
                group["lr"] = lr

    def _state(self) -> tuple[object, ...]:
        """What a graph holds fast: addresses, and the optimiser's numbers."""
        held: list[object] = []
        for module in self.modules:
            for parameter in module.parameters():
                held += [parameter.data_ptr(), parameter.requires_grad]
            held += [buffer.data_ptr() for buffer in module.buffers()]
        for state in self.optimizer.state.values():
            held += [value.data_ptr() for value in state.values() if isinstance(value, Tensor)]
        for group in self.optimizer.param_groups:
            held += [value for name, value in group.items() if name not in ("params", "lr")]
        return tuple(held)


def end_broken_capture(
    device: torch.device, pool: tuple[int, int], generator: torch.Generator | None
) -> None:
    """Put right what PyTorch leaves of a capture that did not come to its end: generators that
    still count as captured, so that every later draw fails, and an allocator that still waits for
    it.

    Args:
        device: the GPU.
        pool: memory of the capture.
        generator: registered with it, beside PyTorch's default one.
    """
    for marked in (torch.cuda.default_generators[device.index or 0], generator):
        if marked is not None:
            marked.graphsafe_set_state(marked.clone_state())
    # It may have failed before or after memory was taken.
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)
        torch._C._cuda_releasePool(device.index or 0, pool)


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
    """Make an optimiser read its learning rates from tensors, and never wait for the device.

    Args:
        optimizer: changed in place: the fused implementation of SGD, the ``capturable`` one of
            others, and their step counts on the device.
        device: where the learning rates go.

    Returns:
        The learning rate of each parameter group, 0-d float32.

    Raises:
        ValueError: another optimiser.
    """
    lrs = []
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
        lr = torch.as_tensor(group["lr"], dtype=torch.float32, device=device).clone()
        group["lr"] = lr
        lrs.append(lr)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(device)
    return lrs


def _is_capturable(group: dict[str, Any]) -> bool:
    return bool(group.get("capturable") or group.get("fused"))
