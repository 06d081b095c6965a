"""Who takes part: plain, tuned and compiled PyTorch, the official code, and this package."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arat_fast.bench.baselines import CompileMode, PlainStep, plain_network
from arat_fast.bench.measure import cudnn_settings
from arat_fast.bench.official import OfficialStep
from arat_fast.bench.workload import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Workload
from arat_fast.device import has_bf16
from arat_fast.objectives import ARAT
from arat_fast.training.step import make_train_step

Batch = tuple[Tensor, Tensor]
Run = Callable[[Sequence[Batch]], object]
"""Trains on the batches, one step each."""

SEED = 0


@dataclass(frozen=True)
class Contestant:
    """One way to run the step.

    Attributes:
        name: on the command line and in results.
        what: one line for people.
        build: network, optimiser and step, ready to train.
        bn: BatchNorm statistics of its attack, as :attr:`arat_fast.attacks.pgd.PGD.bn`.
        ours: belongs to this package; others are baselines.
        compiles: takes a minute or more to warm up.
        deterministic: cudnn.deterministic instead of cudnn.benchmark.
    """

    name: str
    what: str
    build: Callable[[Workload, torch.device], Run]
    bn: str
    ours: bool = False
    compiles: bool = False
    deterministic: bool = False

    def settings(self) -> AbstractContextManager[None]:
        """cuDNN's settings while it runs."""
        return cudnn_settings(benchmark=not self.deterministic, deterministic=self.deterministic)


