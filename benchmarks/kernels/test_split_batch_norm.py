"""Split BatchNorm + residual + ReLU against PyTorch eager, torch.compile and cuDNN.

Every contestant normalises both halves of a bf16 channels_last batch with batch statistics.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arat_kernels.split_batch_norm import split_batch_norm

# (2 N, C, H, W): stages of ResNet-18 and WRN-34-10 on 32x32 images.
SHAPES = [
    (1024, 64, 32, 32),
    (1024, 128, 16, 16),
    (1024, 512, 4, 4),
    (512, 160, 32, 32),
    (512, 640, 8, 8),
]
# Inputs of all calls of a graph together are far over the L2 cache.
BYTES_PER_GRAPH = 2e9
EPS, MOMENTUM = 1e-5, 0.1


@dataclass
class Problem:
    """One input set on the card."""

    x: Tensor
    residual: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.residual, self.weight, self.bias]


def problems(shape: tuple[int, int, int, int]) -> list[Problem]:
    numbers = torch.Generator("cuda").manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        value = torch.randn(size, generator=numbers, device="cuda", dtype=torch.float32)
        if len(size) == 4:
            return value.to(dtype).contiguous(memory_format=torch.channels_last)
        return value.to(dtype)

    made = []
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    for _ in range(max(2, round(BYTES_PER_GRAPH / (6 * elements)))):
        x, residual, dy = (draw(*shape, dtype=torch.bfloat16) for _ in range(3))
        weight, bias, mean = (draw(2, shape[1]) for _ in range(3))
        problem = Problem(x, residual, dy, weight, bias, mean, draw(2, shape[1]).abs() + 0.5)
        for leaf in problem.leaves:
            leaf.requires_grad_()
        made.append(problem)
    return made


def ours(p: Problem) -> Tensor:
    half = p.x.shape[0] // 2
    return split_batch_norm(
        p.x,
        p.weight,
        p.bias,
        p.running_mean,
        p.running_var,
        (half, half),
        training=True,
        momentum=MOMENTUM,
        eps=EPS,
        residual=p.residual,
        relu=True,
    )


def eager(p: Problem) -> Tensor:
    half = p.x.shape[0] // 2
    parts = [
        F.batch_norm(
            part,
            p.running_mean[row],
            p.running_var[row],
            p.weight[row],
            p.bias[row],
            True,
            MOMENTUM,
            EPS,
        )
        for row, part in enumerate(p.x.split(half))
    ]
    return (torch.cat(parts) + p.residual).relu()


def calls(
    function: Callable[[Problem], Tensor], given: Sequence[Problem], backward: bool
) -> list[Any]:
    def forward(p: Problem) -> object:
        return function(p)

    def both(p: Problem) -> object:
        return torch.autograd.grad(function(p), p.leaves, p.dy)

    chosen = both if backward else forward
    return [lambda p=p: chosen(p) for p in given]


def cudnn_forward(p: Problem) -> Callable[[], object]:
    """cuDNN's BatchNorm + add + ReLU, one call per half."""
    import cudnn

    handle = cudnn.create_handle()
    half, channels, height, width = p.x.shape[0] // 2, *p.x.shape[1:]
    dim = [half, channels, height, width]
    stride = [channels * height * width, 1, width * channels, channels]
    per_channel = {"dim": [1, channels, 1, 1], "stride": [channels, 1, channels, channels]}
    graph = cudnn.pygraph(
        io_data_type=cudnn.data_type.BFLOAT16,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )
    kinds = cudnn.data_type
    x = graph.tensor(name="x", dim=dim, stride=stride, data_type=kinds.BFLOAT16)
    residual = graph.tensor(name="residual", dim=dim, stride=stride, data_type=kinds.BFLOAT16)
    scale, bias, mean, var = (
        graph.tensor(name=name, data_type=kinds.FLOAT, **per_channel)
        for name in ("scale", "bias", "mean", "var")
    )
    epsilon, momentum = (
        graph.tensor(
            name=name,
            dim=[1, 1, 1, 1],
            stride=[1, 1, 1, 1],
            data_type=kinds.FLOAT,
            is_pass_by_value=True,
        )
        for name in ("epsilon", "momentum")
    )
    normalised, saved_mean, saved_rstd, next_mean, next_var = graph.batchnorm(
        name="batchnorm",
        input=x,
        scale=scale,
        bias=bias,
        in_running_mean=mean,
        in_running_var=var,
        epsilon=epsilon,
        momentum=momentum,
    )
    y = graph.relu(name="relu", input=graph.add(name="add", a=normalised, b=residual))
    y.set_output(True).set_data_type(kinds.BFLOAT16)
    for statistic in (saved_mean, saved_rstd, next_mean, next_var):
        statistic.set_output(True).set_data_type(kinds.FLOAT)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)
    constants = {
        epsilon: torch.full((1, 1, 1, 1), EPS),
        momentum: torch.full((1, 1, 1, 1), MOMENTUM),
    }
    out = torch.empty_like(p.x, memory_format=torch.channels_last)
    packs = []
    for row in range(2):
        part = slice(row * half, (row + 1) * half)
        fresh = {
            statistic: torch.empty(1, channels, 1, 1, device="cuda")
            for statistic in (saved_mean, saved_rstd)
        }
        packs.append(
            {
                **constants,
                **fresh,
                x: p.x.detach()[part],
                residual: p.residual.detach()[part],
                scale: p.weight.detach()[row],
                bias: p.bias.detach()[row],
                mean: p.running_mean[row],
                var: p.running_var[row],
                next_mean: p.running_mean[row],
                next_var: p.running_var[row],
                y: out[part],
            }
        )

    def call() -> Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        for pack in packs:
            graph.execute(pack, workspace, handle=handle)
        return out

    return call


