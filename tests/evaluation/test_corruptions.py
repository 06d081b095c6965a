"""Common corruptions: in range, seeded, stronger with severity, at every image size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arat_fast.datasets.digits import MAX_VALUE, load_digits
from arat_fast.evaluation.corruptions import CHUNK, CORRUPTIONS, corrupt

SIZES = [(1, 8, 8), (3, 32, 32), (3, 64, 48)]


def photos(channels: int, height: int, width: int, count: int = 6) -> Tensor:
    """Smooth images with an edge, away from the ends of the range."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand((count, channels, 4, 4), generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    x[..., width // 2 :] += 0.25
    return (0.1 + 0.6 * x).clamp(0.02, 0.98)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_is_a_scale_of_damage(name: str, shape: tuple[int, int, int]) -> None:
    x = photos(*shape)
    before = x.clone()
    damage = []
    for severity in range(1, 6):
        y = corrupt(x, name, severity, seed=3)
        assert y.shape == x.shape and y.dtype == torch.float32
        assert y.isfinite().all() and y.min() >= 0 and y.max() <= 1
        assert torch.equal(y, corrupt(x, name, severity, seed=3))
        damage.append(float((y - x).square().mean()))
    assert torch.equal(x, before)
    assert damage[0] > 0 and damage[-1] > 1.2 * damage[0]
    # Random ones may swap neighbours; JPEG and pixelate round.
    assert damage[-1] == max(damage) or damage[-1] > 0.8 * max(damage)


@pytest.mark.parametrize("name", ["gaussian_noise", "snow", "elastic_transform", "glass_blur"])
def test_seed_and_place_decide(name: str) -> None:
    x = photos(1, 8, 8, 1).expand(CHUNK + 5, -1, -1, -1)
    y = corrupt(x, name, 3, seed=1)
    assert not torch.equal(y, corrupt(x, name, 3, seed=2))
    assert not torch.equal(y[0], y[1]) and not torch.equal(y[:5], y[CHUNK:])
    assert torch.equal(y[:CHUNK], corrupt(x[:CHUNK], name, 3, seed=1))


def test_known_results() -> None:
    flat = torch.full((2, 3, 16, 16), 0.5)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "pixelate"):
        assert torch.allclose(corrupt(flat, name, 5), flat, atol=1e-5), name
    assert torch.allclose(corrupt(flat, "brightness", 2), flat + 0.2)
    noise = corrupt(torch.full((4, 1, 64, 64), 0.5), "gaussian_noise", 1) - 0.5
    assert float(noise.std()) == pytest.approx(0.04, rel=0.05)
    salted = corrupt(torch.full((4, 1, 64, 64), 0.5), "impulse_noise", 5)
    assert float((salted != 0.5).float().mean()) == pytest.approx(0.17, rel=0.1)


def test_digits_and_errors() -> None:
    x = load_digits(train=False)[0][:4].float() / MAX_VALUE
    for name in CORRUPTIONS:
        assert corrupt(x, name, 5).shape == x.shape
    with pytest.raises(ValueError, match="unknown corruption 'rain', expected one of"):
        corrupt(x, "rain", 1)
    with pytest.raises(ValueError, match="1 to 5, got 6"):
        corrupt(x, "fog", 6)
    assert corrupt(x[:0], "fog", 1).shape == (0, 1, 8, 8)
