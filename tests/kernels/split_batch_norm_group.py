"""Two processes against one that has both their batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from arat_kernels.implementation import Impl
from kernels import split_batch_norm_worker as worker


def check_two_processes(folder: Path, impl: Impl) -> None:
    """Run both workers, then one process on the concatenated branches, and compare."""
    processes = [
        subprocess.Popen(
            [sys.executable, worker.__file__, str(rank), "2", str(folder / "store"), folder, impl]
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=280) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    got = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]

    (clean0, adv0), (clean1, adv1) = worker.SIZES
    parts = [worker.tensors(rank) for rank in range(2)]
    per_sample = ("x", "residual", "dy", "dpooled", "y", "pooled")

    def both(name: str, values: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        first, second = (value[name] for value in values)
        branches = [first[:clean0], second[:clean1], first[clean0:], second[clean1:]]
        return torch.cat(branches)

    whole = {
        name: both(name, parts) if name in per_sample else parts[0][name].clone()
        for name in parts[0]
    }
    sizes = (clean0 + clean1, adv0 + adv1)
    expected = worker.results(whole, sizes, "reference", None)
    for name in ("y", "pooled", "gradient of x", "gradient of residual"):
        torch.testing.assert_close(both(name, got), expected[name], rtol=1e-6, atol=1e-8)
    for values in got:
        for name in ("y", "pooled", "running_mean", "running_var"):
            assert torch.equal(values[f"{name} of the layer"], values[name]), name
    for name in ("gradient of weight", "gradient of bias"):
        torch.testing.assert_close(
            got[0][name] + got[1][name], expected[name], rtol=1e-6, atol=1e-8
        )
    for name in ("running_mean", "running_var"):
        for rank in range(2):
            torch.testing.assert_close(got[rank][name], expected[name], rtol=1e-6, atol=1e-8)
