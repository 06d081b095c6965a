"""Programs of a grid that wait for nobody: the one that arrives last goes on with the results of
all; or that wait for all. Their counters, the steps inside of a kernel, and launches that wait."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are pointers and values of Triton, which have no Python type.

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

from arat_kernels.implementation import is_enabled


@triton.jit
def is_last(counter_ptr, number):
    """Whether this program is the last of ``number`` to come here, and so may read what the others
    have stored before, past the L1 (``cache_modifier=".cg"``); the counter is 0 again then."""
    # One thread counts for the program: the stores of the others must come before.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == number - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def barrier(counters_ptr, number):
    """Wait for all ``number`` programs that come here, which must be resident together; what they
    have stored before may be read past the L1. Two counters, which are 0 again afterwards.

    Returns 0, which the compiler does not know.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr, 1, sem="acq_rel") + 1
    while arrived < number:
        arrived = tl.atomic_add(counters_ptr, 0, sem="acquire")
    if is_last(counters_ptr + 1, number):
        tl.store(counters_ptr, 0)
    return arrived - number


@triton.jit
def after_the_launch_before(DEPENDENT: tl.constexpr):
    """Wait for the launch before, and let the one after begin its own wait, if launches overlap."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def dependence() -> dict[str, bool]:
    """Arguments of a launch whose kernel begins with :func:`after_the_launch_before`."""
    # Triton for AMD's cards does not know the option.
    return (
        {"DEPENDENT": True, "launch_pdl": True}
        if is_enabled("dependent_launch")
        else {"DEPENDENT": False}
    )


class Counters:
    """Counters at zero, which every kernel leaves at zero, so that none is cleared by a launch.

    Two launches that may run at once must not share one: eager calls have one set per stream, and
    every call that a CUDA graph captures takes counters of its own.
    """

    SIZE = 4096
    """Most counters of one launch that are kept; more are made for it."""
    CHUNK = 2**20
    """Counters that are made at once for graphs; a half is always left before a capture."""

    def __init__(self) -> None:
        self.of_stream: dict[tuple[int, int], Tensor] = {}
        # Never freed, for a graph does not keep alive what its kernels point at.
        self.for_graphs: dict[int, list[Tensor]] = {}
        self.captured: dict[int, int] = {}
        self._lock = threading.Lock()

    def take(self, device: torch.device, size: int) -> Tensor:
        """``size`` counters for one launch on ``device``, the current one; from any thread."""
        if device.type != "cuda" or size > self.SIZE:
            return self.zeros(size, device)
        with self._lock:
            return self._take(torch.cuda.current_device(), size)

    def _take(self, index: int, size: int) -> Tensor:
        device = torch.device("cuda", index)
        taken = self.captured.get(index, self.CHUNK)
        if torch.cuda.is_current_stream_capturing():
            if taken + size > self.CHUNK:
                # None is left, or no call came before the capture: the graph clears its own.
                return self.zeros(size, device)
            self.captured[index] = taken + size
            return self.for_graphs[index][-1][taken : taken + size]
        if taken > self.CHUNK // 2:
            self.for_graphs.setdefault(index, []).append(self._lasting_zeros(self.CHUNK, device))
            self.captured[index] = 0
        stream = (index, torch.cuda.current_stream(device).cuda_stream)
        if stream not in self.of_stream:
            self.of_stream[stream] = self._lasting_zeros(self.SIZE, device)
        return self.of_stream[stream]

    def zeros(self, size: int, device: torch.device) -> Tensor:
        """New counters."""
        return torch.zeros(size, dtype=torch.int32, device=device)

    def _lasting_zeros(self, size: int, device: torch.device) -> Tensor:
        """Counters outside of every pool of a CUDA graph.

        This thread's allocations may go to such a pool although nothing is captured: in the warm-up
        of ``torch.compile(mode="reduce-overhead")``, whose pool gives memory that is no output of
        the compiled function to others. Those of another thread do not.
        """

        def make() -> Tensor:
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                zeros = self.zeros(size, device)
            stream.synchronize()
            return zeros

        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(make).result()


counters = Counters()
