"""Predicted efficiency of many GPUs, computed from a measured step: no GPU is used.

    python benchmarks/scaling_model.py [--record STEP.json]

A record of ``arat-fast bench step`` gives the rate at which its GPU computes; without one a rate is
assumed, and the table says so. The model is deliberately plain: every processor computes its
share at that rate, gradients travel in a ring (between machines: one ring of machines over one
network card each), and what the training's backward pass does not hide is added to the step.
Loading, imbalance, stragglers and host time are left out: real numbers are lower.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from arat_fast.models import SplitBatchNorm2d
from arat_fast.models.registry import create_model, model_spec

PEAK = 989e12
"""H200, dense bf16, FLOP/s, as published by NVIDIA."""
ASSUMED_SHARE = 0.4
"""Of the peak, where nothing was measured."""
GRADIENT_BYTES = 4
NETWORK_SHARE = 0.8
"""Of a link's nominal bandwidth that a large all-reduce is assumed to reach."""


@dataclass(frozen=True)
class Workload:
    """A network, its images and its attack."""

    title: str
    model: str
    num_classes: int
    num_steps: int
    batch: int


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
    Workload("ResNet-18, 32 px, PGD-10", "resnet18", 10, 10, 128),
    Workload("WRN-34-10, 32 px, PGD-10", "wrn34-10", 10, 10, 128),
    Workload("ResNet-50, 224 px, PGD-3", "resnet50", 1000, 3, 64),
)
CLUSTERS = (
    Cluster("8 × H200, NVLink", 1, 8),
    Cluster("4 × 8 H200, 100 Gb/s Ethernet", 4, 8),
    Cluster("8 × 1 H200, 100 Gb/s Ethernet", 8, 1),
)


@dataclass(frozen=True)
class Facts:
    """What is counted of a workload, for one GPU."""

    gradient_bytes: int
    step_flops: float
    backward_flops: float
    num_norms: int


def count(workload: Workload) -> Facts:
    """Count parameters, operations and BatchNorm layers; nothing is measured."""
    with torch.device("meta"):
        model = create_model(workload.model, workload.num_classes).eval()
        size = model_spec(workload.model).image_size
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, size, size))
    forward = float(counter.get_total_flops()) * workload.batch
    # Each attack step: a forward pass and the gradient of the images. Training: two images, each a
    # forward pass and a backward pass of two.
    return Facts(
        gradient_bytes=GRADIENT_BYTES * sum(p.numel() for p in model.parameters()),
        step_flops=forward * (2 * workload.num_steps + 6),
        backward_flops=forward * 4,
        num_norms=sum(isinstance(m, SplitBatchNorm2d) for m in model.modules()),
    )


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


def predict(facts: Facts, num_steps: int, cluster: Cluster, rate: float) -> dict[str, float]:
    """Seconds of a step, and efficiency: the share of it that a GPU computes.

    Args:
        facts: of the workload.
        num_steps: of the attack.
        cluster: the machines.
        rate: FLOP/s of one GPU in this step.
    """
    compute = facts.step_flops / rate
    reduce = all_reduce_seconds(facts.gradient_bytes, cluster)
    exposed = max(0.0, reduce - facts.backward_flops / rate)
    # Forward and backward of the attack's steps and of the training, one small collective each.
    syncs = facts.num_norms * 2 * (num_steps + 1)
    sync = syncs * all_reduce_seconds(4096, cluster)
    return {
        "compute": compute,
        "reduce": reduce,
        "efficiency": compute / (compute + exposed),
        "without overlap": compute / (compute + reduce),
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
    if best is None or model not in {w.model for w in WORKLOADS}:
        raise ValueError("the record holds no measured step of this package on a network here")
    num_steps = record["settings"]["num_steps"]
    workload = Workload(model, model, 10, num_steps, best["batch_size"])
    name = f"{best['contestant']}, {model}, batch {best['batch_size']}"
    return count(workload).step_flops / best["seconds_per_step"], name


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
            found = predict(facts, workload.num_steps, cluster, rate)
            shares = [
                f"{100 * found[name]:.1f} %"
                for name in ("efficiency", "without overlap", "synchronised")
            ]
            cells = [
                f"{workload.title}; {cluster.title}",
                str(workload.batch),
                f"{facts.gradient_bytes / 1e6:.0f}",
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
