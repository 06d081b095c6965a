"""What a loop of one's own may give the step, and what it is told that it forgot."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import TinyNet, generator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from arat_fast.attacks import PGD
from arat_fast.evaluation import ThreatModel
from arat_fast.models import convert_split_batch_norm
from arat_fast.objectives import ARAT, AdversarialTraining, Objective
from arat_fast.training.step import TrainStep


def batch(samples: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(samples, 3, 8, 8, generator=generator(samples))
    return x, torch.arange(samples) % 4


def make_step(seed: int = 0, model: nn.Module | None = None, **options: Any) -> TrainStep:
    torch.manual_seed(seed)
    model = model or convert_split_batch_norm(TinyNet())
    objective = ARAT(model, ["bn1"], (3, 8, 8))
    objective.start_epoch(0.5)
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.1)
    options = {"generator": generator(1), **options}
    return TrainStep(model, objective, PGD(num_steps=1), optimizer, **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint16, torch.uint64])
def test_labels_of_any_integer_type_train_alike(dtype: torch.dtype) -> None:
    x, y = batch()
    assert torch.equal(make_step()(x, y.to(dtype)).packed, make_step()(x, y).packed)


@pytest.mark.parametrize(
    ("change", "keyword"),
    [
        (lambda x, y: (x, y.float()), "float32"),
        (lambda x, y: (x, nn.functional.one_hot(y)), r"\(6, 4\)"),
        (lambda x, y: (x, y[:, None]), r"\(6, 1\)"),
        (lambda x, y: (x, y[:5]), r"\(5,\)"),
        (lambda x, y: (x, y > 1), "bool"),
        (lambda x, y: (x, y + 1), r"\[0, 3\].*got 4"),
        (lambda x, y: (x, y - 1), r"\[0, 3\].*got -1"),
        (lambda x, y: (x, y.clone().fill_(255)), "got 255"),
        (lambda x, y: (x[:0], y[:0]), "one image or more"),
        (lambda x, y: (x.double(), y), "float64"),
        (lambda x, y: ((x * 255).to(torch.uint8), y), "uint8"),
        (lambda x, y: (x * 255, y), "lie in"),
        (lambda x, y: (x.to("meta"), y), "meta"),
        (lambda x, y: (x, y.to("meta")), "meta"),
        (lambda x, y: (x[:1], y[:1]), "two samples"),
        (lambda x, y: (x[:, :1], y), r"no images of shape \(1, 8, 8\): .*; pass images"),
    ],
)
def test_batches_that_do_not_fit(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], keyword: str
) -> None:
    step = make_step()
    before = copy.deepcopy(step.model.state_dict())
    with pytest.raises(ValueError, match=keyword) as error:
        step(*change(*batch()))
    assert "\n" not in str(error.value) and step.num_calls == 0
    assert all(torch.equal(t, before[name]) for name, t in step.model.state_dict().items())


@pytest.mark.parametrize("eps", [math.inf, math.nan, -1.0])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_radius_is_a_finite_number(norm: Any, eps: float) -> None:
    for make in (lambda: PGD(eps=eps, norm=norm), lambda: ThreatModel(eps, norm)):
        with pytest.raises(ValueError, match="eps"):
            make()
    with pytest.raises(ValueError, match="alpha"):
        PGD(alpha=eps, norm=norm)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, AveragedModel])
def test_the_network_itself_is_expected(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"\.(module|_orig_mod)"):
        TrainStep(wrap(model), AdversarialTraining(), PGD(), optimizer)


def test_a_last_batch_of_one_is_skipped_and_said_once() -> None:
    step, (x, y) = make_step(), batch(13)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            losses = [float(step(*batch)["loss"]) for batch in loader]
            assert losses[2] == losses[1] != losses[0]
    assert [str(w.message)[:25] for w in said] == ["a batch of one sample has"]
    assert step.num_calls == 4


Loop = tuple[nn.Module, Objective, torch.optim.Optimizer]


def forgot_to_convert(model: nn.Module) -> Loop:
    objective = ARAT(model, ["bn1"], (3, 8, 8))
    objective.start_epoch(0.25)
    return model, objective, sgd(model, objective)


def converted_too_late(model: nn.Module) -> Loop:
    optimizer = sgd(model)
    model = convert_split_batch_norm(model)
    return model, AdversarialTraining(), optimizer


def forgot_the_predictors(model: nn.Module) -> Loop:
    model = convert_split_batch_norm(model)
    objective = ARAT(model, ["bn1"], (3, 8, 8))
    objective.start_epoch(0.25)
    return model, objective, sgd(model)


def forgot_the_epoch(model: nn.Module) -> Loop:
    model = convert_split_batch_norm(model)
    objective = ARAT(model, ["bn1"], (3, 8, 8))
    return model, objective, sgd(model, objective)


def forgot_nothing(model: nn.Module) -> Loop:
    model = convert_split_batch_norm(model)
    objective = ARAT(model, ["bn1"], (3, 8, 8), balance="fixed")
    return model, objective, sgd(model, objective)


@pytest.mark.parametrize("forgot", [True, False])
def test_a_loop_is_told_that_its_radius_does_not_grow(forgot: bool) -> None:
    attack = PGD(num_steps=1, eps_warmup=3)
    step = make_step()
    step.attack = attack if forgot else attack.in_epoch(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            step(*batch())
    assert [str(w.message)[:30] for w in said] == ["the radius does not grow by it"] * forgot


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1)


@pytest.mark.parametrize(
    ("loop", "keywords"),
    [
        (forgot_to_convert, ["convert_split_batch_norm"]),
        (converted_too_late, ["bn1.weight", "belong neither"]),
        (forgot_the_predictors, ["predictors"]),
        (forgot_the_epoch, ["start_epoch"]),
        (forgot_nothing, []),
    ],
)
def test_a_loop_is_told_what_it_forgot(
    loop: Callable[[nn.Module], Loop], keywords: list[str]
) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, objective, optimizer = loop(TinyNet())
        step = TrainStep(model, objective, PGD(num_steps=1), optimizer)
        for _ in range(2):
            step(*batch())
    messages = [str(warning.message) for warning in said]
    assert len(messages) == len(keywords), messages
    assert all(word in message for word, message in zip(keywords, messages, strict=True))
