"""Predicted efficiency of many GPUs, computed from a measured step: no GPU is used.

    python benchmarks/scaling_model.py [--record STEP.json]

A record of ``arat-fast bench step`` gives the rate at which its GPU computes; without one a rate is
assumed, and the table says so. The model is deliberately plain: every processor computes its
share at that rate, gradients travel in a ring (between machines: one ring of machines over one
network card each) in the buckets of the training step, and what the training's backward pass does
not hide is added to the step: never less than the last bucket, which is full when that pass is
over, and always the running statistics, which are averaged after it. The predictors' operations,
loading, imbalance, stragglers and host time are left out: real numbers are lower.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from arat_fast.build import build_model, build_objective
from arat_fast.config import Config
from arat_fast.distributed.batch_norm import running_statistics
from arat_fast.distributed.gradients import in_buckets
from arat_fast.models import SplitBatchNorm2d
from arat_fast.models.registry import model_spec
from arat_fast.objectives.predictor import PredictorStack
from arat_fast.recipes import recipe

PEAK = 989e12
"""H200, dense bf16, FLOP/s, as published by NVIDIA."""
ASSUMED_SHARE = 0.4
"""Of the peak, where nothing was measured."""
NETWORK_SHARE = 0.8
"""Of a link's nominal bandwidth that a large all-reduce is assumed to reach."""


@dataclass(frozen=True)
class Workload:
    """A recipe's network, objective and attack, and the images of one GPU."""

    title: str
    recipe: str
    num_classes: int
    batch: int

    @property
    def config(self) -> Config:
        return recipe(self.recipe)


@dataclass(frozen=True)
class Cluster:
    """Machines of GPUs, and how fast they talk."""

    title: str
    machines: int
    gpus: int
    nvlink: float = 450e9
    """Bytes/s of one GPU in one direction, nominal."""
    network: float = 12.5e9
    """Bytes/s of one machine in one direction, nominal: 100 Gb/s."""
    nvlink_latency: float = 1.5e-6
    """Seconds of one turn of the ring, assumed."""
    network_latency: float = 30e-6


WORKLOADS = (
    Workload("ResNet-18, 32 px, PGD-10", "cifar10-resnet18", 10, 128),
    Workload("WRN-34-10, 32 px, PGD-10", "cifar10-wrn34-10", 10, 128),
    Workload("ResNet-50, 224 px, PGD-3", "imagenet-resnet50", 1000, 64),
)
CLUSTERS = (
    Cluster("8 × H200, NVLink", 1, 8),
    Cluster("4 × 8 H200, 100 Gb/s Ethernet", 4, 8),
    Cluster("8 × 1 H200, 100 Gb/s Ethernet", 8, 1),
)


@dataclass(frozen=True)
class Facts:
    """What is counted of a workload, for one GPU.

    Attributes:
        bucket_bytes: of the gradients of network and predictors, in the order in which they are
            sent.
        statistics_bytes: of the running means and variances.
        step_flops: of the attack and the training.
        backward_flops: of the training's backward pass.
        num_syncs: collectives of a step with synchronised BatchNorm: one for each layer, forward
            and backward, of each attack step and of the training; in the training alone those of
            the predictors.
    """

    bucket_bytes: tuple[int, ...]
    statistics_bytes: int
    step_flops: float
    backward_flops: float
    num_syncs: int


@dataclass
class Shape:
    """What a network has to know of the images."""

    num_classes: int
    image_shape: tuple[int, int, int]


def count(workload: Workload, num_steps: int | None = None, batch: int | None = None) -> Facts:
    """Count parameters, operations and BatchNorm layers; nothing is measured.

    Args:
        workload: what a GPU computes.
        num_steps, batch: in place of the workload's.
    """
    config = workload.config
    steps = config.attack.num_steps if num_steps is None else num_steps
    size = model_spec(config.model.name).image_size
    shape = Shape(workload.num_classes, (3, size, size))
    with torch.device("meta"):
        model = build_model(config, shape)
        objective = build_objective(config, model, shape)
        statistics = running_statistics(model, objective)
        model.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, size, size))
    forward = float(counter.get_total_flops()) * (batch or workload.batch)
    parameters = [*model.parameters(), *objective.parameters()]
    buckets = in_buckets([p for p in parameters if p.requires_grad])
    norms = sum(isinstance(m, SplitBatchNorm2d) for m in model.modules())
    stacks = sum(isinstance(m, PredictorStack) for m in objective.modules())
    # Each attack step: a forward pass and the gradient of the images. Training: two images, each a
    # forward pass and a backward pass of two.
    return Facts(
        bucket_bytes=tuple(map(num_bytes, buckets)),
        statistics_bytes=num_bytes(statistics),
        step_flops=forward * (2 * steps + 6),
        backward_flops=forward * 4,
        num_syncs=2 * (norms * (steps + 1) + stacks),
    )


