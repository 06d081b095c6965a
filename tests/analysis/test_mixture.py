"""Mixture distribution against moments of the activations themselves, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from arat_fast.analysis.mixture import NUMBERS, mixture_distance
from arat_fast.analysis.snapshot import mean_mixture
from arat_fast.models import create_model
from arat_fast.models.split_batch_norm import SplitBatchNorm2d, use_branch, use_statistics


def images(n: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, (x + 0.2 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


def network(norm: str) -> nn.Module:
    torch.manual_seed(1)
    model = create_model("resnet8", 10, 1, norm=norm).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (SplitBatchNorm2d, nn.BatchNorm2d)):
                for parameter in (module.weight, module.bias):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def gaussian_w2(a: Tensor, b: Tensor) -> float:
    """Mean over channels of the Wasserstein-2 distance of normals with these samples' moments."""
    mean = a.mean(dim=(0, 2, 3)) - b.mean(dim=(0, 2, 3))
    std = a.std(dim=(0, 2, 3), correction=0) - b.std(dim=(0, 2, 3), correction=0)
    return float((mean**2 + std**2).sqrt().mean())


@pytest.mark.parametrize("norm", ["split", "shared"])
def test_every_number_from_the_activations(norm: str) -> None:
    model, (x, x_adv) = network(norm), images()
    entering: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: entering.__setitem__(name, args[0])
        )
        for name, module in model.named_modules()
        if isinstance(module, (SplitBatchNorm2d, nn.BatchNorm2d))
    ]
    with use_branch(model, "both"), use_statistics(model, "batch"), torch.no_grad():
        model(torch.cat([x, x_adv]))
    for handle in handles:
        handle.remove()
    found = mixture_distance(model, x, x_adv)
    assert list(found) == list(entering)
    layers = dict(model.named_modules())
    for name, z in entering.items():
        clean, adv = z.chunk(2)
        with use_branch(model, "both"), use_statistics(model, "batch"), torch.no_grad():
            out_clean, out_adv = layers[name](z).chunk(2)
        dims = (0, 2, 3)
        centred = (z - z.mean(dim=dims, keepdim=True)) / z.std(dim=dims, correction=0, keepdim=True)
        gap = adv.mean(dim=dims) - clean.mean(dim=dims)
        spread = adv.std(dim=dims, correction=0) - clean.std(dim=dims, correction=0)
        wanted = {
            "mean_gap": float(gap.abs().mean()),
            "std_gap": float(spread.abs().mean()),
            "w2": gaussian_w2(clean, adv),
            "w2_relative": gaussian_w2(*centred.chunk(2)),
            "output_w2": gaussian_w2(out_clean, out_adv),
        }
        assert set(wanted) == set(NUMBERS)
        for key, value in wanted.items():
            assert math.isclose(found[name][key], value, rel_tol=1e-8, abs_tol=1e-10), (name, key)


def test_equal_images_have_no_distance_but_that_of_the_branches() -> None:
    x, _ = images()
    shared = mixture_distance(network("shared"), x, x)
    assert all(value < 1e-12 for layer in shared.values() for value in layer.values())
    split = mixture_distance(network("split"), x, x)
    first = next(iter(split))
    assert split[first]["w2"] < 1e-12
    assert split[first]["output_w2"] > 0.1


def test_nothing_moves() -> None:
    model, (x, x_adv) = network("split"), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    mixture_distance(model, x, x_adv)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_constant_channel_counts_as_zero_and_no_batch_norm_as_nothing() -> None:
    x = torch.full((4, 1, 2, 2), 0.5, dtype=torch.float64)
    (found,) = mixture_distance(nn.Sequential(nn.BatchNorm2d(1)).double(), x, x).values()
    assert all(value == 0 for value in found.values())
    assert mixture_distance(nn.Sequential(nn.Conv2d(1, 2, 1)).double(), x, x) == {}


def test_means() -> None:
    batches = [
        {"a": dict.fromkeys(NUMBERS, value), "b": dict.fromkeys(NUMBERS, 3.0)}
        for value in (0.0, 2.0)
    ]
    mean = mean_mixture(batches)
    assert mean["layers"]["a"] == dict.fromkeys(NUMBERS, 1.0)
    assert mean["mean"] == dict.fromkeys(NUMBERS, 2.0)
    assert mean["num_batches"] == 2
