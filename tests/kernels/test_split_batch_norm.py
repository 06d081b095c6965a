"""Split BatchNorm's definition, its checks, and what needs no kernel to run."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.split_batch_norm_cases import Case, call, make, run, truth
from kernels.split_batch_norm_group import check_two_processes
from kernels.support import few
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from arat_kernels.implementation import interpreting
from arat_kernels.split_batch_norm import (
    SplitBatchNorm2d,
    split_batch_norm,
    use_branch,
    use_statistics,
)


def two_batch_norms(case: Case) -> dict[str, Tensor]:
    """The same with torch.nn modules, one per branch."""
    inputs = make(case)
    leaves = {
        name: getattr(inputs, name).requires_grad_() for name in ("x", "residual", "weight", "bias")
    }
    parts, means, variances = [], [], []
    for branch, part in enumerate(inputs.x.split(list(case.sizes))):
        layer = nn.BatchNorm2d(case.channels, case.eps, case.momentum, dtype=torch.float64)
        layer.train(case.training)
        layer.running_mean.copy_(inputs.running_mean[branch])
        layer.running_var.copy_(inputs.running_var[branch])
        values = {"weight": inputs.weight[branch], "bias": inputs.bias[branch]}
        if len(part):
            parts.append(torch.func.functional_call(layer, values, part))
        means.append(layer.running_mean)
        variances.append(layer.running_var)
    normalised = torch.cat(parts)
    y = (normalised + inputs.residual).relu()
    pooled = normalised.relu().mean(dim=(2, 3))
    gradients = torch.autograd.grad([y, pooled], list(leaves.values()), inputs.upstream)
    return {
        "y": y.detach(),
        "pooled": pooled.detach(),
        **{f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)},
        "running_mean": torch.stack(means),
        "running_var": torch.stack(variances),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [(3, 2), (4, 0), (0, 3)], ids=str)
def test_reference_is_two_batch_norms(sizes: tuple[int, int], training: bool) -> None:
    case = Case(sizes=sizes, training=training, dtype=torch.float64)
    got = run(case, make(case), "reference")
    for name, expected in two_batch_norms(case).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-12, atol=1e-12, msg=name)


@given(
    sizes=st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda sizes: sum(sizes) > 0),
    channels=st.integers(1, 9),
    height=st.integers(1, 5),
    width=st.integers(2, 5),
)
@few(15)
def test_reference_in_float32_stays_near_float64(
    sizes: tuple[int, int], channels: int, height: int, width: int
) -> None:
    case = Case(sizes=sizes, channels=channels, height=height, width=width, relu=False)
    inputs = make(case)
    got = run(case, inputs, None)
    for name, expected in truth(case, inputs).items():
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-3, atol=1e-3, msg=name)


def test_group_of_one_is_no_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        results = []
        for group in (None, torch.distributed.group.WORLD):
            inputs = make(Case(dtype=torch.float64))
            y = split_batch_norm(
                inputs.x,
                inputs.weight,
                inputs.bias,
                inputs.running_mean,
                inputs.running_var,
                (3, 2),
                training=True,
                group=group,
            )
            results.append((y, inputs.running_mean, inputs.running_var))
    finally:
        torch.distributed.destroy_process_group()
    for alone, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, alone, rtol=1e-12, atol=1e-12)


def test_statistics_over_two_processes(tmp_path: Path) -> None:
    check_two_processes(tmp_path, "reference")


def test_running_statistics_of_a_group() -> None:
    from arat_kernels.split_batch_norm import distributed

    inputs = make(Case(sizes=(6, 0), channels=3, height=20, width=20))
    wide = (inputs.x * 0.1 + 1e3).double()
    mean, var = wide.mean(dim=(0, 2, 3)), wide.var(dim=(0, 2, 3))
    running_mean, running_var = torch.zeros(2, 3), torch.ones(2, 3)
    distributed.move_running_statistics(
        running_mean,
        running_var,
        mean.float().expand(2, 3),
        (var * (2399 / 2400)).float().expand(2, 3),
        torch.tensor([2400.0, 0.0]),
        1.0,
    )
    torch.testing.assert_close(running_mean[0].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(running_var[0].double(), var, rtol=1e-6, atol=0)
    assert torch.equal(running_mean[1], torch.zeros(3))
    assert torch.equal(running_var[1], torch.ones(3))


def arguments(**changes: Any) -> dict[str, Any]:
    inputs = make(Case())
    given: dict[str, Any] = {
        "x": inputs.x,
        "weight": inputs.weight,
        "bias": inputs.bias,
        "running_mean": inputs.running_mean,
        "running_var": inputs.running_var,
        "sizes": (3, 2),
        "training": True,
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(5, 5)}, "x must be (N, C, H, W) and not empty, got shape (5, 5)"),
        ({"x": torch.randn(0, 5, 2, 2), "sizes": (0, 0)}, "not empty, got shape (0, 5, 2, 2)"),
        ({"x": torch.ones(5, 5, 4, 3, dtype=torch.int32)}, "floating-point tensor of"),
        ({"sizes": (3, 3)}, "must sum to N = 5, got (3, 3)"),
        ({"sizes": (6, -1)}, "must sum to N = 5, got (6, -1)"),
        ({"weight": torch.randn(2, 4)}, "weight must be (2, C) = (2, 5), got (2, 4)"),
        ({"bias": torch.randn(5)}, "bias must be (2, C) = (2, 5), got (5,)"),
        ({"bias": torch.ones(2, 5, dtype=torch.int64)}, "bias must be torch.float32 for an x of"),
        ({"weight": torch.ones(2, 5).double()}, "of torch.float32, got torch.float64"),
        (
            {"bias": torch.zeros(2, 5).half()},
            "bias must be torch.float32 for an x of torch.float32",
        ),
        ({"running_var": torch.ones(2, 5).double()}, "running_var must be torch.float32 for an x"),
        (
            {"x": torch.ones(5, 5, 4, 3).double()},
            "weight must be torch.float64 for an x of torch.f",
        ),
        (
            {"x": torch.ones(5, 5, 4, 3).half(), "running_var": torch.ones(2, 5).bfloat16()},
            "running_var must be torch.float16 or torch.float32 for an x of torch.float16, got",
        ),
        (
            {"x": torch.ones(5, 5, 4, 3).half(), "bias": torch.ones(2, 5).half()},
            "bias must be torch.float32 as weight, got torch.float16",
        ),
        (
            {"x": torch.ones(5, 5, 4, 3).half(), "running_var": torch.ones(2, 5).half()},
            "running_var must be torch.float32 as running_mean, got torch.float16",
        ),
        ({"running_mean": torch.zeros(1, 5)}, "running_mean must be (2, C) = (2, 5), got (1, 5)"),
        ({"running_var": torch.ones(2, 5, device="meta")}, "running_var must be on cpu as x"),
        ({"running_var": torch.ones(5, 2).t()}, "running_var must be contiguous"),
        ({"residual": torch.randn(5, 5, 3, 4)}, "residual must have x's shape (5, 5, 4, 3)"),
        ({"residual": torch.randn(5, 5, 4, 3).double()}, "residual must have x's dtype"),
        ({"residual": torch.randn(5, 5, 4, 3, device="meta")}, "residual must be on cpu as x"),
        ({"momentum": 1.5}, "momentum must be in [0, 1], got 1.5"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"impl": "cuda"}, 'impl must be "triton", "reference" or None, got \'cuda\''),
        (
            {"x": torch.randn(3, 5, 1, 1), "sizes": (2, 1)},
            "more than one value per channel and branch, got 1 in the adv branch",
        ),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        split_batch_norm(**arguments(**changes))


@pytest.mark.skipif(interpreting(), reason="the interpreter runs the kernels on the CPU")
def test_triton_on_the_cpu_is_refused() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(ValueError, match="expects CUDA tensors, got cpu"):
        split_batch_norm(**arguments(impl="triton"))


@pytest.mark.parametrize(
    ("residual", "relu", "pooled", "training"), list(product([True, False], repeat=4))
)
def test_fullgraph_compile_of_the_reference(
    residual: bool, relu: bool, pooled: bool, training: bool
) -> None:
    case = Case(residual=residual, relu=relu, pooled=pooled, training=training)
    torch._dynamo.reset()
    eager_inputs, inputs = make(case), make(case)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, got = call(case, eager_inputs, None), compiled(case, inputs, None)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs.running_var, eager_inputs.running_var)


def test_eval_mode_leaves_the_buffers_alone() -> None:
    case = Case(training=False)
    inputs = make(case)
    results = run(case, inputs, None)
    assert torch.equal(results["running_mean"], inputs.running_mean)
    assert torch.equal(results["running_var"], inputs.running_var)
    results = run(replace(case, training=True, update=False), inputs, None)
    assert torch.equal(results["running_mean"], inputs.running_mean)


def test_layer_in_a_network_without_the_trainer() -> None:
    """The example of its docstring: both branches of a training step, then the attack's forward."""
    case = Case(residual=False, relu=False, pooled=False)
    inputs = make(case)
    layer = SplitBatchNorm2d(5, eps=1e-3, momentum=0.25)
    expected_keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(layer.state_dict()) == expected_keys
    parameters = {name: getattr(inputs, name) for name in expected_keys[:4]}
    layer.load_state_dict({**parameters, "num_batches_tracked": torch.tensor([3, 4])})
    model = nn.Sequential(layer)
    expected = run(case, inputs, "reference")
    with use_branch(model, "both", num_clean=3):
        assert torch.equal(model(inputs.x), expected["y"])
    assert layer.num_batches_tracked.tolist() == [4, 5]
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(layer, name), expected[name])
    attacked = replace(case, sizes=(0, 5))
    with use_branch(model, "adv"), use_statistics(model, "batch"):
        y = model(inputs.x)
    assert torch.equal(y, run(attacked, inputs, "reference")["y"])
    assert torch.equal(layer.running_mean, expected["running_mean"])


