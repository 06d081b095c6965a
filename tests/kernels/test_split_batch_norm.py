"""Split BatchNorm's definition, its checks, and what needs no kernel to run."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.split_batch_norm_group import check_two_processes
from kernels.support import few
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from arat_kernels.checks import Norm, Tensors, to_float64, upstream
from arat_kernels.split_batch_norm import (
    SplitBatchNorm2d,
    distributed,
    split_batch_norm,
    use_branch,
    use_statistics,
)


def two_batch_norms(norm: Norm) -> Tensors:
    """The same with torch.nn modules, one per branch."""
    given = norm.make(0, torch.float64)
    leaves = [given[name].requires_grad_() for name in ("x", "residual", "weight", "bias")]
    parts, layers = [], []
    for branch, part in enumerate(given["x"].split(list(norm.sizes))):
        layer = nn.BatchNorm2d(norm.channels, norm.eps, norm.momentum, dtype=torch.float64)
        layer.train(norm.training)
        for name in ("running_mean", "running_var"):
            getattr(layer, name).copy_(given[name][branch])
        values = {name: given[name][branch] for name in ("weight", "bias")}
        if len(part):
            parts.append(torch.func.functional_call(layer, values, part))
        layers.append(layer)
    normalised = torch.cat(parts)
    outputs = [(normalised + given["residual"]).relu(), normalised.relu().mean(dim=(2, 3))]
    dout = [upstream(t, 1000 + i) for i, t in enumerate(outputs)]
    dx, dresidual, dweight, dbias = torch.autograd.grad(outputs, leaves, dout)
    return {
        **{str(i): t.detach() for i, t in enumerate(outputs)},
        **{"dx": dx, "dresidual": dresidual, "dweight": dweight, "dbias": dbias},
        **{
            n: torch.stack([getattr(m, n) for m in layers]) for n in ("running_mean", "running_var")
        },
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [(3, 2), (4, 0), (0, 3)], ids=str)
def test_reference_is_two_batch_norms(sizes: tuple[int, int], training: bool) -> None:
    norm = Norm(sizes=sizes, training=training)
    got = norm.operation.results(norm.make(0, torch.float64), "reference")
    torch.testing.assert_close(got, two_batch_norms(norm), rtol=1e-12, atol=1e-12)


@given(
    sizes=st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda sizes: sum(sizes) > 0),
    channels=st.integers(1, 9),
    height=st.integers(1, 5),
    width=st.integers(2, 5),
)
@few(15)
def test_reference_in_float32_stays_near_float64(**options: Any) -> None:
    norm = Norm(relu=False, **options)
    tensors = norm.make(0, torch.float32)
    got = to_float64(norm.operation.results(tensors, None))
    truth = norm.operation.results(to_float64(tensors), None)
    torch.testing.assert_close(got, truth, rtol=1e-3, atol=1e-3)


def test_group_of_one_is_no_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        results = []
        for group in (None, torch.distributed.group.WORLD):
            given = Norm().make(0, torch.float64)
            rows = [given[n] for n in ("weight", "bias", "running_mean", "running_var")]
            y = split_batch_norm(given["x"], *rows, (3, 2), training=True, group=group)
            results.append((y, *rows[2:]))
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_statistics_over_two_processes(tmp_path: Path) -> None:
    check_two_processes(tmp_path, "reference")


def test_running_statistics_of_a_group() -> None:
    x = Norm(sizes=(6, 0), channels=3, height=20, width=20).make(0, torch.float32)["x"]
    wide = (x * 0.1 + 1e3).double()
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


@pytest.mark.parametrize("flags", list(product([True, False], repeat=2)), ids=str)
def test_fullgraph_compile_of_the_reference(flags: tuple[bool, bool]) -> None:
    extras, training = flags
    norm = Norm(residual=extras, relu=extras, pooled=extras, training=training)
    torch._dynamo.reset()
    compiled = torch.compile(norm.call, fullgraph=True, backend="aot_eager")
    eager, inputs = norm.make(0, torch.float32), norm.make(0, torch.float32)
    torch.testing.assert_close(compiled(inputs, None), norm.call(eager, None), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs, eager)


def test_layer_in_a_network_without_the_trainer() -> None:
    """The example of its docstring: both branches of a training step, then the attack's forward."""
    norm = Norm(residual=False, relu=False, pooled=False)
    tensors = norm.make(0, torch.float32)
    layer = SplitBatchNorm2d(5, eps=norm.eps, momentum=norm.momentum)
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(layer.state_dict()) == names
    parameters = {name: tensors[name] for name in names[:4]}
    layer.load_state_dict({**parameters, "num_batches_tracked": torch.tensor([3, 4])})
    model = nn.Sequential(layer)
    expected = norm.operation.results(tensors, "reference")
    with use_branch(model, "both", num_clean=3):
        assert torch.equal(model(tensors["x"]), expected["0"])
    assert layer.num_batches_tracked.tolist() == [4, 5]
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(layer, name), expected[name])
    with use_branch(model, "adv"), use_statistics(model, "batch"):
        y = model(tensors["x"])
    attacked = norm.changed(sizes=(0, 5)).operation.results(tensors, "reference")
    assert torch.equal(y, attacked["0"])
    assert torch.equal(layer.running_mean, expected["running_mean"])


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
