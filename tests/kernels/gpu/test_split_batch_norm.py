"""Split BatchNorm's kernels on real hardware."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from kernels.split_batch_norm_cases import Case, Inputs, call, make, run, truth
from kernels.support import EPS_OF, assert_within_budget, at_an_odd_place
from torch import Tensor

from arat_kernels.split_batch_norm import split_batch_norm

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = EPS_OF[torch.bfloat16] / 2
SHAPES = [(64, 32, 32), (512, 4, 4), (640, 8, 8), (3, 17, 5), (16, 56, 56), (4096, 1, 1)]


def check(case: Case) -> None:
    inputs = make(case).to("cuda")
    got = run(case, inputs, None)
    baseline = run(case, inputs, "reference")
    for name, expected in truth(case, inputs).items():
        # Of float32 results once more for 1/std: Triton's root and division may be 3 ulp off, where
        # PyTorch's are rounded. In 16 bits that is nothing beside the rounding of the result.
        factor = 3.0 if got[name].dtype == torch.float32 else 2.0
        assert_within_budget(got[name], expected, baseline[name], name, factor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sizes", [(8, 8), (5, 11), (16, 0), (0, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_float64_reference(
    dtype: torch.dtype, sizes: tuple[int, int], shape: tuple[int, int, int]
) -> None:
    channels, height, width = shape
    elements = sum(sizes) * channels * height * width
    # Among many float32 values some lie so near zero that rounding decides what ReLU does, and
    # their gradients are then all or nothing. In 16 bits PyTorch's own run has more of them.
    kinked = dtype != torch.float32 or elements < 300_000
    check(
        Case(
            sizes=sizes,
            channels=channels,
            height=height,
            width=width,
            dtype=dtype,
            relu=kinked,
            pooled=kinked,
        )
    )


@pytest.mark.parametrize(
    ("residual", "relu", "pooled", "affine", "training"), list(product([True, False], repeat=5))
)
def test_every_combination_of_options(
    residual: bool, relu: bool, pooled: bool, affine: bool, training: bool
) -> None:
    check(
        Case(
            sizes=(6, 10),
            channels=48,
            height=9,
            width=9,
            dtype=torch.bfloat16,
            residual=residual,
            relu=relu,
            pooled=pooled,
            affine=affine,
            training=training,
        )
    )


@pytest.mark.parametrize("channels", [1, 64])
def test_large_images(channels: int) -> None:
    check(Case(sizes=(1, 2), channels=channels, height=224, width=224, dtype=torch.bfloat16))


def test_nchw_and_unaligned_pointers() -> None:
    check(Case(sizes=(4, 4), channels=64, height=8, width=8, channels_last=False))
    case = Case(sizes=(3, 3), channels=5, height=3, width=3, dtype=torch.bfloat16)
    inputs = make(Case(sizes=(4, 3), channels=5, height=3, width=3, dtype=torch.bfloat16))
    inputs = inputs.to("cuda")
    sliced = Inputs(
        x=inputs.x[1:],
        residual=inputs.residual[1:],
        weight=inputs.weight,
        bias=inputs.bias,
        running_mean=inputs.running_mean,
        running_var=inputs.running_var,
        upstream=(inputs.upstream[0][1:], inputs.upstream[1][1:]),
    )
    y, pooled = call(case, sliced, "triton")
    copied = Inputs(**{**vars(sliced), "x": sliced.x.clone(), "residual": sliced.residual.clone()})
    expected_y, expected_pooled = call(case, copied, "triton")
    assert torch.equal(y, expected_y) and torch.equal(pooled, expected_pooled)


def test_tensors_at_odd_places() -> None:
    case = Case(sizes=(4, 3), channels=32, height=5, width=5, dtype=torch.bfloat16)
    inputs = make(case).to("cuda")
    fields = {name: at_an_odd_place(t) for name, t in vars(inputs).items() if name != "upstream"}
    dy, dpooled = inputs.upstream
    moved = Inputs(**fields, upstream=(at_an_odd_place(dy), at_an_odd_place(dpooled)))

    def results(given: Inputs) -> list[Tensor]:
        # Not by run, which copies its inputs.
        leaves = [given.x, given.residual, given.weight, given.bias]
        for leaf in leaves:
            leaf.requires_grad_()
        y, pooled = call(case, given, "triton")
        gradients = torch.autograd.grad([y, pooled], leaves, given.upstream)
        return [y, pooled, *gradients, given.running_mean, given.running_var]

    for got, expected in zip(results(moved), results(inputs), strict=True):
        assert torch.equal(got, expected)


def test_the_same_bits_every_time() -> None:
    case = Case(sizes=(32, 32), channels=64, height=16, width=16, dtype=torch.bfloat16)
    inputs = make(case).to("cuda")
    first, second = run(case, inputs, None), run(case, inputs, None)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_variance_of_values_far_from_zero() -> None:
    x = torch.randn(64, 64, 56, 56, device="cuda") + 1e4
    x = x.contiguous(memory_format=torch.channels_last)
    buffers = torch.zeros(2, 64, device="cuda"), torch.ones(2, 64, device="cuda")
    split_batch_norm(x, None, None, *buffers, (20, 44), training=True, momentum=1.0)
    for row, part in zip(buffers[1], x.split([20, 44]), strict=True):
        expected = part.double().var(dim=(0, 2, 3))
        assert ((row - expected) / expected).abs().max() <= 1e-4


def forward_and_backward(case: Case, inputs: Inputs) -> list[Tensor]:
    leaves = [inputs.x, inputs.residual, inputs.weight, inputs.bias]
    y, pooled = call(case, inputs, "triton")
    return [y, pooled, *torch.autograd.grad([y, pooled], leaves, inputs.upstream)]


def test_graph_replay_with_changed_inputs() -> None:
    case = Case(sizes=(8, 12), channels=64, height=8, width=8, dtype=torch.bfloat16)
    static = make(case).to("cuda")
    for leaf in (static.x, static.residual, static.weight, static.bias):
        leaf.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_and_backward(case, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward_and_backward(case, static)
    for seed in (1, 2):
        fresh = make(Case(**{**vars(case), "seed": seed})).to("cuda")
        with torch.no_grad():
            for name, value in vars(fresh).items():
                if name == "upstream":
                    for target, source in zip(static.upstream, value, strict=True):
                        target.copy_(source)
                else:
                    getattr(static, name).copy_(value)
        graph.replay()
        for leaf in (fresh.x, fresh.residual, fresh.weight, fresh.bias):
            leaf.requires_grad_()
        for got, expected in zip(outputs, forward_and_backward(case, fresh), strict=True):
            assert torch.equal(got, expected)
        assert torch.equal(static.running_mean, fresh.running_mean)
        assert torch.equal(static.running_var, fresh.running_var)


def test_side_stream() -> None:
    case = Case(sizes=(32, 32), channels=64, height=32, width=32, dtype=torch.bfloat16)
    inputs = make(case).to("cuda")
    expected, _ = call(case, inputs, None)
    late = Inputs(**{**vars(inputs), "x": torch.zeros_like(inputs.x)})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.x.copy_(inputs.x)
        y, _ = call(case, late, None)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


def test_more_than_two_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free GPU memory, got {free / 2**30:.0f}")
    n, channels, area = 1032, 512, (64, 64)
    x = torch.empty(n, channels, *area, dtype=torch.bfloat16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    for i, sample in enumerate(x):
        sample.normal_(mean=i / n, generator=torch.Generator("cuda").manual_seed(i))
    x.requires_grad_()
    buffers = (
        torch.zeros(2, channels, device="cuda"),
        torch.ones(2, channels, device="cuda"),
    )
    y = split_batch_norm(
        x, None, None, *buffers, (500, 532), training=True, momentum=1.0, relu=True
    )
    dy = x.detach().roll(1, 0)
    (dx,) = torch.autograd.grad(y, x, dy)
    last = torch.arange(500, n, device="cuda")
    mean = torch.stack([x[i].detach().double().mean((1, 2)) for i in last]).mean(0)
    var = torch.stack(
        [(x[i].detach().double() - mean[:, None, None]).square().mean((1, 2)) for i in last]
    ).mean(0)
    torch.testing.assert_close(buffers[0][1].double(), mean, rtol=1e-4, atol=1e-6)
    rstd = (var + 1e-5).rsqrt()[:, None, None]
    # Results are rounded once; before that, the tolerance of the mean moves numbers of size 1.
    for i in (500, n - 1):
        xhat = (x[i].detach().double() - mean[:, None, None]) * rstd
        torch.testing.assert_close(y[i].double(), xhat.relu(), rtol=ROUNDING, atol=1e-4)
    g = [dy[i].double() * (y[i] > 0) for i in (n - 1,)]
    sums = torch.zeros(2, channels, dtype=torch.float64, device="cuda")
    for i in last:
        masked = dy[i].double() * (y[i] > 0)
        xhat = (x[i].detach().double() - mean[:, None, None]) * rstd
        sums += torch.stack([masked.mean((1, 2)), (masked * xhat).mean((1, 2))])
    sums /= len(last)
    xhat = (x[n - 1].detach().double() - mean[:, None, None]) * rstd
    expected = rstd * (g[0] - sums[0][:, None, None] - xhat * sums[1][:, None, None])
    torch.testing.assert_close(dx[n - 1].double(), expected, rtol=ROUNDING, atol=1e-4)


def test_compiled_with_inductor_is_bit_identical() -> None:
    case = Case(sizes=(6, 6), channels=32, height=8, width=8, dtype=torch.bfloat16, update=False)
    inputs = make(case).to("cuda")
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: call(case, given, None), fullgraph=True)
    for got, expected in zip(compiled(inputs), call(case, inputs, None), strict=True):
        assert torch.equal(got, expected)


def test_a_tensor_on_another_device_is_refused() -> None:
    inputs = make(Case()).to("cuda")
    inputs.weight = inputs.weight.cpu()
    with pytest.raises(ValueError, match="weight must be on cuda:0 as x, got cpu"):
        call(Case(), inputs, None)
