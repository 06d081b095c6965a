"""Two processes against one that has both their batches. Rank 1 has no clean sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed import jobs

from arat_kernels.checks import Norm, Tensors, randn
from arat_kernels.split_batch_norm import SplitBatchNorm2d, split_batch_norm, use_branch

WHOLE = Norm((3, 5), channels=4, height=3, width=2)
PARTS = [(slice(0, 4), (3, 1)), (slice(4, 8), (0, 4))]
SHARED = ("weight", "bias", "running_mean", "running_var")


def results(part: slice, sizes: tuple[int, int], impl: Any, group: Any) -> Tensors:
    """Outputs, gradients and moved running statistics of the function; outputs and statistics of
    the layer."""
    given = WHOLE.make(9, torch.float64)
    dout = [randn((8, 4, 3, 2), 20, torch.float64)[part], randn((8, 4), 21, torch.float64)[part]]
    given |= {name: given[name][part] for name in ("x", "residual")}
    layer = SplitBatchNorm2d(4, dtype=torch.float64)
    layer.load_state_dict({**layer.state_dict(), **{name: given[name] for name in SHARED}})
    layer.group, layer.impl = group, impl
    sunk: list[torch.Tensor] = []
    layer.pooled_sink = sunk.append
    with use_branch(layer, "both", num_clean=sizes[0]):
        layer_y = layer(given["x"], given["residual"], relu=True)
    leaves = {name: given[name].requires_grad_() for name in ("x", "residual", "weight", "bias")}
    y, pooled = split_batch_norm(
        given["x"],
        *(given[name] for name in SHARED),
        sizes,
        training=True,
        residual=given["residual"],
        relu=True,
        return_pooled=True,
        group=group,
        impl=impl,
    )
    gradients = torch.autograd.grad([y, pooled], list(leaves.values()), dout)
    found = {"y": y, "pooled": pooled, **{name: given[name] for name in SHARED[2:]}}
    by_layer = {"y": layer_y, "pooled": sunk[0]} | {n: getattr(layer, n) for n in SHARED[2:]}
    for name, value in by_layer.items():
        assert torch.equal(value, found[name]), name
    found |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def as_rank(folder: Path, impl: str) -> None:
    """One of the processes; its results are written to ``folder/RANK.pt``."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(results(*PARTS[rank], impl, dist.group.WORLD), folder / f"{rank}.pt")
    dist.destroy_process_group()


def check_two_processes(folder: Path, impl: str) -> None:
    """Run both, then one process on the whole batch, and compare."""
    processes = jobs.start(as_rank, (folder, impl), 2, folder)
    assert jobs.wait(processes) == [0, 0], jobs.printed(folder)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, expected in results(slice(None), WHOLE.sizes, "reference", None).items():
        if name in ("dweight", "dbias"):
            got = [first[name] + second[name]]
        elif name in SHARED:
            got = [first[name], second[name]]
        else:
            got = [torch.cat([first[name], second[name]])]
        for value in got:
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8, msg=name)
