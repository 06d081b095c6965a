"""Square without repeated queries against the reference code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from arat_fast.attacks import SquareLinf

EPS = 0.02


def network(channels: int, seed: int = 3) -> _Wide:
    """In float64: no rounding decides what is accepted."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(6)
        ).double()
        model(torch.zeros(1, channels, 9, 9, dtype=torch.float64))
    return _Wide(model).eval()


class _Wide(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        # A batch is filled up with an image that it has already.
        self.count += len(torch.unique(x, dim=0))
        logits: Tensor = self.model(x.double())
        return logits


def images(model: nn.Module, count: int, channels: int) -> tuple[Tensor, Tensor]:
    """Images, some pixels at the ends of the range, and the labels that the model gives them."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.rand((count, channels, 9, 9), generator=generator) * 1.4 - 0.2
    x = x.clamp(0, 1)
    with torch.no_grad():
        return x, model(x).argmax(dim=1)


@pytest.mark.parametrize(
    ("channels", "queries", "rescale_schedule"),
    [pytest.param(1, 1500, False, marks=pytest.mark.slow), (3, 500, True)],
)
def test_same_examples_as_the_reference_code(
    channels: int, queries: int, rescale_schedule: bool
) -> None:
    model = network(channels)
    x, y = images(model, 10, channels)
    with torch.random.fork_rng():
        reference = SquareAttack(
            model, eps=EPS, n_queries=queries, seed=7, resc_schedule=rescale_schedule, device="cpu"
        )
        model.count = 0
        expected = reference.perturb(x, y)
        asked = model.count
    attack = SquareLinf(
        EPS, num_queries=queries, seed=7, batch_size=5, rescale_schedule=rescale_schedule
    )
    model.count = 0
    x_adv = attack(model, x, y)
    broken = (expected != x).flatten(1).any(dim=1)
    assert 0 < int(broken.sum()) < len(x)
    assert torch.equal(x_adv, expected)
    assert model.count < asked / (2 if channels == 1 else 1)


def test_parts_of_the_images_take_the_same_steps() -> None:
    model = network(3)
    x, y = images(model, 9, 3)
    attack = SquareLinf(5 * EPS, num_queries=150, seed=7)
    whole = attack(model, x, y)

    def share(call: Callable[..., Tensor], /, *tensors: Tensor) -> Tensor:
        parts = zip(*(t.tensor_split(2) for t in tensors), strict=True)
        return torch.cat([call(*part) for part in parts])

    assert attack(model, x, y, share=share).equal(whole)
    assert not whole.equal(x)


def test_random_state_is_left_alone() -> None:
    model = network(1)
    x, y = images(model, 4, 1)
    state = torch.get_rng_state()
    attack = SquareLinf(EPS, num_queries=30)
    first = attack(model, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(attack(model, x, y), first)
    assert (
        ((first - x).abs() <= EPS * (1 + 1e-5)).all() and (first >= 0).all() and (first <= 1).all()
    )


def test_nothing_to_attack_and_no_queries() -> None:
    model = network(1)
    x, y = images(model, 4, 1)
    assert SquareLinf(EPS)(model, x[:0], y[:0]).shape == (0, 1, 9, 9)
    assert SquareLinf(EPS, num_queries=0)(model, x, y).shape == x.shape
    with pytest.raises(ValueError, match="num_queries >= 0"):
        SquareLinf(EPS, num_queries=-1)
