"""Weights that are rounded together, beside autocast, which rounds each by itself."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from arat_fast.distributed import gradients
from arat_fast.models import create_model
from arat_fast.models.folding import FoldedNetwork
from arat_fast.models.split_batch_norm import use_statistics
from arat_fast.objectives.predictor import PredictorStack
from arat_fast.training.rounding import rounded_weights, whole_weights


class Net(nn.Module):
    """A convolution that is used twice under two names, one that is not trained, a linear layer
    that is never used, predictors."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.two = self.one
        self.frozen = nn.Conv2d(3, 8, 1).requires_grad_(False)
        self.unused = nn.Linear(8, 8)
        self.linear = nn.Linear(8, 8)
        self.stack = PredictorStack(1, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(self.frozen(self.two(self.one(x)).relu()).mean((2, 3)))
        y: Tensor = self.stack(z[None])
        return y


def test_the_bits_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and their layout, in one piece and in several."""
    torch.manual_seed(0)
    net = Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    x = torch.randn(4, 3, 6, 6).requires_grad_()
    parameters = dict(net.named_parameters())
    found = []
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 1)
    for by_bucket in (None, False, True):
        net.zero_grad()
        rounded = (
            nullcontext()
            if by_bucket is None
            else rounded_weights([net], torch.bfloat16, by_bucket=by_bucket)
        )
        with torch.autocast("cpu", torch.bfloat16), rounded:
            assert (net.one.weight.dtype == torch.bfloat16) is (by_bucket is not None)
            assert dict(net.named_parameters()) == parameters
            out = net(x)
        assert net.one.weight is parameters["one.weight"]
        (dx,) = torch.autograd.grad(out.float().square().sum(), x, retain_graph=True)
        out.float().square().sum().backward()
        grads = {name: p.grad for name, p in parameters.items()}
        assert grads["unused.weight"] is None and grads["frozen.weight"] is None
        found.append({"out": out, "dx": dx, **{n: g for n, g in grads.items() if g is not None}})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in other.items():
            assert torch.equal(value, found[0][name]) and value.dtype == found[0][name].dtype
            assert value.stride() == found[0][name].stride(), name


def test_a_network_is_folded_from_its_parameters() -> None:
    """Not from their rounded copies, which its comparison in float32 would not bear."""
    torch.manual_seed(0)
    model = create_model("resnet8", 4).eval()
    x = torch.rand(2, 3, 8, 8)
    found = []
    for modules in ([], [model]):
        with torch.autocast("cpu", torch.bfloat16), rounded_weights(modules, torch.bfloat16):
            with whole_weights(model):
                folded = FoldedNetwork(model, x)
            folded.refresh()
            with use_statistics(model, "running"):
                found.append(folded(x))
    assert torch.equal(*found)
