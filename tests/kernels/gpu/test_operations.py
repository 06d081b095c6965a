"""What every operation promises on real hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels.edges import EDGES, Run
from kernels.graphs import capture

from arat_kernels.checks import (
    OPERATIONS,
    UPSTREAM,
    Operation,
    Tensors,
    assert_equal,
    at_an_odd_place,
    on_gpu,
)

pytestmark = pytest.mark.gpu
every_operation = pytest.mark.parametrize("name", OPERATIONS)


@every_operation
def test_tensors_at_odd_places(name: str) -> None:
    operation = OPERATIONS[name]
    tensors = on_gpu(operation, 0)
    moved = {key: at_an_odd_place(t) for key, t in tensors.items()}
    assert_equal(operation.results(moved, None), operation.results(tensors, None))


@every_operation
def test_graph_replay_with_changed_inputs(name: str) -> None:
    operation = OPERATIONS[name]
    static = on_gpu(operation, 1)
    graph, outputs = capture(lambda: operation.results(static, None))
    for seed in (200, 400):
        fresh = on_gpu(operation, seed)
        for key, t in static.items():
            t.copy_(fresh[key])
        for _ in range(3):
            graph.replay()
        assert_equal(outputs, operation.results(fresh, None))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "start" in name or "crop" in name])
def test_graph_replay_draws_new_numbers(name: str) -> None:
    operation = OPERATIONS[name]
    static = on_gpu(operation, 1)

    def draw() -> Tensors:
        drawn = operation.results(static, None)
        static["rng"][1].add_(1)
        return drawn

    graph, outputs = capture(draw)
    seen = []
    for seed, offset in ((7, 0), (7, 1), (8, 0)):
        key = torch.tensor([seed, offset], device="cuda")
        static["rng"].copy_(key)
        for _ in range(2):
            expected = operation.results({**static, "rng": key}, None)
            graph.replay()
            key[1] += 1
            assert torch.equal(static["rng"], key)
            assert_equal(outputs, expected)
            seen.append(outputs["0"].clone())
    for i, j in ((0, 1), (0, 4), (1, 3)):
        assert (seen[i] != seen[j]).float().mean() > 0.3


@every_operation
def test_side_stream(name: str) -> None:
    """Inputs are written only after a while: a kernel that ran on another stream would see what was
    there before."""
    operation = OPERATIONS[name]
    tensors = on_gpu(operation, 2)
    late = {key: torch.zeros_like(t) for key, t in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for key, t in late.items():
            t.copy_(tensors[key])
        results = operation.results(late, None)
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(results, operation.results(tensors, None))


@every_operation
def test_compiled_with_inductor_is_bit_identical(name: str) -> None:
    operation = OPERATIONS[name]
    tensors = on_gpu(operation, 3)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def compiled(tensors: Tensors, impl: None) -> Any:
        return operation.call(tensors, impl)

    one = replace(operation, call=compiled)
    assert_equal(one.results(tensors, None), operation.results(tensors, None))


# An operation of one tensor mixes none.
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "image_parts"])
def test_mixed_devices_are_refused(name: str) -> None:
    operation = OPERATIONS[name]
    tensors = on_gpu(operation, 4)
    key = "x" if "x" in tensors else next(iter(tensors))
    with pytest.raises(ValueError, match="one device"):
        operation.call({**tensors, key: tensors[key].cpu()}, None)


@every_operation
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_card_that_is_not_current(name: str) -> None:
    operation = OPERATIONS[name]
    tensors = {key: t.to("cuda:1") for key, t in operation.make(5, torch.float32).items()}
    with torch.cuda.device(0):
        got, expected = (operation.results(tensors, impl) for impl in ("triton", "reference"))
    # Where the kernel ran is the question, garbage the alternative; other tests are about rounding.
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-4, msg=key)
        assert got[key].device == value.device == torch.device("cuda", 1)


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_edges(edge: Callable[[Run], None]) -> None:
    def run(operation: Operation, tensors: Tensors) -> Tensors:
        given = {key: t.to("cuda") for key, t in tensors.items()}
        results = operation.results(given, "triton")
        # A GPU draws other gradients than the CPU, where the edge looks for them.
        for (shape, stride, dtype, device, seed), drawn in list(UPSTREAM.items()):
            if device.type == "cuda":
                UPSTREAM[shape, stride, dtype, torch.device("cpu"), seed] = drawn.cpu()
        return {key: t.cpu() for key, t in results.items()}

    edge(run)
