"""The machine of a measurement: what it is, and how fast it copies and multiplies."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arat_fast.device import describe_device, has_bf16, versions

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
RECORDS = "benchmarks/results"

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


def output(*command: str, folder: Path = PACKAGE_ROOT) -> str:
    """What ``command`` prints in ``folder``, or "unknown" where it is missing or fails, as git does
    outside a checkout."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def is_changed(folder: Path = PACKAGE_ROOT) -> bool:
    """Whether a checkout differs from its commit in anything but records of measurements."""
    status = output("git", "status", "--porcelain", "--", ".", f":!{RECORDS}", folder=folder)
    outside = output("git", "rev-parse", "HEAD", folder=folder) == "unknown"
    return status != "" and not outside


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call with the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


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


def peak_rate(device: torch.device) -> float | None:
    """The data sheet's dense bfloat16 FLOPs per second of a GPU; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for card, rate in PEAK_BF16.items() if card in name), None)


def rates(device: torch.device) -> dict[str, Any]:
    """Copy bandwidth and matrix product of this run, and the data sheet's peak."""
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    measured = {
        "copy_bytes_per_second": copy_bandwidth(device),
        "matmul_flops_per_second": matmul_rate(device, dtype),
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "peak_flops_per_second": peak_rate(device),
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measured


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, clocks as read, versions and commit; the clocks are left as they are."""
    commit = output("git", "rev-parse", "HEAD")
    record: dict[str, Any] = {
        "device": describe_device(device),
        "type": device.type,
        "driver": None,
        "clocks": _cpu_clock(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "versions": versions(),
        "commit": commit,
        "dirty": is_changed(),
    }
    if device.type == "cuda":
        record["driver"], record["clocks"] = _card(device)
    return record


def _card(device: torch.device) -> tuple[str, str]:
    query = ["--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = [] if uuid is None else ["-i", f"GPU-{uuid}"]
    answer = output("nvidia-smi", *chosen, *query).splitlines()
    card = answer[0].split(", ") if answer else []
    if len(card) != 3:
        return "unknown", "unknown"
    return card[0], f"SM {card[1]}, memory {card[2]}"


def _cpu_clock() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return "unknown"
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("cpu MHz")]
    clocks = [float(line.partition(":")[2]) for line in lines]
    return f"{statistics.mean(clocks):.0f} MHz" if clocks else "unknown"


def new_record(kind: str, out: Path | None, device: torch.device, now: datetime.datetime) -> Path:
    """Where a record goes, ``out`` or :func:`results_path`; its folder is made.

    Raises:
        ValueError: ``out`` is a folder.
    """
    path = out or results_path(kind, device, now)
    if path.is_dir():
        raise ValueError(f"--out expects a file, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def results_path(kind: str, device: torch.device, now: datetime.datetime) -> Path:
    """A new file for a result, named by device and date, under ``benchmarks/results`` in a checkout
    and in the current folder elsewhere."""
    folder = PACKAGE_ROOT / RECORDS
    if not (PACKAGE_ROOT / "pyproject.toml").is_file():
        folder = Path.cwd()
    name = re.sub(r"\W+", "-", describe_device(device)).strip("-").lower()
    stem = f"{kind}_{name}_{now:%Y%m%d-%H%M%S}"
    path = folder / f"{stem}.json"
    count = 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.json"
    return path
