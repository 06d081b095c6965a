"""Gradient conflict against a transcription with one backward pass per loss, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.analysis.conflict import gradient_conflict, mean_conflict
from arat_fast.attacks import PGD, RandomStart
from arat_fast.models import create_model
from arat_fast.objectives import (
    ARAT,
    ARREST,
    LBGAT,
    MART,
    TRADES,
    AdversarialTraining,
    Objective,
    ObjectiveOutput,
)

LAYERS = ("layer3.0.bn1", "layer3.0.bn2")
START = RandomStart()
TIES = ("invariance", "kl")


def batch(n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return x, x_adv, torch.randint(10, (n,), generator=generator)


def arat(**switches: object) -> tuple[nn.Module, ARAT]:
    torch.manual_seed(0)
    model = create_model("resnet8", 10, 1).double().train()
    objective = ARAT(model, LAYERS, (1, 8, 8), balance="fixed", w_adv=0.7, **switches)
    return model, objective.double().train()


def expected(model: nn.Module, classification: Tensor, invariance: Tensor) -> tuple[float, float]:
    """Share and cosine over all convolution and linear weights, by plain backward passes."""
    gradients = []
    for loss in (classification, invariance):
        model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        parts = [
            torch.zeros_like(m.weight) if m.weight.grad is None else m.weight.grad.clone()
            for m in model.modules()
            if isinstance(m, (nn.Conv2d, nn.Linear))
        ]
        gradients.append(torch.cat([part.flatten() for part in parts]))
    a, b = gradients
    return float((a * b < 0).double().mean()), float(F.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_total_equals_plain_backward_passes(stop_gradient: bool) -> None:
    model, objective = arat(stop_gradient=stop_gradient)
    x, x_adv, y = batch()
    output = objective(model, x, x_adv, y, START)
    record = gradient_conflict(model, output, ARAT.ties)
    assert record is not None
    invariance = output.terms[f"invariance/{LAYERS[0]}"] + output.terms[f"invariance/{LAYERS[1]}"]
    for pair, loss in {
        "classification": output.terms["ce_adv"] + output.terms["ce_clean"],
        "ce_adv": output.terms["ce_adv"],
        "ce_clean": output.terms["ce_clean"],
    }.items():
        share, cosine = expected(model, loss, invariance)
        assert record["pairs"][pair]["share"] == share
        assert math.isclose(record["pairs"][pair]["cosine"], cosine, rel_tol=1e-9)


def test_layers_add_up_and_those_without_gradient_are_none() -> None:
    model, objective = arat()
    x, x_adv, y = batch()
    record = gradient_conflict(model, objective(model, x, x_adv, y, START), ARAT.ties)
    assert record is not None
    layers = record["layers"]
    # The classifier and the shortcut that is added after the last regularised layer.
    none = {path for path, layer in layers.items() if layer["share"] is None}
    assert none == {"linear", "layer3.0.shortcut"}
    assert sum(layer["entries"] for layer in layers.values()) == record["entries"]
    opposite = sum(
        layer["share"] * layer["entries"] for p, layer in layers.items() if p not in none
    )
    assert math.isclose(opposite / record["entries"], record["pairs"]["classification"]["share"])
    with_both = sum(layer["entries"] for path, layer in layers.items() if path not in none)
    assert record["unrelated"] == 0.5 * with_both / record["entries"]


class TwoLosses(nn.Module):
    """A linear map whose two losses have known gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def test_known_signs() -> None:
    model = TwoLosses().double()
    a = torch.tensor([[1.0, -2.0, 3.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[2.0, 1.0, -1.0, 5.0]], dtype=torch.float64)
    terms = {"ce_adv": model(a).sum(), "invariance/layer": model(b).sum()}
    record = gradient_conflict(model, ObjectiveOutput(sum(terms.values()), terms, None, None), TIES)
    assert record is not None
    assert record["pairs"] == {
        "classification": {"share": 0.5, "cosine": pytest.approx(-3 / math.sqrt(14 * 31))}
    }
    assert record["norms"] == {
        "classification": pytest.approx(math.sqrt(14)),
        "invariance": pytest.approx(math.sqrt(31)),
    }


def test_tiny_gradients_conflict_too() -> None:
    model = TwoLosses()
    a = torch.tensor([[1e-30, 1e-30, 1e-30, 1e-30]])
    terms = {"ce_adv": model(a).sum(), "kl": -model(a).sum()}
    record = gradient_conflict(model, ObjectiveOutput(sum(terms.values()), terms, None, None), TIES)
    assert record is not None
    assert record["pairs"]["classification"]["share"] == 1.0
    assert record["pairs"]["classification"]["cosine"] == pytest.approx(-1)


def network(norm: str = "shared") -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet8", 10, 1, norm=norm).double().train()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "norm", "classification", "tie"),
    [
        (lambda model: TRADES(), "shared", {"ce_clean"}, "kl"),
        (lambda model: MART(), "shared", {"ce_adv", "margin"}, "kl"),
        (lambda model: LBGAT(None), "split", {"ce_guide"}, "mse"),
        (lambda model: ARREST(model, PGD(eps=0.1)), "shared", {"ce_adv"}, "distillation"),
    ],
)
def test_what_ties_is_set_against_what_classifies(
    make: Callable[[nn.Module], Objective], norm: str, classification: set[str], tie: str
) -> None:
    model = network(norm)
    objective = make(model).double().train()
    output = objective(model, *batch(), RandomStart(torch.Generator().manual_seed(1)))
    assert set(output.terms) == {*classification, tie}
    record = gradient_conflict(model, output, objective.ties)
    assert record is not None
    loss = torch.stack([output.terms[name] for name in classification]).sum()
    share, cosine = expected(model, loss, output.terms[tie])
    assert record["pairs"]["classification"]["share"] == share > 0
    assert math.isclose(record["pairs"]["classification"]["cosine"], cosine, rel_tol=1e-9)


@pytest.mark.parametrize(
    "objective", [AdversarialTraining(), LBGAT(network().double()), LBGAT(network().double(), 6.0)]
)
def test_without_a_tie_or_labels_there_is_no_conflict(objective: Objective) -> None:
    model = network()
    output = objective(model, *batch(), START)
    assert gradient_conflict(model, output, objective.ties) is None


def test_weight_zero_is_none() -> None:
    model, objective = arat()
    objective.w_clean.fill_(0.0)
    x, x_adv, y = batch()
    record = gradient_conflict(model, objective(model, x, x_adv, y, START), ARAT.ties)
    assert record is not None
    assert record["pairs"]["ce_clean"] == {"share": None, "cosine": None}
    assert record["pairs"]["ce_adv"] == record["pairs"]["classification"]


def test_means() -> None:
    def record(share: float | None) -> dict[str, object]:
        pair = {"share": share, "cosine": share}
        return {
            "pairs": {"classification": pair},
            "layers": {"conv": {**pair, "entries": 5}},
            "norms": {"classification": 1.0, "invariance": 3.0},
            "entries": 5,
            "unrelated": 0.5,
        }

    mean = mean_conflict([record(0.2), record(None), record(0.4)])
    pair = mean["pairs"]["classification"]
    assert pair["share"] == pytest.approx(0.3)
    assert pair["share_std"] == pytest.approx(math.sqrt(0.02))
    assert mean["layers"]["conv"] == {
        "entries": 5,
        "share": pytest.approx(0.3),
        "cosine": pytest.approx(0.3),
    }
    assert mean["num_batches"] == 3
    alone = mean_conflict([record(None)])
    assert alone["pairs"]["classification"] == dict.fromkeys(
        ("share", "share_std", "cosine", "cosine_std")
    )
