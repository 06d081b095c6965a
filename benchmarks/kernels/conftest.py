"""What the kernel benchmarks share: the card, its copy bandwidth, and alternating contestants.

Times are of a replayed CUDA graph that holds many calls on inputs too large for the L2 cache, so
that neither Python nor launches are measured. Every contestant runs in every round.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine import copy_bandwidth
from benchmarks.records import commit, is_changed, output

Call = Callable[[], object]
ROUNDS = 15


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def environment() -> dict[str, Any]:
    """Card, versions, commit, and this run's copy bandwidth, bytes read and written per second."""
    import triton

    query = ["--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    card = output("nvidia-smi", *query).splitlines()[0].split(", ")
    driver, sm_clock, memory_clock = card if len(card) == 3 else ["unknown"] * 3
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "sm_clock": sm_clock,
        "memory_clock": memory_clock,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "dirty": is_changed(),
        "copy_bytes_per_second": copy_bandwidth(torch.device("cuda")),
    }


def l2_bytes() -> int:
    """What the card's L2 cache holds."""
    return int(torch.cuda.get_device_properties().L2_cache_size)


def seconds(call: Call) -> float:
    """Wall time of a call with the device idle before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def replayable(calls: Sequence[Call]) -> Call:
    """One CUDA graph with all ``calls``, after warming them up."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's constructor
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


@pytest.fixture
def compare(
    benchmark: Any, environment: dict[str, Any]
) -> Callable[[Mapping[str, Sequence[Call]], float, str], None]:
    """Time contestants against each other: ``compare(contestants, bytes_moved, operation)``.

    ``contestants`` maps a name to calls of the same work on different inputs; the first is ours
    and is what pytest-benchmark reports. ``bytes_moved`` are the least bytes that one call of ours
    reads and writes. Each contestant's median time per call and our speed-up go to extra_info; so
    does the share of the copy bandwidth, unless the calls together move less than four times what
    the L2 cache holds, for then part of it never comes from memory.
    """

    def run(contestants: Mapping[str, Sequence[Call]], bytes_moved: float, operation: str) -> None:
        (ours, our_calls), *others = contestants.items()
        graphs = {name: (replayable(calls), len(calls)) for name, calls in contestants.items()}
        times: dict[str, list[float]] = {name: [] for name, _ in others}

        def others_first() -> None:
            for name in times:
                replay, number = graphs[name]
                times[name].append(seconds(replay) / number)
            torch.cuda.synchronize()

        def ours_synchronised() -> None:
            graphs[ours][0]()
            torch.cuda.synchronize()

        benchmark.pedantic(
            ours_synchronised, setup=others_first, rounds=ROUNDS, iterations=1, warmup_rounds=2
        )
        per_call = benchmark.stats.stats.median / len(our_calls)
        rate = bytes_moved / per_call
        cached = len(our_calls) * bytes_moved < 4 * l2_bytes()
        # The warm-up rounds run the setup too.
        medians = {name: statistics.median(values[-ROUNDS:]) for name, values in times.items()}
        benchmark.extra_info.update(
            environment,
            operation=operation,
            bytes_moved=bytes_moved,
            seconds_per_call=per_call,
            bytes_per_second=rate,
            share_of_copy_bandwidth=None if cached else rate / environment["copy_bytes_per_second"],
            other_seconds_per_call=medians,
            speed_up={name: value / per_call for name, value in medians.items()},
        )

    return run
