"""One process of the test of split BatchNorm's statistics over a process group.

Called as ``python split_batch_norm_worker.py RANK WORLD STORE RESULTS IMPL``; writes this process's
results to ``RESULTS/RANK.pt``. Rank 1 has no clean sample.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from arat_kernels.split_batch_norm import SplitBatchNorm2d, split_batch_norm, use_branch

SIZES = [(3, 1), (0, 4)]
CHANNELS, HEIGHT, WIDTH = 4, 3, 2
SHAPE = (CHANNELS, HEIGHT, WIDTH)
SHARED = ("weight", "bias", "running_mean", "running_var")


def tensors(rank: int) -> dict[str, torch.Tensor]:
    """This rank's samples and upstream gradients, and what all ranks share."""
    own = torch.Generator().manual_seed(10 + rank)
    shared = torch.Generator().manual_seed(9)
    n = sum(SIZES[rank])
    drawn = {
        name: torch.randn((n, *SHAPE), generator=own, dtype=torch.float64)
        for name in ("x", "residual", "dy")
    }
    drawn["x"] = (drawn["x"] + rank).contiguous(memory_format=torch.channels_last)
    drawn["dpooled"] = torch.randn((n, CHANNELS), generator=own, dtype=torch.float64)
    for name in SHARED[:3]:
        drawn[name] = torch.randn((2, CHANNELS), generator=shared, dtype=torch.float64)
    drawn["running_var"] = torch.rand((2, CHANNELS), generator=shared, dtype=torch.float64) + 0.5
    return drawn


def results(
    given: dict[str, torch.Tensor],
    sizes: tuple[int, int],
    impl: str,
    group: dist.ProcessGroup | None,
) -> dict[str, torch.Tensor]:
    """Outputs, gradients and moved running statistics."""
    leaves = {name: given[name].requires_grad_() for name in ("x", "residual", "weight", "bias")}
    y, pooled = split_batch_norm(
        given["x"],
        given["weight"],
        given["bias"],
        given["running_mean"],
        given["running_var"],
        sizes,
        training=True,
        residual=given["residual"],
        relu=True,
        return_pooled=True,
        group=group,
        impl=impl,
    )
    upstream = [given["dy"], given["dpooled"]]
    gradients = torch.autograd.grad([y, pooled], list(leaves.values()), upstream)
    return {
        "y": y.detach(),
        "pooled": pooled.detach(),
        "running_mean": given["running_mean"],
        "running_var": given["running_var"],
        **{f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)},
    }


def layer_results(
    given: dict[str, torch.Tensor],
    sizes: tuple[int, int],
    impl: Any,
    group: dist.ProcessGroup | None,
) -> dict[str, torch.Tensor]:
    """As :func:`results`, by the layer, without what it returns besides the outputs."""
    layer = SplitBatchNorm2d(CHANNELS, dtype=torch.float64)
    layer.load_state_dict({**layer.state_dict(), **{name: given[name] for name in SHARED}})
    layer.group, layer.impl = group, impl
    pooled: list[torch.Tensor] = []
    layer.pooled_sink = pooled.append
    with use_branch(layer, "both", num_clean=sizes[0]):
        y = layer(given["x"], given["residual"], relu=True)
    buffers = {name: getattr(layer, name) for name in SHARED[2:]}
    return {"y": y.detach(), "pooled": pooled[0].detach(), **buffers}


def main() -> None:
    rank, world, store, folder, impl = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world)
    )
    arguments = SIZES[int(rank)], impl, dist.group.WORLD
    got = results(tensors(int(rank)), *arguments)
    by_layer = layer_results(tensors(int(rank)), *arguments)
    got.update({f"{name} of the layer": value for name, value in by_layer.items()})
    torch.save(got, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
