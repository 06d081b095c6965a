"""Analyses of a run in two processes: rank 0 writes them, and the weights stay the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed import drills, jobs
from distributed.drills import Drill
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

EXTRA = ("--train.epochs", "2", "--distributed.sync-bn")


@pytest.mark.parametrize("norm", ["split", "shared"])
def test_synchronised_batch_norm(tmp_path: Path, norm: str) -> None:
    for name, every in (("without", "0"), ("with", "1")):
        extra = (*EXTRA, "--model.norm", norm, "--analyze.every", every)
        log = tmp_path / f"log-{name}"
        log.mkdir()
        drill = Drill(out=str(tmp_path / name), extra=extra)
        codes = jobs.wait(jobs.start(drills.as_rank, (drill,), 2, log))
        assert set(codes) == {0}, jobs.printed(log)
    lines = [json.loads(x) for x in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    analyses = [line for line in lines if line["kind"] == "analysis"]
    assert [line["epoch"] for line in analyses] == [0, 1, 2]
    assert all(line["gradient_conflict"] and line["mixture"] for line in analyses)
    left, right = (load_file(tmp_path / n / "model.safetensors") for n in ("without", "with"))
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())
