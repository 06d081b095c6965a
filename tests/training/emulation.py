"""CUDA graphs on the CPU: a capture records PyTorch's operations, a replay runs them again.

What holds on a GPU holds here: a capture computes nothing, so what it wrote and drew is undone; a
replay reads and writes the memory that was captured, and one that the graph does not own must
still be there; the graph's own memory holds nothing from before (it is filled with NaN);
waiting for the device, copies from the host and generators that the graph does not know end the
capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from arat_fast.training import graph as graph_module
from arat_fast.training import step as step_module

WAITS = (
    *("_local_scalar_dense", "item", "equal", "nonzero", "masked_select", "is_nonzero", "bincount"),
    *("unique_dim", "unique_consecutive", "_unique2", "allclose", "lift_fresh", "_assert_async"),
)
"""Operations that wait for a GPU, or read memory of the host."""
UNDECLARED = ("native_batch_norm", "cudnn_batch_norm")
"""Operations that write their arguments 3 and 4, of which their schema says nothing."""


class BrokenCapture(RuntimeError):
    """What CUDA forbids in a capture, or would compute wrongly in a replay."""


class _Outside:
    """A tensor that the graph does not own, and does not keep."""

    def __init__(self, tensor: Tensor, reader: str) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.layout = tensor.storage_offset(), tensor.size(), tensor.stride()
        self.dtype, self.reader = tensor.dtype, reader

    def tensor(self) -> Tensor:
        if self.storage.expired():
            raise BrokenCapture(f"a replay of {self.reader} reads memory that was freed")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]  # its stub


class EmulatedGraph:
    """In place of torch.cuda.CUDAGraph."""

    replays = 0
    """Of all graphs."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, list[Any], list[Tensor | None]]] = []
        self.generators = [torch.default_generator]
        self.own: dict[int, torch.UntypedStorage] = {}
        self.written: dict[int, tuple[StorageWeakRef, Tensor]] = {}

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self) -> None:
        EmulatedGraph.replays += 1
        self.poison()
        for function, spec, given, outputs in self.calls:
            leaves = [leaf.tensor() if isinstance(leaf, _Outside) else leaf for leaf in given]
            args, keywords = tree_unflatten(leaves, spec)
            found = tree_flatten(function(*args, **keywords))[0]
            for output, fresh in zip(outputs, found, strict=True):
                if output is not None:
                    output.copy_(fresh)

    def poison(self) -> None:
        """NaN in every floating-point number, -1 in integers."""
        for storage in self.own.values():
            _bytes(storage).fill_(0xFF)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        graph, kwargs = self.graph, kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS:
            raise BrokenCapture(f"operation not permitted when stream is capturing: {name}")
        flat, spec = tree_flatten((args, kwargs))
        for drawn_from in flat:
            if isinstance(drawn_from, torch.Generator):
                # Wrapped anew by the dispatcher: known by what it would draw.
                state = drawn_from.get_state()
                if not any(torch.equal(state, known.get_state()) for known in graph.generators):
                    raise BrokenCapture(f"{name} draws from a generator that is not registered")
        for tensor in self._written(func, name, args, kwargs):
            storage = tensor.untyped_storage()
            if storage._cdata not in graph.own:
                kept = StorageWeakRef(storage), _bytes(storage).clone()
                graph.written.setdefault(storage._cdata, kept)
        out = func(*args, **kwargs)
        read = {t.untyped_storage()._cdata for t in flat if isinstance(t, Tensor)}
        outputs: list[Tensor | None] = []
        for tensor in tree_flatten(out)[0]:
            is_new = isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in read
            outputs.append(tensor.detach() if is_new and "empty" not in name else None)
            if is_new:
                storage = tensor.untyped_storage()
                graph.own.setdefault(storage._cdata, storage)
        given = [self._held(leaf, name) if isinstance(leaf, Tensor) else leaf for leaf in flat]
        graph.calls.append((func, spec, given, outputs))
        return out

    def _held(self, tensor: Tensor, name: str) -> Tensor | _Outside:
        own = tensor.untyped_storage()._cdata in self.graph.own
        return tensor.detach() if own else _Outside(tensor, name)

    @staticmethod
    def _written(func: Any, name: str, args: Any, kwargs: Any) -> list[Tensor]:
        found = list(args[3:5]) if name in UNDECLARED else []
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                found += tree_flatten(given)[0]
        return [value for value in found if isinstance(value, Tensor)]


@contextmanager
def _capture(graph: EmulatedGraph, **options: Any) -> Iterator[None]:
    before = [generator.get_state() for generator in graph.generators]
    try:
        with _Recorder(graph):
            yield
    finally:
        for generator, state in zip(graph.generators, before, strict=True):
            generator.set_state(state)
        for weak, content in graph.written.values():
            if not weak.expired():
                _bytes(torch.UntypedStorage._new_with_weak_ptr(weak.cdata)).copy_(content)
        graph.poison()


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        pass


def emulate_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps of networks on the CPU be captured, until the test ends."""
    stream = _Stream()
    for name, value in {
        "CUDAGraph": EmulatedGraph,
        "graph": _capture,
        "graph_pool_handle": lambda: (0, 0),
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda chosen: nullcontext(),
        "set_stream": lambda chosen: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(step_module, "is_capturable", lambda device: True)
    monkeypatch.setattr(graph_module, "end_broken_capture", lambda *given: None)
    monkeypatch.setattr(EmulatedGraph, "replays", 0)
