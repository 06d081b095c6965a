"""What the public functions refuse, by the name of the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from arat_kernels.checks import Norm, randn
from arat_kernels.cosine_invariance import cosine_invariance
from arat_kernels.crop_flip import crop_flip, draw_crop_flip
from arat_kernels.cross_entropy_grad import cross_entropy_grad
from arat_kernels.frozen_affine import frozen_affine, relu_backward
from arat_kernels.image_parts.reference import image_parts_reference
from arat_kernels.pgd_step import pgd_step, random_start
from arat_kernels.split_batch_norm import (
    SplitBatchNorm2d,
    split_batch_norm,
    use_branch,
    use_statistics,
)

FLOAT8 = torch.float8_e5m2
IMAGES = torch.zeros(6, 3, 8, 9, dtype=torch.uint8)
INDEX = torch.tensor([5, 0, 3, 3])
OFFSETS = torch.zeros(4, 3, dtype=torch.int32)
RNG = torch.tensor([11, 12])
X = torch.full((2, 3, 4, 4), 0.5)
PARTS = image_parts_reference(X)
ROW = randn((3,), 1)
P, T = [randn((4, 6), 0), randn((4, 3), 1)], [randn((4, 6), 2), randn((4, 3), 3)]
LOGITS, TARGET = randn((6, 10), 0), torch.arange(6)
NORM: dict[str, Any] = {**Norm().make(0, torch.float32), "sizes": (3, 2), "training": True}
HALF = {"x": torch.ones(5, 5, 4, 3).half(), "residual": None}

Change = dict[str, Any]
BAD: dict[Callable[..., object], tuple[Change, list[tuple[str, Change]]]] = {
    split_batch_norm: (
        NORM,
        [
            ("x", {"x": torch.randn(5, 5)}),
            ("x", {"x": torch.randn(0, 5, 2, 2), "sizes": (0, 0)}),
            ("x", {"x": torch.ones(5, 5, 4, 3, dtype=torch.int32)}),
            ("sizes", {"sizes": (3, 3)}),
            ("sizes", {"sizes": (6, -1)}),
            ("weight", {"weight": torch.randn(2, 4)}),
            ("bias", {"bias": torch.randn(5)}),
            ("bias", {"bias": torch.ones(2, 5, dtype=torch.int64)}),
            ("weight", {"weight": torch.ones(2, 5).double()}),
            ("bias", {"bias": torch.zeros(2, 5).half()}),
            ("running_var", {"running_var": torch.ones(2, 5).double()}),
            ("weight", {"x": torch.ones(5, 5, 4, 3).double()}),
            ("running_var", {**HALF, "running_var": torch.ones(2, 5).bfloat16()}),
            ("bias", {**HALF, "bias": torch.ones(2, 5).half()}),
            ("running_mean", {"running_mean": torch.zeros(1, 5)}),
            ("contiguous", {"running_var": torch.ones(5, 2).t()}),
            ("residual", {"residual": torch.randn(5, 5, 3, 4)}),
            ("residual", {"residual": torch.randn(5, 5, 4, 3).double()}),
            ("device", {"residual": torch.randn(5, 5, 4, 3, device="meta")}),
            ("device", {"running_var": torch.ones(2, 5, device="meta")}),
            ("momentum", {"momentum": 1.5}),
            ("eps", {"eps": 0.0}),
            ("branch", {"x": torch.randn(3, 5, 1, 1), "residual": None, "sizes": (2, 1)}),
        ],
    ),
    frozen_affine: (
        {"x": X, "scale": ROW, "shift": ROW},
        [
            ("x", {"x": ROW}),
            ("x", {"x": X.int()}),
            ("x", {"x": X.to(FLOAT8)}),
            ("scale", {"scale": ROW.to(FLOAT8)}),
            ("scale", {"scale": ROW[:2]}),
            ("shift", {"shift": ROW[:, None]}),
            ("shift", {"shift": ROW.int()}),
            ("scale", {"scale": ROW.clone().requires_grad_()}),
            ("shift", {"shift": ROW.clone().requires_grad_()}),
            ("residual", {"residual": X.half()}),
            ("residual", {"residual": X[:1]}),
        ],
    ),
    relu_backward: (
        {"dy": X, "y": X},
        [
            ("y", {"y": ROW}),
            ("y", {"y": X.int()}),
            ("y", {"y": X.to(FLOAT8)}),
            ("dy", {"dy": X[:1]}),
            ("dy_skip", {"dy_skip": X.double()}),
        ],
    ),
    cosine_invariance: (
        {"predictions": P, "targets": T},
        [
            ("as many", {"predictions": [], "targets": []}),
            ("as many", {"targets": T[:1]}),
            ("predictions", {"predictions": [P[0][0], P[1]]}),
            ("predictions", {"predictions": [P[0], P[1][1:]]}),
            ("targets", {"targets": [T[0], T[0]]}),
            ("predictions", {"predictions": [P[0], P[1].half()]}),
            ("targets", {"targets": [t.int() for t in T]}),
            ("targets", {"targets": [t.to(FLOAT8) for t in T]}),
            ("predictions", {"targets": [t.double() for t in T]}),
            ("predictions", {"predictions": [t.double() for t in P]}),
            ("eps", {"eps": 0.0}),
        ],
    ),
    cross_entropy_grad: (
        {"logits": LOGITS, "target": TARGET},
        [
            ("logits", {"logits": LOGITS[0]}),
            ("logits", {"logits": LOGITS[:, :0]}),
            ("logits", {"logits": LOGITS.int()}),
            ("logits", {"logits": LOGITS.to(FLOAT8)}),
            ("target", {"target": TARGET[:5]}),
            ("target", {"target": TARGET.float()}),
        ],
    ),
    pgd_step: (
        {"x_adv": X, "grad": X, "x": X, "eps": 0.1, "alpha": 0.1},
        [
            ("x_adv", {"x_adv": torch.ones(3)}),
            ("x_adv", {"x_adv": X.half()}),
            ("channels_last", {"grad": PARTS, "parts": PARTS}),
            ("grad", {"grad": X[:1]}),
            ("grad", {"grad": X.int()}),
            ("x", {"x": X.double()}),
            ("x", {"x": X[:, :1]}),
            ("eps", {"eps": -1.0}),
            ("alpha", {"alpha": math.nan}),
            ("norm", {"norm": "l2"}),
        ],
    ),
    random_start: (
        {"x": X, "rng": RNG, "eps": 0.1},
        [
            ("x", {"x": X.bfloat16()}),
            ("rng", {"rng": RNG.int()}),
            ("rng", {"rng": torch.tensor([1, 2, 3])}),
            ("rng", {"rng": torch.tensor([1, 2, 3, 4])[::2]}),
            ("eps", {"eps": math.inf}),
            ("norm", {"norm": "L3"}),
        ],
    ),
    crop_flip: (
        {"images": IMAGES, "index": INDEX, "padding": 2, "rng": RNG},
        [
            ("images", {"images": IMAGES.float()}),
            ("images", {"images": IMAGES[0]}),
            ("index", {"index": INDEX.float()}),
            ("index", {"index": INDEX[None]}),
            ("padding", {"padding": -1}),
            ("either", {"offsets": OFFSETS}),
            ("rng", {"rng": RNG.float()}),
            ("rng", {"rng": None}),
            ("rng", {"rng": None, "padding": 0, "flip": True}),
            ("offsets", {"rng": None, "offsets": OFFSETS.float()}),
            ("offsets", {"rng": None, "offsets": OFFSETS[:3]}),
            ("max_value", {"max_value": 0}),
            ("dtype", {"dtype": torch.float64}),
            ("memory_format", {"memory_format": torch.preserve_format}),
        ],
    ),
    draw_crop_flip: (
        {"rng": RNG, "num": 3, "padding": 2, "flip": True},
        [("num", {"num": -1}), ("padding", {"padding": -2})],
    ),
}


@pytest.mark.parametrize("function", BAD, ids=lambda function: str(function.__name__))
def test_bad_input_is_refused(function: Callable[..., object]) -> None:
    given, changes = BAD[function]
    before = {name: t.clone() for name, t in given.items() if isinstance(t, torch.Tensor)}
    for keyword, change in changes:
        with pytest.raises(ValueError, match=rf"\b{keyword}\b"):
            function(**{**given, **change})
            pytest.fail(f"not refused: {keyword} of {change}")
    torch.testing.assert_close({name: given[name] for name in before}, before, rtol=0, atol=0)


@pytest.mark.parametrize(("branch", "num_clean"), [("avd", None), ("adv", 2), ("both", -1)])
def test_bad_branch(branch: Any, num_clean: int | None) -> None:
    layer = SplitBatchNorm2d(5)
    with pytest.raises(ValueError, match="branch"), use_branch(layer, branch, num_clean):
        pass
    assert (layer.branch, layer.num_clean) == ("adv", None)


def test_bad_statistics() -> None:
    layer = SplitBatchNorm2d(5)
    wrong: Any = "runing"
    with pytest.raises(ValueError, match="statistics"), use_statistics(layer, wrong):
        pass
    assert layer.statistics is None and layer.training


@pytest.mark.parametrize(
    ("keyword", "shape", "residual", "options"),
    [
        ("x must", (2, 4, 3, 3), None, {}),
        ("x must", (2, 5), None, {}),
        ("x must", (0, 5, 3, 3), None, {}),
        ("residual", (2, 5, 3, 3), (2, 5, 1, 1), {}),
        ("clean branch", (3, 5, 1, 1), None, {"num_clean": 1}),
        ("adv branch", (3, 5, 1, 1), None, {"num_clean": 2}),
        ("even", (3, 5, 3, 3), None, {}),
        ("num_clean", (3, 5, 3, 3), None, {"num_clean": 4}),
        ("impl", (2, 5, 3, 3), None, {"impl": "cuda"}),
    ],
)
def test_the_layer_refuses_a_batch_and_does_not_count_it(
    keyword: str, shape: tuple[int, ...], residual: tuple[int, ...] | None, options: Any
) -> None:
    layer = SplitBatchNorm2d(5)
    layer.impl = options.get("impl")
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    extra = None if residual is None else torch.randn(residual)
    branch = use_branch(layer, "both", options.get("num_clean"))
    with pytest.raises(ValueError, match=keyword), branch:
        layer(torch.randn(shape), extra)
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)
