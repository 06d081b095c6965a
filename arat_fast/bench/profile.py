"""Launches of a step and where its time goes, from torch.profiler's trace."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from arat_fast.bench.measure import device_seconds

CLASSES = (
    "convolution",
    "BatchNorm",
    "matrix product",
    "elementwise",
    "optimiser",
    "other",
    "idle",
)

# The first pattern that is found decides. Kernels that Inductor wrote name what they fuse.
KERNELS = (
    ("optimiser", r"multi_tensor_apply|fused_?sgd|_foreach"),
    ("BatchNorm", r"split_batch_norm|frozen_affine|batch_?norm|bn_fw|bn_bw|welford"),
    ("elementwise", r"^triton_"),
    (
        "convolution",
        r"fprop|dgrad|wgrad|implicit_?gemm|conv(?!ert)|winograd|cudnn|nchwTo|nhwcTo|xmma",
    ),
    ("matrix product", r"gemm|gemv|nvjet|cublas|cutlass"),
    (
        "elementwise",
        r"elementwise|reduce|pgd_step|random_start|crop_flip|cosine|cross_entropy|softmax|nll_loss"
        r"|CatArray|copy|fill|pool|distribution|index|Memcpy|Memset",
    ),
)
OPERATORS = (
    ("optimiser", r"Optimizer\.|_foreach|_fused_sgd"),
    ("convolution", r"conv(?!ert)"),
    ("BatchNorm", r"batch_?norm|split_?batch|frozen_?affine"),
    ("matrix product", r"aten::(linear|addmm|mm|bmm|baddbmm|matmul)|Addmm|Bmm|MmBackward"),
    ("elementwise", r"^aten::|^arat_kernels::|Backward"),
)


def classify(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    """The class of a kernel or operator, by its name."""
    for kind, pattern in patterns:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def summarize_kernels(events: list[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """Launches per step and share of time by class of what ran on a GPU.

    Args:
        events: of a trace in Chrome's format.
        num_steps: steps in the trace.

    Returns:
        "launches" per step; "microseconds" per step from the first launch to the last end, and
        "share" of it by class, "idle" being the time in which nothing ran; overlapping work counts
        for each; "kernels": the longest, with launches and microseconds per step.
    """
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    work = [e for e in events if e.get("ph") == "X" and e.get("cat") in kinds]
    if not work:
        return {"launches": 0.0, "microseconds": 0.0, "share": {}, "kernels": []}
    work.sort(key=lambda event: event["ts"])
    busy, end = 0.0, float(work[0]["ts"])
    totals: dict[str, float] = {}
    names: dict[str, list[float]] = {}
    for event in work:
        start, duration = float(event["ts"]), float(event["dur"])
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
        kind = classify(event["name"], KERNELS)
        totals[kind] = totals.get(kind, 0.0) + duration
        names.setdefault(event["name"], []).append(duration)
    span = end - float(work[0]["ts"])
    share = {kind: total / span for kind, total in totals.items()}
    share["idle"] = (span - busy) / span
    return {
        "launches": len(work) / num_steps,
        "microseconds": span / num_steps,
        "share": _ordered(share),
        "kernels": _longest(names, KERNELS, num_steps),
    }


def summarize_operators(events: list[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """The same for operators on the CPU: "launches" are operators that call no other.

    An operator's time goes to the class of the outermost operator around it that has one; "idle" is
    the time in which Python ran.
    """
    kinds = ("cpu_op", "user_annotation")
    by_thread: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in kinds:
            by_thread.setdefault(event["tid"], []).append(event)
    totals: dict[str, float] = {}
    names: dict[str, list[float]] = {}
    leaves = 0
    starts, ends = [], []
    for thread in by_thread.values():
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        # End of an open operator, its class, its own time, whether it called none, its name.
        stack: list[list[Any]] = []

        def close(entry: list[Any]) -> None:
            nonlocal leaves
            _, kind, own, is_leaf, name = entry
            totals[kind] = totals.get(kind, 0.0) + max(0.0, own)
            names.setdefault(name, []).append(max(0.0, own))
            leaves += is_leaf

        for event in thread:
            start, duration = float(event["ts"]), float(event["dur"])
            while stack and stack[-1][0] <= start:
                close(stack.pop())
            kind = classify(event["name"], OPERATORS)
            if stack:
                stack[-1][2] -= duration
                stack[-1][3] = False
                # Any of ours or of autograd's may hold a named one: only that decides.
                outer = stack[-1][1]
                kind = kind if outer in ("other", "elementwise") else outer
            stack.append([start + duration, kind, duration, True, event["name"]])
            starts.append(start)
            ends.append(start + duration)
        while stack:
            close(stack.pop())
    if not starts:
        return {"launches": 0.0, "microseconds": 0.0, "share": {}, "kernels": []}
    span = max(ends) - min(starts)
    share = {kind: total / span for kind, total in totals.items()}
    share["idle"] = max(0.0, 1 - sum(share.values()))
    return {
        "launches": leaves / num_steps,
        "microseconds": span / num_steps,
        "share": _ordered(share),
        "kernels": _longest(names, OPERATORS, num_steps),
    }


def profile_run(run: Callable[[], object], device: torch.device, num_steps: int) -> dict[str, Any]:
    """Profile ``run``, ``num_steps`` training steps, which is warm.

    Returns:
        :func:`summarize_kernels` on a GPU, :func:`summarize_operators` on the CPU; and
        "seconds_per_step" under the profiler, which slows short operators down.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as trace:
        elapsed = device_seconds(run, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"))["traceEvents"]
    summarize = summarize_kernels if on_gpu else summarize_operators
    return {**summarize(events, num_steps), "seconds_per_step": elapsed / num_steps}


def _ordered(share: dict[str, float]) -> dict[str, float]:
    return {kind: share.get(kind, 0.0) for kind in CLASSES}


def _longest(
    names: dict[str, list[float]], patterns: Iterable[tuple[str, str]], num_steps: int
) -> list[dict[str, Any]]:
    patterns = tuple(patterns)
    entries = [
        {
            "name": name[:160],
            "class": classify(name, patterns),
            "launches": len(durations) / num_steps,
            "microseconds": sum(durations) / num_steps,
        }
        for name, durations in names.items()
    ]
    entries.sort(key=lambda entry: -float(str(entry["microseconds"])))
    return entries[:15]
