"""What is NaN or infinite is never a prediction, and never robust."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import generator
from official import state_dict_to_official
from safetensors.torch import save_file
from torch import Tensor, nn

import arat_fast
from arat_fast.attacks import PGD, RandomStart
from arat_fast.attacks.square import SquareLinf
from arat_fast.evaluation import ImageSet, ThreatModel, autoattack, clean_accuracy, pgd_accuracy
from arat_fast.evaluation.autoattack import STANDARD
from arat_fast.models import create_model
from arat_fast.saved import save_safetensors
from arat_fast.training.metrics import NotFiniteError

EVEN = torch.randint(0, 3, (40, 1, 4, 4), generator=generator(0)) / 2
"""Images of three grey values, so that attacked ones are told from them."""
DATA = ImageSet(EVEN, torch.arange(40) % 4, tuple("abcd"))
THREAT = ThreatModel(0.1)


class Net(nn.Module):
    """Linear, and right about all images that are not attacked; ``spoil`` changes its logits."""

    def __init__(self, spoil: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.spoil = spoil
        self.head = nn.Linear(16, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        attacked = ((flat * 2).round() - flat * 2).abs().amax(1) > 1e-3
        same = (flat[:, None] - DATA.x.flatten(1)).abs().amax(2) <= 0.11
        right = nn.functional.one_hot(DATA.y, 4)[same.int().argmax(1)] * 5.0
        return self.spoil(right + 0.01 * self.norm(self.head(flat)), attacked | False)


def nan_where(mask: Tensor, logits: Tensor) -> Tensor:
    return torch.where(mask[:, None], torch.nan, logits)


def broken_gradient(logits: Tensor, attacked: Tensor) -> Tensor:
    """Finite logits whose gradient is 0 times infinity."""
    return logits + (logits - logits.detach()).abs().sqrt()


SPOILED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "some images": lambda y, _: nan_where(torch.arange(len(y)) % 7 == 3, y),
    "attacked images": lambda y, attacked: nan_where(attacked, y),
    "half": lambda y, attacked: (y * 1e4 * (1 + attacked[:, None].float())).half().float(),
    "gradient": broken_gradient,
}
EVALUATIONS: dict[str, Callable[[nn.Module], object]] = {
    "clean": lambda m: clean_accuracy(m, DATA, batch_size=16),
    "pgd": lambda m: pgd_accuracy(
        m, DATA, THREAT, num_steps=2, alpha=0.05, batch_size=16, num_restarts=2
    ),
    **{
        attack: lambda m, attack=attack: autoattack(  # type: ignore[misc]
            m, DATA, THREAT, batch_size=40, attacks=(attack,)
        )
        for attack in STANDARD
    },
}


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("kind", SPOILED)
def test_an_answer_that_is_no_number_ends_the_evaluation(kind: str, evaluation: str) -> None:
    if kind != "some images" and evaluation == "clean":
        pytest.skip("the clean images have answers")
    if kind == "gradient" and evaluation == "square":
        pytest.skip("asks for no gradient")
    torch.manual_seed(0)
    model = Net(SPOILED[kind])
    with pytest.raises(NotFiniteError, match=r"of \d+ images") as error:
        EVALUATIONS[evaluation](model)
    assert "\n" not in str(error.value)
    assert not model._forward_hooks


def spoil_weight(model: nn.Module) -> None:
    model.get_parameter("layer2.0.conv1.weight").data[0, 0] = torch.inf


def spoil_statistics(model: nn.Module) -> None:
    model.get_buffer("layer2.0.bn1.running_var")[1, 3] = torch.nan


def spoil_answer(model: nn.Module) -> None:
    """Finite, and the root of it is not."""
    model.get_buffer("layer2.0.bn1.running_var")[:] = -1.0


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_statistics, spoil_answer])
def test_the_layer_is_named(spoil: Callable[[nn.Module], None]) -> None:
    model = create_model("resnet8", 4, 1)
    spoil(model)
    data = ImageSet(
        torch.rand(6, 1, 8, 8, generator=generator(1)), torch.arange(6) % 4, DATA.classes
    )
    with pytest.raises(NotFiniteError, match=r"layer2\.0\.(bn1|conv1)"):
        clean_accuracy(model, data, batch_size=6)


@pytest.mark.parametrize("name", ["linear.weight", "bn1.running_var", "layer1.0.bn2.bias"])
@pytest.mark.parametrize("kind", ["official", "plain", "safetensors"])
def test_weights_that_are_not_finite_are_not_read(kind: str, name: str, tmp_path: Path) -> None:
    norm = "split" if kind == "official" else "shared"
    state = create_model("resnet8", 10, 1, norm).state_dict()  # type: ignore[arg-type]
    state[name].view(-1)[-1] = torch.nan
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state_dict_to_official(state) if kind == "official" else state, path)
    with pytest.raises(NotFiniteError, match=name):
        arat_fast.load(path, recipe="digits")


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    model = create_model("resnet8", 10, 1, "shared")
    model.get_parameter("conv1.weight").data[0] = torch.inf
    with pytest.raises(NotFiniteError, match="conv1"):
        save_safetensors(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_attacks_by_themselves_do_not_pass_over_nan() -> None:
    """A restart that made NaN is kept, and seen; Square takes NaN for a wrong answer."""
    x, y = DATA.x, DATA.y
    model = Net(SPOILED["attacked images"]).eval()
    attack = PGD(eps=0.1, num_steps=0, num_restarts=2, bn="running")
    found = attack(model, x, y, RandomStart(noise=torch.zeros_like(x)))
    assert (found != x).flatten(1).any(1).all()
    found = SquareLinf(0.1, num_queries=5)(model, x, y)
    assert (found != x).flatten(1).any(1).all()
