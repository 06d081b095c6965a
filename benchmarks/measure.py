"""Time and memory of a call."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def cudnn_settings(*, benchmark: bool, deterministic: bool) -> Iterator[None]:
    """cuDNN's choice of algorithms inside the context; TF32 stays as it is."""
    backend = torch.backends.cudnn
    before = backend.benchmark, backend.deterministic
    backend.benchmark, backend.deterministic = benchmark, deterministic
    try:
        yield
    finally:
        backend.benchmark, backend.deterministic = before


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``call`` takes: between two CUDA events on a GPU, wall time on the CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # constructor
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine has too little memory."""
    text = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def failure(error: Exception) -> dict[str, Any]:
    """Status and reason of a contestant that raised an error."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {"status": "out of memory" if is_out_of_memory(error) else "failed", "reason": reason}


def free_memory(device: torch.device) -> None:
    """Give back what nothing uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load_libraries(device: torch.device) -> None:
    """Run a convolution each way, so that no contestant pays for what is loaded and kept once."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(2, 8, 8, 8, device=device, dtype=dtype, requires_grad=True)
        weight = torch.zeros(8, 8, 3, 3, device=device, dtype=dtype, requires_grad=True)
        y = torch.nn.functional.conv2d(x, weight)
        torch.autograd.grad(y.float().sum(), (x, weight))


class PeakMemory:
    """The most memory of tensors that a GPU has held since this was made, beyond what it held
    then; None on the CPU, whose allocator does not say."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        free_memory(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def read(self) -> int | None:
        """Bytes."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - self.before
