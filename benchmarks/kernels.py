"""``python -m benchmarks.kernels``: each operation beside PyTorch, torch.compile and cuDNN.

Times are of a replayed CUDA graph that holds many calls on inputs too large for the L2 cache, so
that neither Python nor launches are measured.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from arat_fast.settings import Count
from arat_kernels.cosine_invariance import cosine_invariance
from arat_kernels.crop_flip import crop_flip, draw_crop_flip
from arat_kernels.cross_entropy_grad import cross_entropy_grad
from arat_kernels.frozen_affine import frozen_affine, relu_backward
from arat_kernels.image_parts import image_parts
from arat_kernels.implementation import Experiment, experimental
from arat_kernels.pgd_step import pgd_step, random_start
from arat_kernels.split_batch_norm import split_batch_norm
from benchmarks import harness
from benchmarks.harness import Bench, Record, alternate, command
from benchmarks.measure import free_memory, seconds
from benchmarks.table import grid, page

Function = Callable[..., Any]
EPS, ALPHA = 8 / 255, 2 / 255
BN_EPS, MOMENTUM = 1e-5, 0.1
BYTES_PER_GRAPH = 2e9
"""Inputs of all calls of a graph together: far over the L2 cache."""


class Work(NamedTuple):
    """One operation on inputs of one size.

    Attributes:
        functions: the contestants, ours first.
        inputs: arguments of each call in a graph.
        bytes_moved: the least that one call of ours reads and writes.
        tolerance: of the results on the first inputs: of their mean error relative to their mean,
            or, where ``exact``, of their largest error.
        expected: what ours is compared with; None for all with PyTorch eager.
        note: who could not take part.
    """

    functions: dict[str, Function]
    inputs: Sequence[tuple[Tensor, ...]]
    bytes_moved: float
    tolerance: float = 0.02
    exact: bool = False
    expected: Function | None = None
    note: str = ""


def contestants(
    ours: Function, eager: Function, compiled: Function | None = None
) -> dict[str, Function]:
    """Ours, PyTorch eager and torch.compile, of ``compiled`` or of the eager function."""
    compiled = torch.compile(compiled or eager, fullgraph=True)
    return {"ours": ours, "PyTorch eager": eager, "torch.compile": compiled}


def with_gradients(functions: dict[str, Function], count: int) -> dict[str, Function]:
    """Forward and the gradients of the first ``count`` arguments; the last one is upstream's."""

    def both(function: Function, *given: Tensor) -> Any:
        return torch.autograd.grad(function(*given[:-1]), given[:count], given[-1])

    return {name: partial(both, function) for name, function in functions.items()}


class Draw:
    """Random inputs on a device.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.numbers = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        """Images are channels_last."""
        x = torch.randn(shape, generator=self.numbers, device=self.device).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        return x.requires_grad_(grad)

    def images(self, *shape: int) -> Tensor:
        """Uniform in [0, 1], float32, contiguous."""
        return torch.rand(shape, generator=self.numbers, device=self.device)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Below ``high``."""
        return torch.randint(high, shape, generator=self.numbers, device=self.device, dtype=dtype)


def number_of_calls(bytes_of_inputs: float) -> int:
    """So many that their inputs are :data:`BYTES_PER_GRAPH`; at least 2, at most 500."""
    return max(2, min(500, round(BYTES_PER_GRAPH / bytes_of_inputs)))


def cosine(device: torch.device, num: int, widths: tuple[int, ...]) -> Work:
    """The cosine distance of all layers, forward and backward."""
    draw, layers = Draw(device), len(widths)

    def distances(*tensors: Tensor) -> Tensor:
        return cosine_invariance(list(tensors[:layers]), list(tensors[layers:]))

    def eager(*tensors: Tensor) -> Tensor:
        pairs = zip(tensors[:layers], tensors[layers:], strict=True)
        return torch.stack(
            [(1 - F.cosine_similarity(p.float(), t.float(), dim=1)).mean() for p, t in pairs]
        )

    inputs = [
        (
            *(draw.normal(num, width, dtype=torch.bfloat16, grad=True) for width in widths),
            *(draw.normal(num, width) for width in widths),
            draw.normal(layers),
        )
        for _ in range(50)
    ]
    # Forward: predictions and targets; backward: both again and the gradient.
    moved = num * sum(widths) * (3 * 2 + 2 * 4)
    return Work(with_gradients(contestants(distances, eager), layers), inputs, moved, 0.01)


