"""The cosine reference and the checks of the public function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.support import randn

from arat_kernels.cosine_invariance import cosine_invariance

P = [randn((4, 6), 0), randn((4, 3), 1)]
T = [randn((4, 6), 2), randn((4, 3), 3)]


def test_is_the_mean_of_one_minus_cosine() -> None:
    got = cosine_invariance(P, T)
    for layer in range(2):
        cosines = [
            float(p @ t / (p.norm() * t.norm())) for p, t in zip(P[layer], T[layer], strict=True)
        ]
        assert abs(float(got[layer]) - (1 - sum(cosines) / 4)) < 1e-6


def test_low_precision_is_widened_first() -> None:
    narrow = [t.bfloat16() for t in P], [t.bfloat16() for t in T]
    got = cosine_invariance(*narrow)
    assert got.dtype == torch.float32
    wide = cosine_invariance([t.float() for t in narrow[0]], [t.float() for t in narrow[1]])
    assert torch.equal(got, wide)


def test_gradient_stops_at_the_targets() -> None:
    leaves = [P[0].clone().requires_grad_(), T[0].clone().requires_grad_()]
    out = cosine_invariance([leaves[0]], [leaves[1]])
    grads = torch.autograd.grad(out, leaves, randn((1,), 4), allow_unused=True)
    assert grads[0] is not None and grads[0].abs().min() > 0
    assert grads[1] is None


BAD: list[tuple[str, dict[str, Any]]] = [
    ("as many", {"predictions": [], "targets": []}),
    ("as many", {"targets": T[:1]}),
    ("predictions", {"predictions": [P[0][0], P[1]]}),
    ("predictions", {"predictions": [P[0], P[1][1:]]}),
    ("targets", {"targets": [T[0], T[0]]}),
    ("predictions", {"predictions": [P[0], P[1].half()]}),
    ("targets", {"targets": [t.int() for t in T]}),
    ("targets", {"targets": [t.to(torch.float8_e5m2) for t in T]}),
    ("predictions", {"targets": [t.double() for t in T]}),
    ("predictions", {"predictions": [t.double() for t in P]}),
    ("eps", {"eps": 0.0}),
]


@pytest.mark.parametrize(("keyword", "change"), BAD)
def test_bad_input_is_refused(keyword: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{keyword}\b"):
        cosine_invariance(**{"predictions": P, "targets": T, **change})
