"""The machine of a measurement: what it is, and how fast it copies and multiplies."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from arat_fast.device import describe_device, has_bf16, source_commit, versions
from benchmarks.measure import free_memory, seconds

# Dense bfloat16 with float32 sums, from the makers' data sheets. The first name found in the
# card's counts.
PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def copy_bandwidth(device: torch.device, num_bytes: int | None = None) -> float:
    """Bytes read and written per second by a large copy, the best of ten.

    Args:
        device: a GPU or the CPU.
        num_bytes: of the source; default 2 GiB on a GPU, 256 MiB on the CPU.
    """
    if num_bytes is None:
        num_bytes = 2**31 if device.type == "cuda" else 2**28
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * source.numel() / min(times[2:])


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOPs per second of a square matrix product of random numbers, the median of seven groups.

    Args:
        device: a GPU or the CPU.
        dtype: of the factors and of the product.
        size: rows of each matrix; default 8192 on a GPU, 2048 on the CPU.
    """
    if size is None:
        size = 8192 if device.type == "cuda" else 2048
    repeats = 10 if device.type == "cuda" else 2
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)

    def group() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=product)

    times = [seconds(group, device) for _ in range(9)]
    return 2 * size**3 * repeats / statistics.median(times[2:])


def rates(device: torch.device) -> dict[str, Any]:
    """Copy bandwidth and matrix product of this run, and the data sheet's dense bfloat16 peak, None
    where it is not known."""
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    measured = {
        "copy_bytes_per_second": copy_bandwidth(device),
        "matmul_flops_per_second": matmul_rate(device, dtype),
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "peak_flops_per_second": next((r for card, r in PEAK_BF16.items() if card in name), None),
    }
    free_memory(device)
    return measured


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, clocks as read, versions and commit; the clocks are left as they are."""
    driver, clocks = _card(device) if device.type == "cuda" else (None, _cpu_clock())
    return {
        "device": describe_device(device),
        "type": device.type,
        "driver": driver,
        "clocks": clocks,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "platform": platform.platform(),
        "versions": versions(),
        "commit": source_commit(),
    }


def _card(device: torch.device) -> tuple[str, str]:
    """Driver and clocks of a GPU, as ``nvidia-smi`` reads them."""
    uuid = torch.cuda.get_device_properties(device).uuid
    query = ["--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    command = ["nvidia-smi", "-i", f"GPU-{uuid}", *query]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        driver, sm, memory = done.stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError, ValueError):
        return "unknown", "unknown"
    return driver, f"SM {sm}, memory {memory}"


def _cpu_clock() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    clocks = [float(mhz) for mhz in re.findall(r"cpu MHz\s*: ([\d.]+)", text)]
    return f"{statistics.mean(clocks):.0f} MHz" if clocks else "unknown"
