"""One process with NCCL on a GPU: the graph, the sums in it, the checkpoint from a side stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import OPTIONS

from arat_fast.training.checkpoint import CheckpointFolder, load_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TRAIN = ["train", "digits", *OPTIONS[:-2], "--train.device", "cuda", "--train.epochs", "6"]


def run(out: Path, *extra: str, torchrun: bool = True) -> tuple[dict[str, object], dict[str, int]]:
    """The run's summary, and what was counted."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    counts = out.with_suffix(".counts")
    program = [str(Path(__file__).with_name("counted.py")), str(counts)]
    command = [*launcher, *program] if torchrun else program
    result = subprocess.run(
        [sys.executable, *command, *TRAIN, "--out", str(out), *extra],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    summary: dict[str, object] = json.loads((out / "summary.json").read_text())
    return summary, json.loads(counts.read_text())


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("sync", [False, True])
def test_graph_with_nccl_trains_as_eager_without(tmp_path: Path, sync: bool) -> None:
    extra = ["--distributed.sync-bn"] if sync else []
    summary, counts = run(tmp_path / "graph", "--step.graph", "on", *extra)
    assert summary["processes"] == 1 and summary["status"] == "finished"
    # The full batch and the last one of an epoch; of 24 steps three of each run eagerly.
    assert counts["captures"] == 2 and counts["replays"] == 18
    assert counts["captured sums"] >= 2
    _, counts = run(tmp_path / "eager", "--step.graph", "off", torchrun=False)
    assert counts == {}
    # The first epochs, before differences in rounding have grown.
    for a, b in list(zip(losses(tmp_path / "graph"), losses(tmp_path / "eager"), strict=True))[:6]:
        assert a == pytest.approx(b, rel=0.02)


@pytest.mark.parametrize("graph", ["off", "on"])
def test_overlap_changes_nothing(tmp_path: Path, graph: str) -> None:
    for name in ("on", "off"):
        _, counts = run(tmp_path / name, "--distributed.overlap", name, "--step.graph", graph)
        assert (counts.get("replays", 0) > 0) == (graph == "on")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("on", "off")]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 20
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 1)
    weights = torch.zeros(2**24, device="cuda")
    for step in range(1, 5):
        weights.fill_(step)
        folder.save(step, {"weights": weights, "step": step}, lambda: None)
        weights.fill_(-1)
        folder.wait()
        assert (load_checkpoint(folder.newest)["weights"] == step).all()
