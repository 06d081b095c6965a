"""Mixed images, smoothed and weighed targets, against their papers, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from networks import generator, triples
from torch import Tensor

from arat_fast.training.targets import Targets, cutmix

NUM_CLASSES = 4


def applied(targets: Targets, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels before, images and targets after."""
    x, _, y = triples(7, 12)
    return x, y, *targets.after(lambda x, y: (x, y), generator(seed))(x, y)


def test_smoothed_labels_are_those_of_pytorch() -> None:
    _, y, x, target = applied(Targets(NUM_CLASSES, label_smoothing=0.3))
    logits = torch.randn(7, NUM_CLASSES, generator=generator(2), dtype=torch.float64)
    expected = F.cross_entropy(logits, y, label_smoothing=0.3)
    assert abs(F.cross_entropy(logits, target) - expected) <= 1e-15
    assert target.dtype == x.dtype


def test_class_weights_scale_the_samples_and_leave_their_class() -> None:
    weights = (0.5, 10.0, 1.0, 0.0)
    _, y, _, target = applied(Targets(NUM_CLASSES, class_weights=weights, label_smoothing=0.2))
    logits = torch.randn(7, NUM_CLASSES, generator=generator(2), dtype=torch.float64)
    each = F.cross_entropy(logits, y, label_smoothing=0.2, reduction="none")
    expected = sum(weights[label] * loss for label, loss in zip(y.tolist(), each, strict=True)) / 7
    assert abs(F.cross_entropy(logits, target) - expected) <= 1e-14
    assert all(t.argmax() == label for t, label in zip(target, y, strict=True) if t.sum())
    with pytest.raises(ValueError, match="4 classes"):
        Targets(NUM_CLASSES, class_weights=weights[:3])


@pytest.mark.parametrize("seed", range(4))
def test_mixup_is_the_papers(seed: int) -> None:
    x, y, mixed, target = applied(Targets(NUM_CLASSES, mix="mixup"), seed)
    # One share for the batch, in (0, 1), found from the first image.
    share = float(((mixed[0] - x[6]) / (x[0] - x[6])).median())
    assert 0 < share < 1
    labels = F.one_hot(y, NUM_CLASSES).double()
    for i in range(7):
        j = 6 - i
        assert (mixed[i] - (share * x[i] + (1 - share) * x[j])).abs().max() <= 1e-12
        assert (target[i] - (share * labels[i] + (1 - share) * labels[j])).abs().max() <= 1e-12


@pytest.mark.parametrize("share", [0.0, 0.2, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_cutmix_is_the_papers(share: float, seed: int) -> None:
    x, _, y = triples(7, 12)
    x = x[..., :9]
    labels = F.one_hot(y, NUM_CLASSES).double()
    given = torch.tensor(share, dtype=torch.float64)
    mixed, target = cutmix(x, labels, given, generator(seed))
    place = torch.rand(2, generator=generator(seed), dtype=torch.float64).tolist()
    expected = x.clone()
    limits = []
    for size, centre in zip((12, 9), place, strict=True):
        half = int(size * math.sqrt(1 - share)) // 2
        limits.append((max(int(size * centre) - half, 0), min(int(size * centre) + half, size)))
    (top, bottom), (left, right) = limits
    for i in range(7):
        expected[i, :, top:bottom, left:right] = x[6 - i, :, top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (12 * 9)
    assert torch.equal(mixed, expected)
    for i in range(7):
        assert (target[i] - (kept * labels[i] + (1 - kept) * labels[6 - i])).abs().max() <= 1e-15


def test_shares_are_of_the_beta_distribution() -> None:
    shares = []
    for seed in range(400):
        _, y, _, target = applied(Targets(NUM_CLASSES, mix="mixup", alpha=0.4), seed)
        shares.append(float(target[0, y[0]]) if y[0] != y[6] else 0.5)
    assert y[0] != y[6]
    mean = sum(shares) / 400
    variance = sum((s - mean) ** 2 for s in shares) / 400
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)); the mean of 400 within five deviations.
    assert abs(mean - 0.5) < 5 * math.sqrt(1 / 7.2 / 400)
    assert abs(variance - 1 / 7.2) < 0.02
