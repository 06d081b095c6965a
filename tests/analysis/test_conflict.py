"""Gradient conflict against a transcription with one backward pass per loss, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_fast.analysis.conflict import gradient_conflict
from arat_fast.analysis.snapshot import mean_conflict
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
from arat_fast.report import style
from arat_fast.report.analysis_plots import conflict_between, conflict_by_layer, conflict_over_time
from arat_fast.report.analysis_words import conflict_words
from arat_fast.report.run import TrainingAnalysis
from arat_fast.report.style import Plot

LAYERS = ("layer3.0.bn1", "layer3.0.bn2")
INVARIANCE = {f"invariance/{layer}" for layer in LAYERS}
START = RandomStart(torch.Generator().manual_seed(1))


def batch(n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return x, x_adv, torch.randint(10, (n,), generator=generator)


def network(norm: str = "shared") -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet8", 10, 1, norm=norm).double().train()


def arat(model: nn.Module, **switches: object) -> Objective:
    objective = ARAT(model, LAYERS, (1, 8, 8), balance="fixed", w_adv=0.7, **switches)
    return objective.double().train()


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


def test_layers_add_up_and_those_without_gradient_are_none() -> None:
    model = network("split")
    objective = arat(model)
    record = gradient_conflict(model, objective(model, *batch(), START), ARAT.ties)
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


@pytest.mark.parametrize(
    ("a", "b", "share", "cosine"),
    [
        ([1.0, -2.0, 3.0, 0.0], [2.0, 1.0, -1.0, 5.0], 0.5, -3 / math.sqrt(14 * 31)),
        # The float32 product of these vanishes.
        ([1e-30] * 4, [-1e-30] * 4, 1.0, -1.0),
    ],
)
def test_known_signs(a: list[float], b: list[float], share: float, cosine: float) -> None:
    model = nn.Linear(4, 1, bias=False)
    terms = {"ce_adv": model(torch.tensor([a])).sum(), "kl": model(torch.tensor([b])).sum()}
    output = ObjectiveOutput(sum(terms.values()), terms, None, None)
    record = gradient_conflict(nn.Sequential(model), output, ("invariance", "kl"))
    assert record is not None
    assert record["pairs"] == {"classification": {"share": share, "cosine": pytest.approx(cosine)}}
    norms = {"classification": math.hypot(*a), "invariance": math.hypot(*b)}
    assert record["norms"] == pytest.approx(norms)


@pytest.mark.parametrize(
    ("make", "norm", "classification", "ties"),
    [
        (arat, "split", {"ce_adv", "ce_clean"}, INVARIANCE),
        (
            lambda model: arat(model, stop_gradient=False),
            "split",
            {"ce_adv", "ce_clean"},
            INVARIANCE,
        ),
        (lambda model: TRADES(), "shared", {"ce_clean"}, {"kl"}),
        (lambda model: MART(), "shared", {"ce_adv", "margin"}, {"kl"}),
        (lambda model: LBGAT(None), "split", {"ce_guide"}, {"mse"}),
        (lambda model: ARREST(model, PGD(eps=0.1)), "shared", {"ce_adv"}, {"distillation"}),
    ],
)
def test_totals_equal_plain_backward_passes(
    make: Callable[[nn.Module], Objective], norm: str, classification: set[str], ties: set[str]
) -> None:
    model = network(norm)
    objective = make(model).double().train()
    terms = (output := objective(model, *batch(), START)).terms
    assert set(terms) == classification | ties
    record = gradient_conflict(model, output, objective.ties)
    assert record is not None
    pairs = {"classification": classification}
    if len(classification) > 1:
        pairs |= {name: {name} for name in classification}
    assert record["pairs"].keys() == pairs.keys()
    tie = torch.stack([terms[name] for name in ties]).sum()
    for pair, names in pairs.items():
        share, cosine = expected(model, torch.stack([terms[n] for n in names]).sum(), tie)
        assert record["pairs"][pair]["share"] == share > 0
        assert math.isclose(record["pairs"][pair]["cosine"], cosine, rel_tol=1e-9)


@pytest.mark.parametrize(
    "objective", [AdversarialTraining(), LBGAT(network().double()), LBGAT(network().double(), 6.0)]
)
def test_without_a_tie_or_labels_there_is_no_conflict(objective: Objective) -> None:
    model = network()
    output = objective(model, *batch(), START)
    assert gradient_conflict(model, output, objective.ties) is None


def test_weight_zero_is_none() -> None:
    model = network("split")
    objective = arat(model)
    objective.w_clean.fill_(0.0)
    record = gradient_conflict(model, objective(model, *batch(), START), ARAT.ties)
    assert record is not None
    assert record["pairs"]["ce_clean"] == {"share": None, "cosine": None}
    assert record["pairs"]["ce_adv"] == record["pairs"]["classification"]


def test_every_figure_has_its_own_line_for_random_signs() -> None:
    """Half of what both losses reach: of a method's weights, and of each layer that is shown."""
    model = network("split")
    found = {}
    for name, objective in (("arat", arat(model)), ("trades", TRADES().double())):
        record = gradient_conflict(model, objective(model, *batch(), START), objective.ties)
        assert record is not None
        found[name] = mean_conflict([record])
    level = found["arat"]["unrelated"]
    assert level < found["trades"]["unrelated"] == 0.5
    assert f"{100 * level:.1f}" in conflict_words(found["arat"])[0]
    runs = {name: [[TrainingAnalysis(0.0, record, None)]] for name, record in found.items()}
    for groups in (runs, dict(reversed(runs.items()))):
        plot = conflict_between(groups)
        assert plot is not None and grey_lines(plot, 0, horizontal=True) == {level, 0.5}
    along = conflict_over_time(runs["arat"][0])
    assert along is not None and grey_lines(along, 0, horizontal=True) == {level}
    by_layer = conflict_by_layer(found["arat"])
    assert by_layer is not None and grey_lines(by_layer, 0, horizontal=False) == {0.5}
    assert f"{100 * level:.1f}" in by_layer.caption


def grey_lines(plot: Plot, panel: int, horizontal: bool) -> set[float]:
    """Where a panel has grey lines."""
    lines = [e for e in plot.figure.axes[panel].get_lines() if e.get_color() == style.GREY]
    return {float((e.get_ydata() if horizontal else e.get_xdata())[0]) for e in lines}


def test_means() -> None:
    def record(share: float | None) -> dict[str, Any]:
        pair = {"share": share, "cosine": share}
        return {
            "pairs": {"classification": pair},
            "layers": {"conv": {**pair, "entries": 5}},
            "norms": {"classification": 1.0, "invariance": 3.0},
            "entries": 5,
            "unrelated": 0.5,
        }

    mean = mean_conflict([record(0.2), record(None), record(0.4)])
    approx = {"share": pytest.approx(0.3), "cosine": pytest.approx(0.3)}
    std = dict.fromkeys(("share_std", "cosine_std"), pytest.approx(math.sqrt(0.02)))
    assert mean["pairs"]["classification"] == {**approx, **std}
    assert mean["layers"]["conv"] == {"entries": 5, **approx}
    assert mean["num_batches"] == 3
    assert set(mean_conflict([record(None)])["pairs"]["classification"].values()) == {None}
