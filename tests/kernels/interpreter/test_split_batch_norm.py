"""The kernels of split BatchNorm in Triton's interpreter, beside what all operations promise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernels.split_batch_norm_group import check_two_processes
from torch import Tensor, nn

import arat_kernels.split_batch_norm.triton as implementation
from arat_kernels.checks import Norm
from arat_kernels.forks import read_by
from arat_kernels.implementation import experimental
from arat_kernels.offsets import start_of
from arat_kernels.split_batch_norm import (
    SplitBatchNorm2d,
    add_for,
    around,
    mean_of_relu,
    normalize_sum,
    skip_of,
    use_branch,
    use_statistics,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLAGS = [True, False]


@pytest.mark.parametrize(
    ("programs", "pooled"), [pytest.param(1, True, marks=pytest.mark.slow), (7, False)]
)
def test_many_tiles_and_segments(
    monkeypatch: pytest.MonkeyPatch, programs: int, pooled: bool
) -> None:
    monkeypatch.setattr(implementation, "programs_of", lambda *_: programs)
    operation = Norm((1, 3), 70, 9, 11, pooled=pooled).operation
    operation.check(operation.make(0, torch.float32))


@pytest.mark.parametrize(
    "sizes", [(20, 37), pytest.param((70, 20), marks=pytest.mark.slow)], ids=str
)
def test_more_segments_than_are_combined_at_once(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """16, that is: a tile is a segment of the statistics, a sample one of the sums; the last ones
    of a branch are not like the first."""
    monkeypatch.setattr(implementation, "programs_of", lambda *_: 1000)
    norm = Norm(sizes, 64, 8, 4, residual=False)
    tensors = norm.make(0, torch.float32)
    for end in (sizes[0], sum(sizes)):
        tensors["x"][end - 6 : end] += 5.0
    norm.operation.check(tensors)


class Block(nn.Module):
    """x to a normalisation and around it, its output to a convolution, to one of every second pixel
    and, the first time, to two further readers, twice."""

    def __init__(self, impl: Any, forks: bool, channels: int) -> None:
        super().__init__()
        made: Any = {"dtype": torch.float64}
        self.norms = nn.ModuleList(SplitBatchNorm2d(channels, **made) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 1, **made) for _ in range(2))
        self.few = nn.ModuleList(nn.Conv2d(channels, 1, 1, 2, **made) for _ in range(2))
        self.forks = forks
        for norm in self.norms:
            norm.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            y = norm(x, x.flip(0), relu=True)
            skip, beside = (skip_of(y), around(y, x)) if self.forks else (y, x)
            assert (skip is not y) is self.forks and (beside is not x) is self.forks
            few = self.few[i]
            x = conv(y) * beside + (read_by(few, y) if self.forks else few(y)).sum((2, 3), True)
            if i == 0:
                x = x + skip.flip(2) + skip
        return x


@pytest.mark.parametrize(
    ("statistics", "ways", "channels"),
    [("batch", (), 6), ("running", (), 6), ("batch", ("one_pass",), 16)],
)
@pytest.mark.parametrize("parameters", FLAGS)
def test_gradients_at_forks(parameters: bool, statistics: Any, ways: Any, channels: int) -> None:
    """As autograd adds them, of the parameters and of x alone."""
    found = []
    for impl, forks in (("triton", True), ("triton", False), ("reference", False)):
        torch.manual_seed(0)
        block = Block(impl, forks, channels)
        tensors = Norm(channels=channels).make(1, torch.float64)
        x = tensors["x"].requires_grad_()
        for norm in block.norms:
            rows = {name: tensors[name] for name in ("weight", "bias", "running_var")}
            norm.load_state_dict({**norm.state_dict(), **rows})
        wanted = [x, *(block.parameters() if parameters else ())]
        with use_branch(block, "both", 3), use_statistics(block, statistics), experimental(*ways):
            found.append(torch.autograd.grad(block(x).sin().sum(), wanted))
    for got in found[:2]:
        torch.testing.assert_close(got, found[2], rtol=1e-9, atol=1e-11)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


@pytest.mark.parametrize("watched", FLAGS)
@pytest.mark.parametrize(
    "projection",
    [
        nn.Conv2d(6, 4, 1, 2),
        Doubled(6, 4, 1, 2),
        nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(6, 4, 1)),
    ],
)
def test_what_projects_may_be_anything(projection: nn.Module, watched: bool) -> None:
    """Its gradients are the reference's, also of what a hook takes from it, and a gradient of y
    leaves nothing for the next."""
    projection.double()
    seen: list[Tensor] = []
    if watched:
        projection.register_forward_hook(lambda _m, _x, out: seen.append(out))
    x = Norm(channels=6).make(1, torch.float64)["x"].requires_grad_()
    found = []
    for impl in ("triton", "reference"):
        norm = SplitBatchNorm2d(6, dtype=torch.float64)
        norm.impl = impl
        seen.clear()
        y = norm(x, relu=True)
        out = read_by(projection, y)
        loss = out.sin().sum() + y.cos().sum() + sum(t.square().sum() for t in seen)
        torch.autograd.grad(loss, y, retain_graph=True)
        found.append(torch.autograd.grad(loss, [x, *projection.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("which", [0, 1])
def test_a_layer_of_a_sum_is_called_where_that_matters(which: int) -> None:
    calls = []

    class Counted(SplitBatchNorm2d):
        def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
            calls.append("forward")
            return super().forward(x, residual, relu)

    tensors = Norm(channels=6).make(1, torch.float32)
    leaves = [tensors["x"].requires_grad_(), tensors["residual"].requires_grad_()]
    for kind in (SplitBatchNorm2d, Counted):
        layers = [SplitBatchNorm2d(6), SplitBatchNorm2d(6)]
        layers[which] = kind(6)
        if kind is SplitBatchNorm2d:
            layers[which].register_full_backward_hook(lambda *_: calls.append("backward"))
        for layer in layers:
            layer.impl = "triton"
        y = normalize_sum(layers[0], leaves[0], layers[1], leaves[1], True)
        torch.autograd.grad(y.sin().sum(), leaves)
    assert calls == ["backward", "forward"]


def test_a_mean_leaves_hooks_and_features_what_they_read() -> None:
    norm = SplitBatchNorm2d(6)
    norm.impl = "triton"
    x, seen = Norm(channels=6).make(1, torch.float32)["x"], list[tuple[int, ...]]()
    expected = mean_of_relu(norm, x)
    norm.pooled_sink = lambda pooled: seen.append(tuple(pooled.shape))
    torch.testing.assert_close(mean_of_relu(norm, x), expected)
    norm.pooled_sink = None
    norm.register_forward_hook(lambda _m, _x, y: seen.append(tuple(y.shape)))
    torch.testing.assert_close(mean_of_relu(norm, x), expected)
    assert seen == [(5, 6), (5, 6, 4, 3)]


@pytest.mark.parametrize("statistics", ["batch", "batch_update"])
def test_a_sum_comes_with_its_statistics(statistics: Any) -> None:
    """The same bits as a sum of its own, and none of a tensor that has changed since; the running
    statistics move once for each pass through the layer."""
    tensors = Norm(channels=65).make(1, torch.float32)
    leaves = [tensors["x"].requires_grad_(), tensors["residual"].requires_grad_()]
    found = []
    for together in (True, False):
        norm, other = SplitBatchNorm2d(65), SplitBatchNorm2d(65)
        norm.impl = other.impl = "triton"
        add = partial(add_for, norm) if together else torch.add
        with use_branch(norm, "both", num_clean=3), use_statistics(norm, statistics):
            x = add(*leaves)
            moved = norm.num_batches_tracked.tolist()
            assert moved == ([1, 1] if together and statistics == "batch_update" else [0, 0])
            y = norm(x, relu=True)
            gradients = torch.autograd.grad((y.sin() + x.cos()).sum(), leaves, retain_graph=True)
            with use_branch(other, "both", num_clean=3), use_statistics(other, statistics):
                beside = other(x, relu=True)
            with torch.no_grad():
                x[3:] *= 2.0
                changed = norm(x, relu=True)
        found.append((y, *gradients, beside, changed, *norm.buffers(), *other.buffers()))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)
    with use_statistics(norm, "running"):
        assert "Add" in type(add_for(norm, *leaves).grad_fn).__name__
    with use_branch(norm, "both", num_clean=3), use_statistics(norm, "batch_update"):
        replaced = add_for(norm, *leaves).clone()
        with pytest.raises(ValueError, match="hook"):
            norm(replaced)
        norm(replaced)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_batches_are_counted(impl: Any) -> None:
    """Of each branch that has samples, where its running statistics move; by 65 channels, once."""
    norm = SplitBatchNorm2d(65)
    norm.impl = impl
    x = Norm(channels=65).make(0, torch.float32)["x"]
    for num_clean, statistics in ((3, None), (5, None), (0, None), (0, "batch"), (2, "running")):
        with (
            use_branch(norm, "both", num_clean),
            use_statistics(norm, statistics or "batch_update"),
        ):
            norm(x)
    assert norm.num_batches_tracked.tolist() == [2, 2]


def test_an_outlet_that_is_not_read_has_no_gradient() -> None:
    """x feeds nothing but what goes around the normalisation, y nothing but its second reader."""
    tensors = Norm().make(0, torch.float64)
    norm = SplitBatchNorm2d(5, dtype=torch.float64)
    norm.impl = "triton"
    x = tensors["x"].requires_grad_()
    y = norm(x, relu=True)
    (only_around,) = torch.autograd.grad(around(y, x).square().sum(), x, retain_graph=True)
    torch.testing.assert_close(only_around, 2 * x)
    (main,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(skip_of(y).square().sum(), x)
    assert torch.equal(main, second)


@pytest.mark.parametrize("used", [0, 1])
def test_backward_call_with_one_output_unused(used: int) -> None:
    norm = Norm()
    gradients = []
    for impl in ("triton", "reference"):
        tensors = norm.make(0, torch.float64)
        leaves = [tensors[name].requires_grad_() for name in ("x", "residual", "weight", "bias")]
        out = norm.call(tensors, impl)[used]
        # The reference has no gradient, the operator one of zeros, for what plays no part.
        found = torch.autograd.grad(out.sin().sum(), leaves, materialize_grads=True)
        gradients.append(found)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


@triton.jit
def _offsets_kernel(out_ptr, number, clean_rows, rows, clean_segments, segment_rows, channels):  # type: ignore[no-untyped-def]
    pid = tl.program_id(0)
    segment = number + pid
    branch, first, count = implementation.segment_of(
        segment, clean_rows, rows, clean_segments, segment_rows
    )
    tl.store(out_ptr + 4 * pid, branch.to(tl.int64))
    tl.store(out_ptr + 4 * pid + 1, first)
    tl.store(out_ptr + 4 * pid + 2, count.to(tl.int64))
    tl.store(out_ptr + 4 * pid + 3, start_of(first + 1, channels))


@pytest.mark.parametrize("clean", [2**25 + 3, 0, 2**26])
def test_offsets_beyond_two_to_the_31(clean: int) -> None:
    """2^33 elements: rows and element offsets are exact, and the segments tile the rows."""
    rows, channels, segment_rows = 2**26 + 11, 128, 1000
    clean_segments = -(-clean // segment_rows)
    segments = clean_segments + -(-(rows - clean) // segment_rows)
    for start in (0, max(clean_segments - 3, 0), segments - 6):
        out = torch.zeros(6, 4, dtype=torch.int64)
        _offsets_kernel[(6,)](out, start, clean, rows, clean_segments, segment_rows, channels)
        for segment, found in enumerate(out.tolist(), start):
            adv = segment >= clean_segments
            first = clean * adv + (segment - clean_segments * adv) * segment_rows
            count = min(segment_rows, (rows if adv else clean) - first)
            assert found == [int(adv), first, count, (first + 1) * channels]


@pytest.mark.parametrize("training", FLAGS)
def test_parameters_of_16_bits(training: bool) -> None:
    """As after ``model.to(bfloat16)``: the same as with the same numbers in float32."""
    norm = Norm(training=training)
    narrow = norm.make(0, torch.bfloat16)
    parameters = ("weight", "bias", "running_mean", "running_var")
    narrow |= {name: narrow[name].bfloat16() for name in parameters}
    wide = narrow | {name: narrow[name].float() for name in parameters}
    expected = norm.operation.results(wide, "triton")
    for name, value in norm.operation.results(narrow, "triton").items():
        # The buffers that the kernel moves are truncated by the interpreter, not rounded.
        rtol = 2.0**-7 if name.startswith("running") else 0
        rounded = expected[name].to(value.dtype)
        torch.testing.assert_close(value, rounded, rtol=rtol, atol=0, msg=name)
        assert value.dtype == torch.bfloat16 or name == "1"


def test_statistics_over_two_processes(tmp_path: Path) -> None:
    check_two_processes(tmp_path, "triton")