def build_step(
    workload: Workload,
    device: torch.device,
    *,
    bn: str,
    precision: torch.dtype,
    graph: Literal["on", "off"] = "off",
    round_weights: bool = False,
) -> Callable[..., dict[str, Tensor]]:
    """Our step, ``step(x, y)`` or ``step(x, y, noise)``, with the weights of ``SEED``.

    Args:
        workload: the step.
        device: where.
        bn: statistics of the attack.
        precision: as :func:`make_train_step` takes it.
        graph: "on" replays a CUDA graph, "off" does not.
        round_weights: round the initial weights to bfloat16, and keep them in float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = workload.network()
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
        objective = ARAT(network, workload.layers, workload.image_shape, gamma=workload.gamma).to(
            device
        )
    objective.start_epoch(0.5)
    if round_weights:
        with torch.no_grad():
            for parameter in (*network.parameters(), *objective.parameters()):
                parameter.copy_(parameter.bfloat16())
    optimizer = torch.optim.SGD(
        [*network.parameters(), *objective.parameters()],
        LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    return make_train_step(
        network, objective, workload.attack(bn), optimizer, precision=precision, graph=graph
    )


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def our_step(bn: str, graph: Literal["on", "off"]) -> Callable[[Workload, torch.device], Run]:
    """Our step as a contestant.

    Args:
        bn: statistics of the attack.
        graph: "on" replays a CUDA graph, "off" does not.
    """

    def build(workload: Workload, device: torch.device) -> Run:
        precision = fast_precision(device)
        step = build_step(workload, device, bn=bn, precision=precision, graph=graph)
        return lambda batches: [step(x, y) for x, y in batches][-1]["loss"]

    return build


def _plain(workload: Workload, device: torch.device, **options: Any) -> Run:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = plain_network(workload).to(device)
        if options.get("bf16"):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
        step = PlainStep(network, num_steps=workload.num_steps, gamma=workload.gamma, **options)
    return lambda batches: [step(x, y) for x, y in batches][-1]["ce_adv"]


def _compiled(mode: CompileMode) -> Callable[[Workload, torch.device], Run]:
    return partial(_plain, bf16=True, compile_mode=mode)


def all_contestants(device: torch.device, official: Path | None) -> dict[str, Contestant]:
    """Everyone who can take part on ``device``, in the order of the tables.

    Args:
        device: where it runs; a GPU adds those that need CUDA graphs.
        official: checkout of the official code, if there is one.
    """
    on_gpu = device.type == "cuda"
    graph: Literal["on", "off"] = "on" if on_gpu else "off"
    low = "bf16" if has_bf16(device) else "float32"
    found = [
        Contestant(
            "naive",
            "float32, NCHW, a module per branch, cudnn.deterministic",
            partial(_plain, read_loss=True),
            "batch_update",
            deterministic=True,
        ),
        Contestant(
            "tuned",
            "bf16 autocast, channels_last, cudnn.benchmark",
            partial(_plain, bf16=True),
            "batch_update",
        ),
        Contestant(
            "compiled",
            "tuned, and torch.compile",
            _compiled("default"),
            "batch_update",
            compiles=True,
        ),
    ]
    if on_gpu:
        found += [
            Contestant(
                "compiled-graphs",
                'tuned, and torch.compile(mode="reduce-overhead")',
                _compiled("reduce-overhead"),
                "batch_update",
                compiles=True,
            ),
            Contestant(
                "compiled-autotune",
                'tuned, and torch.compile(mode="max-autotune")',
                _compiled("max-autotune"),
                "batch_update",
                compiles=True,
            ),
        ]
    if official is not None:
        found.append(
            Contestant(
                "official",
                "the official code's train_one_epoch",
                lambda workload, where: OfficialStep(official, workload, where).run,
                "batch_update",
                deterministic=True,
            )
        )
    if on_gpu:
        found.append(
            Contestant(
                "fast-eager",
                f"this package, {low}, without the CUDA graph",
                our_step("batch", "off"),
                "batch",
                ours=True,
            )
        )
    return {
        contestant.name: contestant
        for contestant in (
            *found,
            Contestant(
                "fast",
                f"this package, {low}, attack.bn=batch",
                our_step("batch", graph),
                "batch",
                ours=True,
            ),
            Contestant(
                "fast-folded",
                f"this package, {low}, attack.bn=running",
                our_step("running", graph),
                "running",
                ours=True,
            ),
        )
    }


ONLY_ON_A_GPU = ("compiled-graphs", "compiled-autotune", "fast-eager")
NAMES = ("naive", "tuned", "compiled", "official", "fast", "fast-folded", *ONLY_ON_A_GPU)


def choose(
    names: Sequence[str], device: torch.device, official: Path | None
) -> dict[str, Contestant]:
    """The contestants called ``names``, in the order of the tables; all usual ones if there are
    none: without ``compiled-autotune``, and on the CPU without ``compiled``, which take long.

    Raises:
        ValueError: an unknown name, or one that cannot take part here.
    """
    available = all_contestants(device, official)
    if not names:
        left_out = {"compiled-autotune"} | (set() if device.type == "cuda" else {"compiled"})
        return {name: c for name, c in available.items() if name not in left_out}
    for name in names:
        if name in available:
            continue
        if name == "official":
            raise ValueError(
                "the contestant official needs its code: --official DIR, a checkout of "
                "https://github.com/futakw/AR-AT"
            )
        if name in ONLY_ON_A_GPU:
            raise ValueError(
                f"the contestant {name} differs only in CUDA graphs or kernels and needs a GPU, "
                f"got device {device}: leave it out of --contestants"
            )
        close = difflib.get_close_matches(name, available, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"unknown contestant {name!r}, expected one of {', '.join(available)}{hint}"
        )
    return {name: contestant for name, contestant in available.items() if name in names}


def best_baselines(
    results: Sequence[dict[str, Any]], field: str = "seconds_per_step"
) -> dict[str, float]:
    """``field`` of each baseline of one size; of the compiled ones, the smallest.

    Args:
        results: entries with "contestant", "ours", "status" and, where measured, ``field``.
        field: a time per step.
    """
    found: dict[str, float] = {}
    for entry in results:
        if entry["ours"] or entry["status"] != "measured":
            continue
        name = "compiled" if entry["contestant"].startswith("compiled") else entry["contestant"]
        found[name] = min(entry[field], found.get(name, float("inf")))
    return found
