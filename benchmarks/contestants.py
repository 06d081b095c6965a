"""Who takes part: plain, tuned and compiled PyTorch, the official code, and this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arat_fast.device import has_bf16
from arat_fast.objectives import ARAT
from arat_fast.training.step import TrainStep
from arat_kernels.implementation import Experiment, experimental
from benchmarks.baselines import PlainStep, plain_network
from benchmarks.measure import cudnn_settings
from benchmarks.official import OfficialStep
from benchmarks.workload import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Workload

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
        graph: replays a CUDA graph of ours.
        compiles: takes a minute or more to warm up.
        deterministic: cudnn.deterministic instead of cudnn.benchmark.
    """

    name: str
    what: str
    build: Callable[[Workload, torch.device], Run]
    bn: str = "batch_update"
    ours: bool = False
    graph: bool = False
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
    graph: bool = False,
    round_weights: bool = False,
) -> TrainStep:
    """Our step with the weights of ``SEED``.

    Args:
        workload: the step.
        device: where.
        bn: statistics of the attack.
        precision: as :class:`TrainStep` takes it.
        graph: replay a CUDA graph.
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
    replay: Literal["on", "off"] = "on" if graph else "off"
    return TrainStep(
        network, objective, workload.attack(bn), optimizer, precision=precision, graph=replay
    )


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def _ours(
    name: str, what: str, device: torch.device, bn: str, graph: bool, *ways: Experiment
) -> Contestant:
    def build(workload: Workload, device: torch.device) -> Run:
        precision = fast_precision(device)
        step = build_step(workload, device, bn=bn, precision=precision, graph=graph)

        def run(batches: Sequence[Batch]) -> Tensor:
            with experimental(*ways):
                return [step(x, y) for x, y in batches][-1]["loss"]

        return run

    low = "bf16" if has_bf16(device) else "float32"
    what = f"this package, {low}, {what}"
    return Contestant(name, what, build, bn, ours=True, graph=graph)


def _plain(workload: Workload, device: torch.device, **options: Any) -> Run:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = plain_network(workload).to(device)
        if options.get("bf16"):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
        step = PlainStep(network, num_steps=workload.num_steps, gamma=workload.gamma, **options)
    return lambda batches: [step(x, y) for x, y in batches][-1]["ce_adv"]


def _compiled(name: str, what: str, mode: str) -> Contestant:
    build = partial(_plain, bf16=True, compile_mode=mode)
    return Contestant(name, f"tuned, and {what}", build, compiles=True)


EXPERIMENTS: dict[str, Experiment] = {
    "fast-one-pass": "one_pass",
    "fast-dependent": "dependent_launch",
}
ONLY_ON_A_GPU = ("compiled-graphs", "compiled-autotune", "fast-eager", *EXPERIMENTS)
NAMES = ("naive", "tuned", "compiled", "official", "fast", "fast-folded", *ONLY_ON_A_GPU)


def all_contestants(device: torch.device, official: Path | None) -> dict[str, Contestant]:
    """Everyone who can take part on ``device``, in the order of the tables.

    Args:
        device: where it runs; a GPU adds those that need CUDA graphs.
        official: checkout of the official code, if there is one.
    """
    on_gpu = device.type == "cuda"
    found = [
        Contestant(
            "naive",
            "float32, NCHW, a module per branch, cudnn.deterministic",
            partial(_plain, read_loss=True),
            deterministic=True,
        ),
        Contestant(
            "tuned", "bf16 autocast, channels_last, cudnn.benchmark", partial(_plain, bf16=True)
        ),
        _compiled("compiled", "torch.compile", "default"),
        _compiled("compiled-graphs", 'torch.compile(mode="reduce-overhead")', "reduce-overhead"),
        _compiled("compiled-autotune", 'torch.compile(mode="max-autotune")', "max-autotune"),
        Contestant(
            "official",
            "the official code's train_one_epoch",
            lambda workload, device: OfficialStep(official or Path(), workload, device).run,
            deterministic=True,
        ),
        _ours("fast-eager", "without the CUDA graph", device, "batch", False),
        _ours("fast", "attack.bn=batch", device, "batch", on_gpu),
        _ours("fast-folded", "attack.bn=running", device, "running", on_gpu),
        *(
            _ours(name, f"attack.bn=batch, {way}", device, "batch", on_gpu, way)
            for name, way in EXPERIMENTS.items()
        ),
    ]
    absent = [*([] if on_gpu else ONLY_ON_A_GPU), *([] if official else ["official"])]
    return {c.name: c for c in found if c.name not in absent}


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
        left_out = {"compiled-autotune", *EXPERIMENTS} | (
            set() if device.type == "cuda" else {"compiled"}
        )
        return {name: c for name, c in available.items() if name not in left_out}
    for name in names:
        if name not in available:
            raise ValueError(
                f"the contestant {name!r} cannot take part here, expected some of "
                f"{', '.join(available)}; official needs --official DIR, a checkout of "
                f"https://github.com/futakw/AR-AT, and {', '.join(ONLY_ON_A_GPU)} a GPU"
            )
    return {name: contestant for name, contestant in available.items() if name in names}