def check(contestants: dict[str, list[Any]]) -> None:
    """Every contestant agrees with PyTorch eager on the first inputs."""
    expected = as_list(contestants["PyTorch eager"][0]())
    for name, made in contestants.items():
        for got, value in zip(as_list(made[0]()), expected, strict=True):
            error = (got.float() - value.float()).abs().mean() / value.float().abs().mean()
            assert error < 0.02, f"{name} is off by {error:.1%}: its time would mean nothing"


def as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_batch_statistics(
    compare: Callable[..., None],
    benchmark: Any,
    shape: tuple[int, int, int, int],
    backward: bool,
) -> None:
    given = problems(shape)
    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True)
    contestants = {
        "split_batch_norm": calls(ours, given, backward),
        "PyTorch eager": calls(eager, given, backward),
        "torch.compile": calls(compiled, given, backward),
    }
    if backward:
        benchmark.extra_info["cuDNN fused"] = "not run: a contestant in the training forward only"
    else:
        if importlib.util.find_spec("cudnn"):
            import cudnn

            try:
                contestants["cuDNN fused"] = [cudnn_forward(p) for p in given]
            except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
                benchmark.extra_info["cuDNN fused"] = f"not run: {error}"
        else:
            benchmark.extra_info["cuDNN fused"] = "not run: nvidia-cudnn-frontend not installed"
    check(contestants)
    elements = given[0].x.numel()
    # Forward: x twice, residual, y and one bit for the mask. Backward: dy, x, mask, the residual's
    # gradient written and read again, x, dx.
    moved = elements * (4 * 2 + 1 / 8) + (elements * (6 * 2 + 1 / 8) if backward else 0)
    compare(contestants, moved, "split_batch_norm")


@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
def test_running_statistics(
    compare: Callable[..., None], benchmark: Any, shape: tuple[int, int, int, int]
) -> None:
    """The attack on running statistics: input and residual gradients only."""
    given = problems(shape)
    half = shape[0] // 2
    benchmark.extra_info["cuDNN fused"] = "not run: a contestant in the training forward only"

    def frozen(p: Problem) -> Tensor:
        return split_batch_norm(
            p.x,
            p.weight,
            p.bias,
            p.running_mean,
            p.running_var,
            (0, 2 * half),
            training=False,
            residual=p.residual,
            relu=True,
        )

    def frozen_eager(p: Problem) -> Tensor:
        normalised = F.batch_norm(
            p.x, p.running_mean[1], p.running_var[1], p.weight[1], p.bias[1], False
        )
        return (normalised + p.residual).relu()

    def gradients(function: Callable[[Problem], Tensor]) -> list[Any]:
        return [
            lambda p=p: torch.autograd.grad(function(p), [p.x, p.residual], p.dy) for p in given
        ]

    torch._dynamo.reset()
    contestants = {
        "split_batch_norm": gradients(frozen),
        "PyTorch eager": gradients(frozen_eager),
        "torch.compile": gradients(torch.compile(frozen_eager, fullgraph=True)),
    }
    check(contestants)
    # Forward: x, residual, y and the mask; backward: dy, mask, dx and the residual's gradient.
    moved = given[0].x.numel() * (6 * 2 + 2 / 8)
    compare(contestants, moved, "split_batch_norm")
