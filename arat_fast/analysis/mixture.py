"""Mixture distribution: how far the batch statistics of clean and adversarial images lie apart."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from arat_fast.models.split_batch_norm import (
    ADV,
    CLEAN,
    SplitBatchNorm2d,
    use_branch,
    use_statistics,
)

NUMBERS = ("mean_gap", "std_gap", "w2", "w2_relative", "output_w2")
"""What is recorded of each BatchNorm layer; see :func:`mixture_distance`."""


@torch.no_grad()
def mixture_distance(model: nn.Module, x: Tensor, x_adv: Tensor) -> dict[str, dict[str, float]]:
    """Distances between clean and adversarial batch statistics at every BatchNorm of a network.

    ``[x; x_adv]`` runs in one pass on batch statistics, as in a step of ARAT without
    ``separate_passes``: a split BatchNorm normalises each half with its own statistics, an ordinary
    one both with those of the mixture.
    For each channel, m and s are mean and standard deviation over the batch and all positions
    (divided by their number, not by one less) of the layer's *input*, for each half. With M and S
    those of the two halves together:

    - ``mean_gap``: mean over channels of ``|m_adv - m_clean|``;
    - ``std_gap``: mean over channels of ``|s_adv - s_clean|``;
    - ``w2``: mean over channels of ``sqrt((m_adv - m_clean)^2 + (s_adv - s_clean)^2)``, the
      Wasserstein-2 distance of two normal distributions with these moments;
    - ``w2_relative``: the same of ``(input - M) / S``, free of scale, so that layers and networks
      can be compared; a channel that is constant over both halves counts as 0;
    - ``output_w2``: ``w2`` of the layer's *output*, after weight and bias and before any residual
      or ReLU: the distance that the next layer sees.

    Args:
        model: any network, in any mode; its statistics stay as they are.
        x, x_adv: images (N, C, H, W) and their adversarial versions.

    Returns:
        The numbers by module path, in the order of the forward pass.

    Source: arXiv 2402.14648: channel means and standard deviations, layer by layer; the
    paper shows them, the distances are ours.
    """
    inputs: dict[str, Tensor] = {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (SplitBatchNorm2d, _BatchNorm))
    }
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(
                layer.register_forward_pre_hook(
                    lambda _, args, name=name: inputs.__setitem__(name, _moments(args[0]))
                )
            )
        with use_branch(model, "both"), use_statistics(model, "batch"):
            model(torch.cat([x, x_adv]))
    return {name: _distances(layers[name], moments) for name, moments in inputs.items()}


def _moments(x: Tensor) -> Tensor:
    """Mean and variance of each half and of both: (3, 2, C) in float64."""
    dims = (0, *range(2, x.ndim))
    parts = [*x.double().chunk(2), x.double()]
    return torch.stack(
        [torch.stack([p.mean(dim=dims), p.var(dim=dims, unbiased=False)]) for p in parts]
    )


def _distances(layer: SplitBatchNorm2d | _BatchNorm, moments: Tensor) -> dict[str, float]:
    mean, var = moments.unbind(dim=1)
    std = var.sqrt()
    split = isinstance(layer, SplitBatchNorm2d)
    out_mean, out_std = torch.empty_like(mean[:2]), torch.empty_like(std[:2])
    for half in (CLEAN, ADV):
        by = half if split else 2  # What it is normalised with: its own moments or the mixture's.
        weight, bias = torch.tensor(1.0), torch.tensor(0.0)
        if layer.weight is not None and layer.bias is not None:
            rows = layer.weight, layer.bias
            weight, bias = ((row[half] if split else row).double() for row in rows)
        scale = (var[by] + layer.eps).rsqrt()
        out_mean[half] = (mean[half] - mean[by]) * scale * weight + bias
        out_std[half] = (std[half] * scale * weight).abs()
    gaps = mean[ADV] - mean[CLEAN], std[ADV] - std[CLEAN]
    w2 = torch.hypot(*gaps)
    relative = torch.where(std[2] > 0, w2 / std[2], 0.0)
    output_w2 = torch.hypot(out_mean[ADV] - out_mean[CLEAN], out_std[ADV] - out_std[CLEAN])
    values = (gaps[0].abs(), gaps[1].abs(), w2, relative, output_w2)
    return {name: float(value.mean()) for name, value in zip(NUMBERS, values, strict=True)}