def batch_assembly(device: torch.device, num: int) -> Work:
    """Random crop and flip out of a dataset on the device."""
    draw, padding = Draw(device), 4
    images = draw.integers(256, 50_000, 3, 32, 32, dtype=torch.uint8)
    rng = torch.tensor([1, 2], device=device)
    offsets = draw_crop_flip(rng, num, padding=padding, flip=True)

    def ours(index: Tensor) -> Tensor:
        return crop_flip(images, index, padding=padding, flip=True, rng=rng)

    def eager(index: Tensor) -> Tensor:
        """The usual gather with index tensors."""
        pixels = torch.arange(32, device=device)
        rows = pixels + offsets[:, :1]
        cols = torch.where(offsets[:, 2:] != 0, 31 - pixels, pixels) + offsets[:, 1:2]
        padded = F.pad(images[index], (padding,) * 4)
        sample = torch.arange(num, device=device)[:, None, None]
        crops = padded[sample, :, rows[:, :, None], cols[:, None, :]]
        return (crops.float() / 255).permute(0, 3, 1, 2)

    inputs = [(draw.integers(50_000, num),) for _ in range(20)]
    moved = num * 1024 * (3 + 12)
    return Work(contestants(ours, eager), inputs, moved, 1e-3, exact=True)


def parts(device: torch.device, num: int) -> Work:
    """Images as high and low bfloat16 parts."""

    def eager(x: Tensor) -> Tensor:
        high = x.bfloat16()
        low = (x - high.float()).bfloat16()
        padding = high.new_zeros(num, 2, 32, 32)
        return torch.cat([high, low, padding], 1).contiguous(memory_format=torch.channels_last)

    draw = Draw(device)
    inputs = [(draw.normal(num, 3, 32, 32),) for _ in range(20)]
    return Work(contestants(image_parts, eager), inputs, num * 1024 * (12 + 16), 1e-3, exact=True)


