"""The sum of gradients over processes, here one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from arat_fast.distributed.gradients import GradientSum


def test_gradients_of_any_layout_come_back_as_they_were(tmp_path: Path) -> None:
    """Those of a channels_last network travel in their own order, not transposed one by one."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1, bias=False), nn.Linear(2, 3))
        network[0].to(memory_format=torch.channels_last)
        # No dense layout: a transposed matrix.
        network[2].weight = nn.Parameter(torch.randn(2, 3).t())
        parameters = list(network.parameters())
        gradients = [torch.randn_like(p) for p in parameters]
        total = GradientSum(parameters, [], torch.distributed.group.WORLD, overlap=False)
        with total.backward():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]  # has one
    (bucket,) = total.buckets
    strides = {tuple(view.shape): view.stride() for view in bucket.views}
    assert strides[(4, 3, 3, 3)] == network[0].weight.stride() == (27, 1, 9, 3)