@pytest.mark.parametrize(
    ("branch", "num_clean", "message"),
    [
        ("avd", None, "branch must be one of ('clean', 'adv', 'both'), got 'avd'"),
        ("adv", 2, "or >= 0 with branch \"both\", got 2 with branch 'adv'"),
        ("both", -1, "or >= 0 with branch \"both\", got -1 with branch 'both'"),
    ],
)
def test_bad_branch_is_refused(branch: Any, num_clean: int | None, message: str) -> None:
    layer = SplitBatchNorm2d(5)
    with pytest.raises(ValueError, match=re.escape(message)), use_branch(layer, branch, num_clean):
        pass
    assert (layer.branch, layer.num_clean) == ("adv", None)


def test_bad_statistics_are_refused() -> None:
    layer = SplitBatchNorm2d(5)
    wrong: Any = "runing"
    message = "statistics must be one of ('batch', 'running', 'batch_update'), got 'runing'"
    with pytest.raises(ValueError, match=re.escape(message)), use_statistics(layer, wrong):
        pass
    assert layer.statistics is None and layer.training


def test_a_refused_batch_is_not_counted() -> None:
    layer = SplitBatchNorm2d(5)
    with pytest.raises(ValueError, match="got 1 in the adv branch"):
        layer(torch.randn(1, 5, 1, 1))
    with pytest.raises(ValueError, match=re.escape("weight must be (2, C) = (2, 4), got (2, 5)")):
        layer(torch.randn(2, 4, 3, 3))
    assert layer.num_batches_tracked.tolist() == [0, 0]
    layer(torch.randn(2, 5, 3, 3))
    assert layer.num_batches_tracked.tolist() == [0, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests run the kernels themselves")
def test_cuda_tensors_get_the_kernels_and_keep_their_layout() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    with FakeTensorMode():
        x = torch.empty(5, 8, 3, 3, device="cuda", dtype=torch.bfloat16)
        parameters = [torch.empty(2, 8, device="cuda") for _ in range(4)]

        def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
            return split_batch_norm(
                x, *parameters, (2, 3), training=True, relu=True, residual=x, return_pooled=True
            )

        for layout in (torch.channels_last, torch.contiguous_format):
            given = x.contiguous(memory_format=layout)
            y, pooled = function(given, *parameters)
            assert (y.shape, y.stride(), y.dtype) == (given.shape, given.stride(), given.dtype)
            assert (pooled.shape, pooled.dtype) == ((5, 8), torch.float32)
        traced = make_fx(function)(given, *parameters)
    targets = [str(node.target) for node in traced.graph.nodes]
    operators = [target for target in targets if target.startswith("arat_kernels.")]
    assert operators == [
        "arat_kernels.split_batch_norm_statistics.default",
        "arat_kernels.split_batch_norm_normalize.default",
    ]
