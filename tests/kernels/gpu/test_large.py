"""Tensors of more than 2^31 elements on real hardware: the end of the batch, where an offset of 32
bits is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels.support import EPS_OF
from torch import Tensor

from arat_kernels.checks import (
    ALPHA,
    EPS,
    SLACK,
    Operation,
    Tensors,
    affine,
    classes,
    crops,
    randn,
    start,
    step,
)
from arat_kernels.cosine_invariance import cosine_invariance
from arat_kernels.split_batch_norm import split_batch_norm

pytestmark = pytest.mark.gpu

ROUNDING = EPS_OF[torch.bfloat16] / 2


@pytest.fixture(autouse=True)
def memory() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free GPU memory, got {free / 2**30:.0f}")


def normal(shape: tuple[int, ...], layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Eighths, normally distributed, in bfloat16."""
    numbers = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout)
    assert x.numel() > 2**31
    for part in x.split(len(x) // 64):
        part.normal_(generator=numbers).mul_(8).round_().div_(8)
    return x


def images(layout: torch.memory_format) -> Callable[[], Tensors]:
    def make() -> Tensors:
        scale = torch.arange(1, 65, device="cuda").remainder(4).add(1) / 2
        # Off all sums of the others, so that rounding does not decide what ReLU does.
        shift = (randn((64,), 0).mul(8).round() / 8 + 0.03125).to("cuda")
        return {"x": normal((2**13 + 3, 64, 64, 64), layout), "scale": scale, "shift": shift}

    return make


def logits() -> Tensors:
    given = normal((2**21 + 7, 1024))
    return {"logits": given, "target": torch.arange(len(given), device="cuda") % 1024}


def steps() -> Tensors:
    grad = normal((2**19 + 3, 4096))
    x = torch.full(grad.shape, 0.5, device="cuda")
    rng = torch.tensor([1, 2], device="cuda")
    return {"x_adv": x + EPS / 2, "grad": grad, "x": x, "rng": rng}


def batch() -> Tensors:
    stored = torch.empty(700_000, 3, 32, 32, dtype=torch.uint8, device="cuda")
    assert stored.numel() > 2**31
    for part in stored.split(2**14):
        part.random_(0, 256)
    index = torch.arange(len(stored), device="cuda")
    return {"images": stored, "index": index, "rng": torch.tensor([1, 2], device="cuda")}


LAST = 2
OPERATIONS: dict[str, tuple[Callable[[int], Operation], Callable[[], Tensors], float, float]] = {
    # A multiply-add that rounds once may round to the next bfloat16.
    "frozen_affine": (
        lambda _: affine(), images(torch.contiguous_format), 2 * ROUNDING, 1e-6
    ),
    "frozen_affine-nhwc": (
        lambda _: affine(), images(torch.channels_last), 2 * ROUNDING, 1e-6
    ),
    "cross_entropy_grad": (lambda _: classes(), logits, ROUNDING, 1e-5),
    "pgd_step": (lambda _: step(), steps, 0, 4 * SLACK),
    "pgd_step-L2": (lambda _: step("L2", EPS, ALPHA), steps, 0, 4 * SLACK),
    "pgd_step-L1": (lambda _: step("L1", EPS, ALPHA), steps, 0, 8 * SLACK),
    "random_start": (lambda first: start(first=first), steps, 0, 2 * SLACK),
    "random_start-L2": (lambda first: start("L2", first=first), steps, 0, 1e-5),
    "crop_flip": (
        lambda _: crops(rng=None, padding=0, flip=False, dtype=torch.bfloat16), batch, 0, 0
    ),
}  # fmt: skip


def outputs(operation: Operation, tensors: Tensors, impl: str) -> list[Tensor]:
    """What the call returns and, of the affine map, the gradient for y itself."""
    out = operation.call(tensors, impl)  # type: ignore[arg-type]  # a name that tests choose
    found = [out] if isinstance(out, Tensor) else list(out)
    if "scale" in tensors:
        found += torch.autograd.grad(found[0], tensors["x"], found[0].detach())
    return [t.detach() for t in found]


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_end_of_a_batch(name: str) -> None:
    operation, make, rtol, atol = OPERATIONS[name]
    tensors = make()
    whole = ("scale", "shift", "rng", "images")
    tail = {key: t if key in whole else t[-LAST:].clone() for key, t in tensors.items()}
    if name.startswith("cross"):
        tail["logits"] = tail["logits"].float()
    if "scale" in tensors:
        for given in (tensors, tail):
            given["x"].requires_grad_()
    num = len(next(iter(tensors.values())))
    expected = outputs(operation(num - LAST), tail, "reference")
    for got, value in zip(outputs(operation(0), tensors, "triton"), expected, strict=True):
        assert got.numel() > 2**31 or got.ndim == 1
        torch.testing.assert_close(got[-LAST:].to(value.dtype), value, rtol=rtol, atol=atol)


def test_cosine_invariance() -> None:
    num, width = 2**20 + 5, 2048
    p, t = normal((num, width)), normal((num, width)).roll(1, 0)
    t[-1000:] += p[-1000:]
    p.requires_grad_()
    out = cosine_invariance([p], [t], impl="triton")
    dout = torch.tensor([3.0 * num], device="cuda")
    (dp,) = torch.autograd.grad(out, p, dout)
    sums = [
        cosine_invariance([a.detach().double()], [b.double()], impl="reference") * len(a)
        for a, b in zip(p.split(2**16), t.split(2**16), strict=True)
    ]
    torch.testing.assert_close(out.double(), sum(sums) / num, rtol=1e-5, atol=1e-6)
    tail = p[-8:].detach().double().requires_grad_()
    tail_out = cosine_invariance([tail], [t[-8:].double()], impl="reference")
    (expected,) = torch.autograd.grad(tail_out, tail, dout.double() * 8 / num)
    # Rounded once to bfloat16, after float32 arithmetic on numbers of size 0.1.
    torch.testing.assert_close(dp[-8:].double(), expected, rtol=ROUNDING, atol=1e-6)


def test_split_batch_norm() -> None:
    n, channels, area = 1032, 512, (64, 64)
    x = normal((n, channels, *area), torch.channels_last)
    for i, sample in enumerate(x):
        sample.add_(i / n)
    x.requires_grad_()
    buffers = torch.zeros(2, channels, device="cuda"), torch.ones(2, channels, device="cuda")
    y = split_batch_norm(
        x, None, None, *buffers, (500, 532), training=True, momentum=1.0, relu=True
    )
    dy = x.detach().roll(1, 0)
    (dx,) = torch.autograd.grad(y, x, dy)
    last = range(500, n)

    def normalised(i: int) -> Tensor:
        return (x[i].detach().double() - mean[:, None, None]) * rstd

    def masked(i: int) -> Tensor:
        return dy[i].double() * (y[i] > 0)

    mean = sum(x[i].detach().double().mean((1, 2)) for i in last) / len(last)
    centred = (x[i].detach().double() - mean[:, None, None] for i in last)
    var = sum(part.square().mean((1, 2)) for part in centred) / len(last)
    torch.testing.assert_close(buffers[0][1].double(), mean, rtol=1e-4, atol=1e-6)
    rstd = (var + 1e-5).rsqrt()[:, None, None]
    # Results are rounded once; before that, the tolerance of the mean moves numbers of size 1.
    for i in (500, n - 1):
        torch.testing.assert_close(y[i].double(), normalised(i).relu(), rtol=ROUNDING, atol=1e-4)
    dbias, dweight = (
        sum(part.mean((1, 2)) for part in parts)[:, None, None] / len(last)
        for parts in (
            (masked(i) for i in last),
            (masked(i) * normalised(i) for i in last),
        )
    )
    expected = rstd * (masked(n - 1) - dbias - normalised(n - 1) * dweight)
    torch.testing.assert_close(dx[n - 1].double(), expected, rtol=ROUNDING, atol=1e-4)
