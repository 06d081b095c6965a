"""The cosine reference and the checks of the public function."""

from __future__ import annotations

import torch

from arat_kernels.checks import randn
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
