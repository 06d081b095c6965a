"""Launches of a step and where its time goes, from torch.profiler's events."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import seconds

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


@cache
def classify(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    """The class of a kernel or operator, by its name."""
    for kind, pattern in patterns:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


class Work(NamedTuple):
    """A kernel, or an operator and those that it calls.

    Attributes:
        name: of the kernel or operator.
        kind: one of :data:`CLASSES`.
        start, end: microseconds.
        own: microseconds that are not those of a called operator.
        is_leaf: calls none.
    """

    name: str
    kind: str
    start: float
    end: float
    own: float
    is_leaf: bool = True


def kernels(events: Iterable[Any]) -> list[Work]:
    """What ran on a GPU."""
    return [
        Work(e.name, classify(e.name, KERNELS), start, end, end - start)
        for e in events
        if e.device_type.name == "CUDA" and not e.is_user_annotation
        for start, end in [(e.time_range.start, e.time_range.end)]
    ]


def operators(events: Iterable[Any]) -> list[Work]:
    """What ran on the CPU; the class is that of the outermost operator around it that has one."""
    found = []
    for event in events:
        kind, outer = classify(event.name, OPERATORS), event
        while (outer := outer.cpu_parent) is not None:
            # Any of ours or of autograd's may hold a named one: only that decides.
            around = classify(outer.name, OPERATORS)
            if around not in ("other", "elementwise"):
                kind = around
        span, own = event.time_range, event.self_cpu_time_total
        found.append(Work(event.name, kind, span.start, span.end, own, not event.cpu_children))
    return found


def summarize(work: Sequence[Work], num_steps: int) -> dict[str, Any]:
    """Launches per step and share of time by class.

    Returns:
        "launches" per step, of operators those that call no other; "microseconds" per step from the
        first start to the last end, and "share" of it by class, "idle" being the time in which
        nothing ran; work at the same time counts for each; "kernels": the longest, with launches
        and microseconds per step.
    """
    work = sorted(work, key=lambda one: one.start)
    busy, end = 0.0, work[0].start
    totals = dict.fromkeys(CLASSES, 0.0)
    names: dict[tuple[str, str], list[float]] = {}
    for one in work:
        busy += max(0.0, one.end - max(one.start, end))
        end = max(end, one.end)
        totals[one.kind] += one.own
        names.setdefault((one.name, one.kind), []).append(one.own)
    span = end - work[0].start
    totals["idle"] = span - busy
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:15]
    return {
        "launches": sum(one.is_leaf for one in work) / num_steps,
        "microseconds": span / num_steps,
        "share": {kind: total / span for kind, total in totals.items()},
        "kernels": [
            {
                "name": name[:160],
                "class": kind,
                "launches": len(own) / num_steps,
                "microseconds": sum(own) / num_steps,
            }
            for (name, kind), own in longest
        ],
    }


def profile_run(run: Callable[[], object], device: torch.device, num_steps: int) -> dict[str, Any]:
    """Profile ``run``, ``num_steps`` training steps, which is warm.

    Returns:
        :func:`summarize` of the kernels on a GPU, of the operators on the CPU; and
        "seconds_per_step" under the profiler, which slows short operators down.

    Raises:
        RuntimeError: the profiler saw nothing, as where CUPTI is missing.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as trace:
        elapsed = seconds(run, device)
    events = trace.events()
    work = kernels(events) if on_gpu else operators(events)
    if not work:
        raise RuntimeError("the profiler saw nothing that ran: CUPTI may be missing or in use")
    found = summarize(work, num_steps)
    return {**found, "seconds_per_step": elapsed / num_steps}
