"""Inputs of the split BatchNorm tests and one run, forward and backward, of any implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from kernels.support import generator
from torch import Tensor

from arat_kernels.implementation import Impl
from arat_kernels.split_batch_norm import split_batch_norm


@dataclass(frozen=True)
class Case:
    """One call: shapes and options."""

    sizes: tuple[int, int] = (3, 2)
    channels: int = 5
    height: int = 4
    width: int = 3
    dtype: torch.dtype = torch.float32
    training: bool = True
    update: bool = True
    residual: bool = True
    relu: bool = True
    pooled: bool = True
    affine: bool = True
    channels_last: bool = True
    momentum: float = 0.25
    eps: float = 1e-3
    seed: int = 0


@dataclass
class Inputs:
    """Tensors of a call; ``upstream`` are the gradients of y and of the pooled feature."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    upstream: tuple[Tensor, Tensor]

    def widened(self) -> Inputs:
        """The same numbers in float64."""
        fields: dict[str, Any] = {
            name: None if value is None else value.detach().double()
            for name, value in vars(self).items()
            if name != "upstream"
        }
        dy, dpooled = self.upstream
        return Inputs(**fields, upstream=(dy.double(), dpooled.double()))

    def to(self, device: torch.device | str) -> Inputs:
        """Copies on another device."""
        fields: dict[str, Any] = {
            name: None if value is None else value.detach().to(device)
            for name, value in vars(self).items()
            if name != "upstream"
        }
        dy, dpooled = self.upstream
        return Inputs(**fields, upstream=(dy.to(device), dpooled.to(device)))


def make(case: Case) -> Inputs:
    """Random inputs of a case, on the CPU; the branches differ in mean and spread."""
    numbers = generator(case.seed)
    n, c = sum(case.sizes), case.channels
    shape = (n, c, case.height, case.width)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=numbers, dtype=torch.float64)

    x = draw(*shape) * 1.5 + draw(1, c, 1, 1)
    x[case.sizes[0] :] = x[case.sizes[0] :] * 0.5 - 1.0
    statistics = torch.float64 if case.dtype == torch.float64 else torch.float32
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    tensors = {
        "x": x.to(case.dtype).contiguous(memory_format=layout),
        "residual": draw(*shape).to(case.dtype).contiguous(memory_format=layout),
        "weight": draw(2, c).to(statistics),
        "bias": draw(2, c).to(statistics),
    }
    if not case.residual:
        tensors["residual"] = None
    if not case.affine:
        tensors["weight"] = tensors["bias"] = None
    return Inputs(
        **tensors,
        running_mean=draw(2, c).to(statistics),
        running_var=(draw(2, c).abs() + 0.5).to(statistics),
        upstream=(draw(*shape).to(case.dtype), draw(n, c).to(statistics)),
    )


def call(case: Case, inputs: Inputs, impl: Impl | None) -> tuple[Tensor, Tensor | None]:
    """y and the pooled feature."""
    result = split_batch_norm(
        inputs.x,
        inputs.weight,
        inputs.bias,
        inputs.running_mean,
        inputs.running_var,
        case.sizes,
        training=case.training,
        update_running_stats=case.update,
        momentum=case.momentum,
        eps=case.eps,
        residual=inputs.residual,
        relu=case.relu,
        return_pooled=case.pooled,
        impl=impl,
    )
    return result if isinstance(result, tuple) else (result, None)


def run(case: Case, inputs: Inputs, impl: Impl | None) -> dict[str, Tensor]:
    """Every result and every gradient of a call; ``inputs`` are not changed."""
    copies = {
        name: None if value is None else value.detach().clone()
        for name, value in vars(inputs).items()
        if name != "upstream"
    }
    leaves = {
        name: value.requires_grad_()
        for name, value in copies.items()
        if value is not None and not name.startswith("running")
    }
    y, pooled = call(case, Inputs(**copies, upstream=inputs.upstream), impl)
    results = {"y": y.detach()}
    outputs, upstream = [y], [inputs.upstream[0]]
    if pooled is not None:
        results["pooled"] = pooled.detach()
        outputs.append(pooled)
        upstream.append(inputs.upstream[1])
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    for name, gradient in zip(leaves, gradients, strict=True):
        results[f"gradient of {name}"] = gradient
    for name in ("running_mean", "running_var"):
        results[name] = copies[name]
    return results


def truth(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    return run(replace(case, dtype=torch.float64), inputs.widened(), "reference")
