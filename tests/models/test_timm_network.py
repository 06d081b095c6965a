"""A network without BatchNorm: what ARAT is then, and what is refused."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from networks import generator

from arat_fast.attacks import RandomStart
from arat_fast.config import Config, ModelConfig
from arat_fast.models import create_model
from arat_fast.models.layers import StemConv2d
from arat_fast.models.registry import model_spec
from arat_fast.objectives import ARAT

has_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="needs timm, an extra"
)


def test_there_is_nothing_to_split() -> None:
    config = Config("x", model=ModelConfig("convnext-t"))
    assert config.norm == "shared"
    with pytest.raises(ValueError, match="LayerNorm and no BatchNorm that could be split") as error:
        create_model("convnext-t", 5, norm="split")
    assert "\n" not in str(error.value)


def test_without_timm_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[timm\]'"):
        create_model("convnext-t", 5, norm="shared")


@pytest.mark.slow
@has_timm
def test_invariance_loss_and_predictor_train_it() -> None:
    torch.manual_seed(0)
    model = create_model("convnext-t", 5, norm="shared", mean=(0.5,) * 3, std=(0.2,) * 3)
    layers = model_spec("convnext-t").regularized_layers
    objective = ARAT(model, layers, (3, 64, 64))
    x = torch.rand(2, 3, 64, 64, generator=generator(1))
    output = objective(model, x, x + 0.01, torch.tensor([0, 1]), RandomStart())
    assert len(output.terms) == 2 + len(layers)
    output.loss.backward()
    used = [*model.parameters(), *objective.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in used)
    stems = [name for name, m in model.named_modules() if isinstance(m, StemConv2d)]
    assert stems == ["network.stem.0"]
