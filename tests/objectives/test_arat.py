"""ARAT's loss and gradients against a direct transcription on two ordinary networks, float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import SeenBatchNorm2d, TinyNet, generator, published_predictors, randomize, triples
from official import official_predictors_to_state_dict, predictors_to_official
from torch import Tensor, nn

from arat_fast.attacks import RandomStart
from arat_fast.models import convert_split_batch_norm, create_model
from arat_fast.objectives import ARAT
from arat_fast.objectives.predictor import Predictors
from arat_fast.saved import export_plain

# Two widths, out of order.
LAYERS = ("layer3.0.bn1", "layer2.0.bn2", "layer3.0.bn2")
SHAPE = (3, 8, 8)
START = RandomStart()


def network(norm: str = "split") -> nn.Module:
    torch.manual_seed(3)
    model = create_model("resnet8", 4, norm=norm)  # type: ignore[arg-type]  # a norm
    return randomize(model).double()


def objective_for(model: nn.Module, **options: Any) -> ARAT:
    torch.manual_seed(4)
    objective = ARAT(model, LAYERS, SHAPE, gamma=3.0, **options).double()
    objective.start_epoch(0.3)
    if objective.predictors is not None:
        source = generator(5)
        for name, tensor in objective.predictors.named_parameters():
            if "bn_" in name:
                noise = torch.randn(tensor.shape, generator=source, dtype=torch.float64)
                tensor.data.add_(0.2 * noise)
    return objective


def run_with_features(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and features of a network with ordinary BatchNorm."""
    logits = SeenBatchNorm2d.put(model, LAYERS)(x)
    return logits, [SeenBatchNorm2d.feature(model, path) for path in LAYERS]


def distance(p: Tensor, z: Tensor) -> Tensor:
    cosine = (p * z).sum(dim=1) / (p.norm(dim=1) * z.norm(dim=1))
    return (1 - cosine).mean()


def transcription(
    logits: tuple[Tensor, Tensor],
    features: tuple[list[Tensor], list[Tensor]],
    y: Tensor,
    predictors: list[nn.Sequential],
    direction: str,
    stop_gradient: bool,
) -> dict[str, Tensor]:
    terms = {
        "ce_adv": 0.3 * F.cross_entropy(logits[1], y),
        "ce_clean": 0.7 * F.cross_entropy(logits[0], y),
    }

    def towards(source: list[Tensor], target: list[Tensor]) -> list[Tensor]:
        result = []
        for index, (p, z) in enumerate(zip(source, target, strict=True)):
            if predictors:
                p = predictors[index](p)
            result.append(distance(p, z.detach() if stop_gradient else z))
        return result

    clean, adv = features
    if direction == "adv_to_clean":
        values = towards(adv, clean)
    elif direction == "clean_to_adv":
        values = towards(clean, adv)
    elif direction == "both":
        first, second = towards(adv, clean), towards(clean, adv)
        values = [0.5 * a + 0.5 * b for a, b in zip(first, second, strict=True)]
    else:
        values = [distance(a, c) for a, c in zip(adv, clean, strict=True)]
    for layer, value in zip(LAYERS, values, strict=True):
        terms[f"invariance/{layer}"] = 3.0 / 3 * value
    return terms


COMBINATIONS = [
    (direction, stop_gradient, predictor)
    for direction in ("adv_to_clean", "clean_to_adv", "both")
    for stop_gradient in (True, False)
    for predictor in (True, False)
] + [("symmetric", False, False)]


@pytest.mark.parametrize(("direction", "stop_gradient", "predictor"), COMBINATIONS)
def test_every_switch_equals_the_transcription(
    direction: str, stop_gradient: bool, predictor: bool
) -> None:
    model = network()
    objective = objective_for(
        model, direction=direction, stop_gradient=stop_gradient, predictor=predictor
    )
    x, x_adv, y = triples(5)
    clean, adv = export_plain(model, "clean"), export_plain(model, "adv")
    predictors = published_predictors(objective.predictors) if objective.predictors else []
    logits_clean, z_clean = run_with_features(clean, x)
    logits_adv, z_adv = run_with_features(adv, x_adv)
    terms = transcription(
        (logits_clean, logits_adv), (z_clean, z_adv), y, predictors, direction, stop_gradient
    )
    torch.stack(list(terms.values())).sum().backward()

    output = objective(model, x, x_adv, y, START)
    output.loss.backward()

    assert output.terms.keys() == terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(output.terms[name], term, rtol=1e-10, atol=1e-12, msg=name)
    torch.testing.assert_close(output.loss, torch.stack(list(terms.values())).sum())
    torch.testing.assert_close(output.logits_clean, logits_clean)
    torch.testing.assert_close(output.logits_adv, logits_adv)
    grads = [{n: p.grad for n, p in net.named_parameters()} for net in (clean, adv)]
    for name, parameter in model.named_parameters():
        pair = [net[name] for net in grads]
        assert parameter.grad is not None and pair[0] is not None and pair[1] is not None
        branched = ".bn" in name or name.startswith("bn") or "shortcut_bn" in name
        whole = torch.stack([pair[0], pair[1]]) if branched else pair[0] + pair[1]
        torch.testing.assert_close(parameter.grad, whole, rtol=1e-10, atol=1e-13, msg=name)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            pair = [net.state_dict()[name] for net in (clean, adv)]
            torch.testing.assert_close(tensor, torch.stack(pair), msg=name)
    if objective.predictors is not None:
        with torch.no_grad():
            gradients = copy.deepcopy(objective.predictors)
            for target, source in zip(
                gradients.parameters(), objective.predictors.parameters(), strict=True
            ):
                assert source.grad is not None
                target.copy_(source.grad)
        separate = predictors_to_official(gradients)
        for state, module in zip(separate, predictors, strict=True):
            for key, weight in module.named_parameters():
                torch.testing.assert_close(
                    state[f"predictor_x.{key}"], weight.grad, rtol=1e-10, atol=1e-13
                )
        assert len(objective.predictors.stacks) == 2
        assert_predictors_are(objective.predictors, predictors, z_adv)