def num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the elements of all ``tensors``."""
    return sum(t.numel() * t.element_size() for t in tensors)


def all_reduce_seconds(size: float, cluster: Cluster) -> float:
    """A ring in every machine, and one of the machines between its two halves."""
    seconds = 0.0
    for members, bandwidth, latency in (
        (cluster.gpus, cluster.nvlink, cluster.nvlink_latency),
        (cluster.machines, cluster.network, cluster.network_latency),
    ):
        turns = 2 * (members - 1)
        seconds += turns / members * size / (bandwidth * NETWORK_SHARE) + turns * latency
    return seconds


def predict(facts: Facts, cluster: Cluster, rate: float) -> dict[str, float]:
    """Seconds of a step, and efficiency: the share of it that a GPU computes.

    Args:
        facts: of the workload.
        cluster: the machines.
        rate: FLOP/s of one GPU in this step.
    """
    compute = facts.step_flops / rate
    buckets = [all_reduce_seconds(size, cluster) for size in facts.bucket_bytes]
    exposed = max(sum(buckets) - facts.backward_flops / rate, buckets[-1])
    statistics = all_reduce_seconds(facts.statistics_bytes, cluster)
    # In place of the average of the statistics.
    sync = facts.num_syncs * all_reduce_seconds(4096, cluster)
    return {
        "compute": compute,
        "reduce": sum(buckets) + statistics,
        "efficiency": compute / (compute + exposed + statistics),
        "without overlap": compute / (compute + sum(buckets) + statistics),
        "synchronised": compute / (compute + exposed + sync),
    }


def measured_rate(record: dict[str, Any]) -> tuple[float, str]:
    """FLOP/s of the fastest of this package's steps in a record of ``bench step``, and its name."""
    if record["machine"]["type"] != "cuda":
        raise ValueError(
            f"a record of a GPU is expected, got one of {record['machine']['device']}: nothing "
            "about one follows from it"
        )
    model = record["settings"]["model"]
    best = min(
        (r for r in record["results"] if r.get("ours") and r["status"] == "measured"),
        key=lambda r: r["seconds_per_step"] / r["batch_size"],
        default=None,
    )
    workload = next((w for w in WORKLOADS if w.config.model.name == model), None)
    if best is None or workload is None:
        raise ValueError("the record holds no measured step of this package on a network here")
    facts = count(workload, record["settings"]["num_steps"], best["batch_size"])
    name = f"{best['contestant']}, {model}, batch {best['batch_size']}"
    return facts.step_flops / best["seconds_per_step"], name


def table(record: Path | None = None) -> str:
    """The prediction as Markdown."""
    if record is None:
        rate = ASSUMED_SHARE * PEAK
        source = (
            f"**Computed, with an assumed rate**: {rate / 1e12:.0f} TFLOP/s a GPU, "
            f"{100 * ASSUMED_SHARE:.0f} % of the {PEAK / 1e12:.0f} of an H200. No step has been "
            "measured on one yet; `--record` puts a measured rate in its place."
        )
    else:
        rate, name = measured_rate(json.loads(record.read_text()))
        source = (
            f"**Computed from a measured rate**: {rate / 1e12:.3g} TFLOP/s, that of {name} in "
            f"{record.name}."
        )
    lines = [
        source,
        "",
        "| | batch a GPU | gradients, MB | compute a step, ms | all-reduce, ms | efficiency | "
        "without overlap | with synchronised BatchNorm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workload in WORKLOADS:
        facts = count(workload)
        for cluster in CLUSTERS:
            found = predict(facts, cluster, rate)
            shares = [
                f"{100 * found[name]:.1f} %"
                for name in ("efficiency", "without overlap", "synchronised")
            ]
            cells = [
                f"{workload.title}; {cluster.title}",
                str(workload.batch),
                f"{sum(facts.bucket_bytes) / 1e6:.0f}",
                f"{1e3 * found['compute']:.1f}",
                f"{1e3 * found['reduce']:.2f}",
                *shares,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Predicted efficiency of many GPUs.")
    parser.add_argument("--record", type=Path, help="JSON of arat-fast bench step on one GPU")
    print(table(parser.parse_args().record))


if __name__ == "__main__":
    main()