def loss_gradient(device: torch.device, num: int, num_classes: int) -> Work:
    """The cross-entropy and its gradient."""
    draw = Draw(device)

    def eager(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.detach().requires_grad_()
        loss = F.cross_entropy(logits.float(), target, reduction="none")
        (dlogits,) = torch.autograd.grad(loss.sum(), logits)
        return dlogits, loss.detach()

    def closed_form(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_probabilities = logits.float().log_softmax(1)
        hit = F.one_hot(target, num_classes)
        loss = -(log_probabilities * hit).sum(1)
        return (log_probabilities.exp() - hit).to(logits.dtype), loss

    inputs = [
        ((4 * draw.normal(num, num_classes)).bfloat16(), draw.integers(num_classes, num))
        for _ in range(30)
    ]
    functions = contestants(cross_entropy_grad, eager, closed_form)
    return Work(functions, inputs, num * (num_classes * 4 + 12), 0.01)


def affine(device: torch.device, shape: tuple[int, ...], backward: bool) -> Work:
    """The affine map with residual and ReLU."""
    draw = Draw(device)
    scale, shift = draw.normal(shape[1]), draw.normal(shape[1])

    def ours(x: Tensor, residual: Tensor, *_: Tensor) -> Tensor:
        return frozen_affine(x, scale, shift, residual=residual)

    def eager(x: Tensor, residual: Tensor, *_: Tensor) -> Tensor:
        factor, offset = (t.to(x.dtype).view(-1, 1, 1) for t in (scale, shift))
        return (x * factor + offset + residual).relu()

    inputs = _bf16(draw, shape, 3, leaves=2 if backward else 0)
    functions = contestants(ours, eager)
    if backward:
        functions = with_gradients(functions, 2)
    # Forward: x, residual, y; backward: dy, y, dx, the residual's gradient.
    return Work(functions, inputs, inputs[0][0].numel() * 2 * (7 if backward else 3))


def folded_backward(device: torch.device, shape: tuple[int, ...]) -> Work:
    """Two gradients of a block's output, added and masked."""

    def ours(dy: Tensor, y: Tensor, dy_skip: Tensor) -> Tensor:
        return relu_backward(dy, y, dy_skip=dy_skip)

    def eager(dy: Tensor, y: Tensor, dy_skip: Tensor) -> Tensor:
        masked: Tensor = torch.ops.aten.threshold_backward(dy + dy_skip, y, 0)
        return masked

    inputs = _bf16(Draw(device), shape, 3)
    for _, y, _ in inputs:
        y.relu_()
    return Work(contestants(ours, eager), inputs, inputs[0][0].numel() * 2 * 4)


def _bf16(
    draw: Draw, shape: Sequence[int], tensors: int, leaves: int = 0
) -> list[tuple[Tensor, ...]]:
    elements = torch.Size(shape).numel()
    return [
        tuple(draw.normal(*shape, dtype=torch.bfloat16, grad=i < leaves) for i in range(tensors))
        for _ in range(number_of_calls(2 * tensors * elements))
    ]


Norm = Literal["Linf", "L2", "L1"]


def attack_step(device: torch.device, shape: tuple[int, ...], norm: Norm) -> Work:
    """The PGD update, in place; the others as a user writes it, without the check for NaN;
    in L1 they are the reference."""
    draw = Draw(device)

    def eager(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        if norm == "L1":
            return ours(x_adv, grad, x, impl="reference")
        if norm == "Linf":
            moved = x_adv + ALPHA * grad.sign()
            moved = torch.minimum(torch.maximum(moved, x - EPS), x + EPS)
        else:
            lengths = torch.linalg.vector_norm(grad, dim=(1, 2, 3), keepdim=True)
            delta = x_adv + ALPHA * grad / lengths.clamp_min(1e-12) - x
            lengths = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
            moved = x + delta * (EPS / lengths.clamp_min(1e-12)).clamp_max(1)
        return x_adv.copy_(moved.clamp(0, 1))

    elements = torch.Size(shape).numel()
    images = partial(draw.images, *shape)
    inputs = [(images(), images() - 0.5, images()) for _ in range(number_of_calls(12 * elements))]
    ours = partial(pgd_step, eps=EPS, alpha=ALPHA, norm=norm)
    return Work(contestants(ours, eager), inputs, 4 * 4 * elements, 1e-5, exact=True)


def start(device: torch.device, shape: tuple[int, ...], norm: Norm) -> Work:
    """The attack's random start."""
    draw, rng = Draw(device), torch.tensor([1, 2], device=device)

    def eager(x: Tensor) -> Any:
        if norm == "Linf":
            return x + torch.empty_like(x).uniform_(-EPS, EPS)
        delta = torch.randn_like(x)
        lengths = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        return x + delta * (EPS * torch.rand_like(lengths) / lengths)

    elements = torch.Size(shape).numel()
    inputs = [(draw.images(*shape),) for _ in range(number_of_calls(4 * elements))]
    ours = partial(random_start, rng=rng, eps=EPS, norm=norm)
    functions: dict[str, Function] = {"ours": ours, "PyTorch eager": eager}
    reference = partial(ours, impl="reference")
    return Work(functions, inputs, 2 * 4 * elements, 1e-5, exact=True, expected=reference)


def batch_norm(device: torch.device, shape: tuple[int, ...], backward: bool) -> Work:
    """Both halves of a batch of 2 N with batch statistics, residual and ReLU."""
    half = shape[0] // 2

    def ours(*given: Tensor) -> Tensor:
        x, residual, weight, bias, mean, var = given[:6]
        return split_batch_norm(
            *(x, weight, bias, mean, var, (half, half)),
            training=True,
            momentum=MOMENTUM,
            eps=BN_EPS,
            residual=residual,
            relu=True,
        )

    def eager(*given: Tensor) -> Tensor:
        x, residual, weight, bias, mean, var = given[:6]
        parts = [
            F.batch_norm(x[rows], mean[i], var[i], weight[i], bias[i], True, MOMENTUM, BN_EPS)
            for i, rows in enumerate((slice(half), slice(half, None)))
        ]
        return (torch.cat(parts) + residual).relu()

    inputs = _batch_norm_inputs(device, shape)
    functions, note = contestants(ours, eager), ""
    # Forward: x twice, residual, y and one bit for the mask. Backward: dy, x, mask, the residual's
    # gradient written and read again, x, dx.
    moved = 4 * 2 + 1 / 8 + (6 * 2 + 1 / 8 if backward else 0)
    if backward:
        functions = with_gradients(functions, 4)
    elif importlib.util.find_spec("cudnn") is None:
        note = "nvidia-cudnn-frontend is not installed"
    else:
        import cudnn  # type: ignore[import-not-found,unused-ignore]  # not everywhere

        try:
            functions["cuDNN fused"] = cudnn_forward(inputs[0][0])
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            note = str(error)
    return Work(functions, inputs, inputs[0][0].numel() * moved, note=note)


def another_launch(device: torch.device, shape: tuple[int, ...], way: Experiment) -> Work:
    """:func:`batch_norm` with its gradients, launched in another way, beside the usual one."""
    work = batch_norm(device, shape, backward=True)
    usual = work.functions["ours"]

    def ours(*given: Tensor) -> Any:
        with experimental(way):
            return usual(*given)

    eager = work.functions["PyTorch eager"]
    functions = {"ours": ours, "ours as usual": usual, "PyTorch eager": eager}
    # Forward: x, residual, y and the mask. Backward: dy, x, mask, dx and the residual's gradient.
    moved = work.inputs[0][0].numel() * (7 * 2 + 2 / 8) if way == "one_pass" else work.bytes_moved
    return work._replace(functions=functions, bytes_moved=moved)


def frozen_batch_norm(device: torch.device, shape: tuple[int, ...]) -> Work:
    """The attack on running statistics: gradients of input and residual only."""

    def ours(*given: Tensor) -> Tensor:
        x, residual, weight, bias, mean, var = given
        sizes = 0, len(x)
        return split_batch_norm(
            x, weight, bias, mean, var, sizes, training=False, residual=residual, relu=True
        )

    def eager(*given: Tensor) -> Tensor:
        x, residual, weight, bias, mean, var = given
        normalised = F.batch_norm(x, mean[1], var[1], weight[1], bias[1], False)
        return (normalised + residual).relu()

    inputs = _batch_norm_inputs(device, shape)
    # Forward: x, residual, y and the mask; backward: dy, mask, dx and the residual's gradient.
    moved = inputs[0][0].numel() * (6 * 2 + 2 / 8)
    return Work(with_gradients(contestants(ours, eager), 2), inputs, moved)


def _batch_norm_inputs(device: torch.device, shape: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """x, residual, weight, bias, running mean and variance, and the upstream gradient."""
    draw = Draw(device)
    image = partial(draw.normal, *shape, dtype=torch.bfloat16)
    channels = partial(draw.normal, 2, shape[1])
    return [
        (
            *(image(grad=True), image(grad=True), channels(grad=True), channels(grad=True)),
            *(channels(), channels().abs() + 0.5, image()),
        )
        for _ in range(number_of_calls(6 * torch.Size(shape).numel()))
    ]


def cudnn_forward(like: Tensor) -> Function:
    """cuDNN's BatchNorm + add + ReLU for inputs like this one, one call per half."""
    import cudnn

    handle, kinds = cudnn.create_handle(), cudnn.data_type
    half, channels, height, width = like.shape[0] // 2, *like.shape[1:]
    image = {
        "dim": [half, channels, height, width],
        "stride": [channels * height * width, 1, width * channels, channels],
        "data_type": kinds.BFLOAT16,
    }
    per_channel = {"dim": [1, channels, 1, 1], "stride": [channels, 1, channels, channels]}
    number = {"dim": [1] * 4, "stride": [1] * 4, "is_pass_by_value": True}
    graph = cudnn.pygraph(
        io_data_type=kinds.BFLOAT16,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
        handle=handle,
    )
    x, residual = (graph.tensor(name=name, **image) for name in ("x", "residual"))
    scale, bias, mean, var = (
        graph.tensor(name=name, data_type=kinds.FLOAT, **per_channel)
        for name in ("scale", "bias", "mean", "var")
    )
    epsilon, momentum = (
        graph.tensor(name=name, data_type=kinds.FLOAT, **number) for name in ("epsilon", "momentum")
    )
    normalised, saved_mean, saved_rstd, next_mean, next_var = graph.batchnorm(
        name="batchnorm",
        input=x,
        scale=scale,
        bias=bias,
        in_running_mean=mean,
        in_running_var=var,
        epsilon=epsilon,
        momentum=momentum,
    )
    y = graph.relu(name="relu", input=graph.add(name="add", a=normalised, b=residual))
    y.set_output(True).set_data_type(kinds.BFLOAT16)
    for statistic in (saved_mean, saved_rstd, next_mean, next_var):
        statistic.set_output(True).set_data_type(kinds.FLOAT)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(graph.get_workspace_size(), device=like.device, dtype=torch.uint8)
    constants = {
        epsilon: torch.full((1,) * 4, BN_EPS),
        momentum: torch.full((1,) * 4, MOMENTUM),
        saved_mean: torch.empty(1, channels, 1, 1, device=like.device),
        saved_rstd: torch.empty(1, channels, 1, 1, device=like.device),
    }
    out = torch.empty_like(like, memory_format=torch.channels_last)

    def fused(*tensors: Tensor) -> Tensor:
        given = [tensor.detach() for tensor in tensors[:6]]
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        for row in range(2):
            part = slice(row * half, (row + 1) * half)
            pack = {x: given[0][part], residual: given[1][part], y: out[part]}
            pack |= {scale: given[2][row], bias: given[3][row]}
            pack |= {mean: given[4][row], var: given[5][row]}
            pack |= {next_mean: given[4][row], next_var: given[5][row]}
            graph.execute(constants | pack, workspace, handle=handle)
        return out

    return fused


# Stages of ResNet-18 and WRN-34-10 on 32 x 32 images; of the former two batches side by side.
STAGES = ((64, 32, 32), (128, 16, 16), (512, 4, 4))
AFFINE = (*((512, *stage) for stage in STAGES), (256, 160, 32, 32))
BATCH_NORM = (*((1024, *stage) for stage in STAGES), (512, 160, 32, 32), (512, 640, 8, 8))
IMAGES = ((512, 3, 32, 32), (4096, 3, 32, 32), (128, 3, 224, 224))
NORMS: tuple[Norm, ...] = ("Linf", "L2", "L1")
WAYS: tuple[Experiment, ...] = get_args(Experiment)
OPERATIONS: dict[str, list[partial[Work]]] = {
    "cosine_invariance": [
        partial(cosine, num=128, widths=(512,) * 4),
        partial(cosine, num=512, widths=(512,) * 4),
        partial(cosine, num=512, widths=(320,) + (640,) * 10),
    ],
    "crop_flip": [partial(batch_assembly, num=num) for num in (512, 4096)],
    "image_parts": [partial(parts, num=num) for num in (512, 4096)],
    "cross_entropy_grad": [
        partial(loss_gradient, num=num, num_classes=num_classes)
        for num, num_classes in ((128, 10), (512, 10), (512, 1000), (16_384, 1000))
    ],
    "frozen_affine": [
        *(partial(affine, shape=s, backward=b) for b in (False, True) for s in AFFINE),
        *(partial(folded_backward, shape=shape) for shape in AFFINE),
    ],
    "pgd_step": [
        partial(function, shape=shape, norm=norm)
        for function, norms in ((attack_step, NORMS), (start, NORMS[:2]))
        for norm in norms
        for shape in IMAGES
    ],
    "split_batch_norm": [
        *(partial(batch_norm, shape=s, backward=b) for b in (False, True) for s in BATCH_NORM),
        partial(frozen_batch_norm, shape=BATCH_NORM[0]),
        *(
            partial(another_launch, shape=(256, *stage), way=way)
            for way in WAYS
            for stage in STAGES
        ),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Options(harness.Options):
    """Time each operation of arat_kernels on a GPU beside what it replaces."""

    operations: tuple[str, ...] = tuple(OPERATIONS)
    """Names of the operations."""
    rounds: Count = 15
    """Turns of each contestant, of which the median counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.operations:
            if name not in OPERATIONS:
                raise ValueError(
                    f"unknown operation {name!r}, expected some of {', '.join(OPERATIONS)}"
                )


def run(options: Options) -> int:
    """Measure, print the table, and write JSON and Markdown.

    Returns:
        0, or 1 if a contestant failed or was wrong.

    Raises:
        ValueError: the device is no GPU.
    """
    bench = Bench("kernels", options, table)
    if bench.device.type != "cuda":
        raise ValueError(f"the kernels run on a GPU, got device {bench.device}")
    bench.record["settings"] = {"rounds": options.rounds}
    bench.measure_rates()
    for operation in options.operations:
        for case in OPERATIONS[operation]:
            hopper = torch.cuda.get_device_capability(bench.device) >= (9, 0)
            if case.keywords.get("way") == "dependent_launch" and not hopper:
                continue
            keywords = ", ".join(f"{name}={value}" for name, value in case.keywords.items())
            name = f"{case.func.__name__}({keywords})"
            bench.say(f"{operation}  {name}")
            with bench.guarded(name):
                bench.record["results"].append(
                    {"operation": operation, "case": name, **measure(bench, case(bench.device))}
                )
            free_memory(bench.device)
            bench.save()
    return bench.finish()


def measure(bench: Bench[Any], work: Work) -> Record:
    """Time the contestants of one operation, which take turns.

    Raises:
        ValueError: one computes something else, so that its time would mean nothing.
        RuntimeError: one failed.
    """
    torch.compiler.reset()
    check(work)
    device, number = bench.device, len(work.inputs)
    calls: dict[str, Callable[[], float]] = {}
    for name, function in work.functions.items():
        repeated = replayable([partial(function, *given) for given in work.inputs], device)
        calls[name] = partial(_seconds_per_call, repeated, number, device)
    times, failures = alternate(calls, bench.options.rounds)
    for name, failed in failures.items():
        raise RuntimeError(f"{name}: {failed['reason']}")
    (_, ours), *others = ((name, statistics.median(values)) for name, values in times.items())
    rate = work.bytes_moved / ours
    cached = device.type == "cuda" and number * work.bytes_moved < 4 * _l2_bytes(device)
    bandwidth = bench.record["rates"]["copy_bytes_per_second"]
    return {
        "status": "measured",
        "bytes_moved": work.bytes_moved,
        "seconds_per_call": ours,
        "round_seconds_per_call": times,
        "bytes_per_second": rate,
        # Of less than four times what the L2 cache holds, part never comes from memory.
        "share_of_copy_bandwidth": None if cached else rate / bandwidth,
        "speed_up": {name: value / ours for name, value in others},
        "note": work.note,
    }


def check(work: Work) -> None:
    """Raise a ValueError where a contestant computes something else on the first inputs."""

    def result(function: Function) -> list[Tensor]:
        given = [t.detach().clone().requires_grad_(t.requires_grad) for t in work.inputs[0]]
        found = function(*given)
        found = [found] if isinstance(found, Tensor) else list(found)
        return [tensor.detach().float().clone() for tensor in found]

    ours, *_ = checked = list(work.functions)
    expected = result(work.expected or work.functions["PyTorch eager"])
    for name in checked if work.expected is None else [ours]:
        for got, value in zip(result(work.functions[name]), expected, strict=True):
            difference = (got - value).abs()
            error = difference.max() if work.exact else difference.mean() / value.abs().mean()
            if not error < work.tolerance:
                raise ValueError(f"{name} is off by {error:.3g}, its time would mean nothing")


def replayable(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """One CUDA graph with all ``calls``, warm; on the CPU the calls themselves."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's constructor
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def _seconds_per_call(calls: Callable[[], object], number: int, device: torch.device) -> float:
    return seconds(calls, device) / number


def _l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def table(record: Record) -> str:
    """The record for people to read."""
    rows = []
    for entry in record["results"]:
        share = entry["share_of_copy_bandwidth"]
        rows.append(
            [
                entry["operation"],
                entry["case"],
                f"{entry['seconds_per_call'] * 1e6:.1f}",
                f"{entry['bytes_per_second'] / 1e12:.2f}",
                "in the L2" if share is None else f"{share:.0%}",
                ", ".join(f"{name} {value:.2f}×" for name, value in entry["speed_up"].items()),
            ]
        )
    head = ["operation", "case", "µs per call", "TB/s", "share of copy", "speed-up over"]
    notes = sorted({entry["note"] for entry in record["results"]} - {""})
    told = [f"cuDNN's fused BatchNorm did not take part: {'; '.join(notes)}."] if notes else []
    return page("Kernels", record, grid(head, rows), told)


if __name__ == "__main__":
    sys.exit(command(Options, run, "kernels"))