def assert_predictors_are(
    ours: Predictors, separate: list[nn.Sequential], features: list[Tensor]
) -> None:
    """State, running statistics included, and what they compute in eval mode."""
    official = [
        {f"predictor_x.{k}": v for k, v in module.state_dict().items()} for module in separate
    ]
    state = official_predictors_to_state_dict(official)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-12, atol=1e-12, msg=name)
    with torch.no_grad():
        outputs = ours.eval()(features)
        for output, module, z in zip(outputs, separate, features, strict=True):
            torch.testing.assert_close(output, module.eval()(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("predictor", [True, False])
def test_shared_batch_norm_normalises_the_mixture_or_each_half(
    predictor: bool, separate: bool
) -> None:
    model = network("shared")
    objective = objective_for(model, predictor=predictor, separate_passes=separate)
    plain = copy.deepcopy(model)
    x, x_adv, y = triples(5)
    if separate:
        halves = [run_with_features(plain, images) for images in (x, x_adv)]
        logits = torch.cat([half[0] for half in halves])
        features = [torch.cat(pair) for pair in zip(*(half[1] for half in halves), strict=True)]
    else:
        logits, features = run_with_features(plain, torch.cat([x, x_adv]))
    predictors = published_predictors(objective.predictors) if objective.predictors else []
    terms = transcription(
        (logits[:5], logits[5:]),
        ([z[:5] for z in features], [z[5:] for z in features]),
        y,
        predictors,
        "adv_to_clean",
        True,
    )
    torch.stack(list(terms.values())).sum().backward()
    output = objective(model, x, x_adv, y, START)
    output.loss.backward()
    for name, term in terms.items():
        torch.testing.assert_close(output.terms[name], term, rtol=1e-10, atol=1e-12, msg=name)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-13, msg=name)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_separate_passes_change_nothing_with_split_batch_norm() -> None:
    x, x_adv, y = triples(5)
    results = []
    for separate in (False, True):
        model = network()
        output = objective_for(model, separate_passes=separate)(model, x, x_adv, y, START)
        output.loss.backward()
        grads = {f"grad {n}": p.grad for n, p in model.named_parameters()}
        results.append({**output.terms, **model.state_dict(), **grads})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_auto_balance() -> None:
    model = network()
    x, x_adv, y = triples(5)
    objective = objective_for(model)
    output = objective(model, x, x_adv, y, START)
    for accuracy in (0.0, 0.37, 1.0):
        objective.start_epoch(accuracy)
        assert float(objective.w_adv) == accuracy and float(objective.w_clean) == 1 - accuracy
        changed = objective(model, x, x_adv, y, START)
        for name, ratio in (("ce_adv", accuracy / 0.3), ("ce_clean", (1 - accuracy) / 0.7)):
            got, before = (float(o.terms[name].detach()) for o in (changed, output))
            assert got == pytest.approx(ratio * before, rel=1e-12)
    with pytest.raises(ValueError, match=r"\[0, 1\], got 95"):
        objective.start_epoch(95.0)
    fixed = ARAT(model, LAYERS, SHAPE, balance="fixed", w_adv=2.0, w_clean=0.5)
    fixed.start_epoch(0.9)
    assert (float(fixed.w_adv), float(fixed.w_clean)) == (2.0, 0.5)


def test_layers_of_any_network_by_path() -> None:
    torch.manual_seed(0)
    model = convert_split_batch_norm(TinyNet())
    objective = ARAT(model, ("conv1", "bn2", "head"), SHAPE)
    assert objective.predictors is not None
    assert [len(g) for g in objective.predictors.groups] == [1, 1, 1]
    x, x_adv, y = triples(5)
    output = objective(model, x.float(), x_adv.float(), y, START)
    output.loss.backward()
    names = ["ce_adv", "ce_clean", "invariance/conv1", "invariance/bn2", "invariance/head"]
    assert list(output.terms) == names
    assert all(p.grad is not None for p in [*model.parameters(), *objective.parameters()])


def test_making_an_objective_changes_nothing_in_the_model() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    ARAT(model, LAYERS, SHAPE)
    assert all(m.training for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (("layer9.bn1",), {}, "no layer 'layer9.bn1'"),
        ((), {}, "at least one regularised layer"),
        (LAYERS, {"gamma": -1.0}, "must be >= 0, got -1.0"),
        (LAYERS, {"gamma": float("nan")}, "must be >= 0, got nan"),
        (LAYERS, {"w_adv": -0.5}, "must be >= 0"),
        (LAYERS, {"direction": "symmetric"}, "neither stop-gradient nor predictor"),
    ],
)
def test_bad_options(layers: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ARAT(network(), layers, SHAPE, **options)
    with pytest.raises(ValueError, match="got width 3"):
        Predictors([3])
