"""What each layer of a step should cost, and what it does cost."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from arat_fast.models.layers import StemConv2d
from arat_fast.models.split_batch_norm import SplitBatchNorm2d, use_branch, use_statistics
from arat_fast.models.wide_resnet import PreActBlock
from benchmarks.measure import seconds
from benchmarks.workload import RESNETS, Workload


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of one pass over a layer."""

    flops: float = 0.0
    bytes: float = 0.0

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The longer of computing and moving, each at its full rate."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


class _Addition(nn.Module):
    """The residual addition of a pre-activation block, which no other layer carries."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


@dataclass
class Layer:
    """Layers of a network that do the same work.

    Attributes:
        name: operation, channels and size.
        kind: "convolution", "BatchNorm", "addition", "linear" or "pool".
        module: one of them.
        arguments: of its call, tensors replaced by their shape.
        count: number of them.
        is_stem: sees the image: no gradient of it is needed in training.
    """

    name: str
    kind: str
    module: nn.Module
    arguments: tuple[Any, ...]
    output_shape: torch.Size
    count: int = 1
    is_stem: bool = False
    paths: list[str] = field(default_factory=list)

    def forward(self, samples: int, element: int) -> Cost:
        """Of ``samples`` images, with activations of ``element`` bytes each."""
        x, y, weights = self._sizes(samples)
        if self.kind == "BatchNorm":
            # Statistics and normalisation read x once each; the residual is read once.
            return Cost(0.0, element * (2 * x + self._residual * x + y))
        if self.kind == "addition":
            return Cost(0.0, element * 3 * y)
        return Cost(self._flops(samples), element * (x + y + weights))

    def input_gradient(self, samples: int, element: int) -> Cost:
        x, y, weights = self._sizes(samples)
        if self.kind == "BatchNorm":
            # Sums and gradient read dy and x once each; the residual gets a gradient of its own.
            return Cost(0.0, element * (2 * (x + y) + x + self._residual * x))
        if self.kind == "addition":
            # The gradients that come back on both ways are added.
            return Cost(0.0, element * 3 * y)
        return Cost(self._flops(samples), element * (x + y + weights))

    def weight_gradient(self, samples: int, element: int) -> Cost:
        if self.kind in ("BatchNorm", "addition", "pool"):
            # The sums that the input's gradient needs are the weight's gradient.
            return Cost()
        x, y, weights = self._sizes(samples)
        return Cost(self._flops(samples), element * (x + y + weights))

    @property
    def _residual(self) -> bool:
        return (
            self.kind == "BatchNorm" and sum(isinstance(a, torch.Size) for a in self.arguments) > 1
        )

    def _sizes(self, samples: int) -> tuple[int, int, int]:
        """Elements of input, output and weights."""
        x = samples * self.arguments[0][1:].numel()
        y = samples * self.output_shape[1:].numel()
        return x, y, sum(p.numel() for p in self.module.parameters())

    def _flops(self, samples: int) -> float:
        if isinstance(self.module, nn.Conv2d):
            taps = self.module.weight[0].numel()
        elif isinstance(self.module, nn.Linear):
            taps = self.module.in_features
        else:
            return 0.0
        return 2.0 * taps * samples * self.output_shape[1:].numel()


def network_layers(workload: Workload) -> list[Layer]:
    """Convolutions, BatchNorms, pooling and the classifier of our network, in order, on the meta
    device; what does the same work is one entry."""
    with torch.device("meta"):
        network = workload.network().eval()
        images = torch.empty(2, *workload.image_shape)
    found: dict[tuple[str, bool], Layer] = {}
    handles = []
    kinds = (nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d, SplitBatchNorm2d, PreActBlock)
    for path, module in network.named_modules():
        if isinstance(module, kinds):
            handles.append(module.register_forward_hook(_recorder(found, path), with_kwargs=True))
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return list(found.values())


def _recorder(
    found: dict[tuple[str, bool], Layer], path: str
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
    def record(
        module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Tensor
    ) -> None:
        if isinstance(module, SplitBatchNorm2d):
            given = dict(zip(("x", "residual", "relu"), inputs, strict=False)) | keywords
            inputs = given["x"], given.get("residual"), given.get("relu", False)
        arguments = tuple(a.shape if isinstance(a, Tensor) else a for a in inputs)
        if isinstance(module, PreActBlock):
            module, arguments = _Addition(), (output.shape, output.shape)
        kind, name = _describe(module, arguments, output)
        is_stem = not found
        layer = found.get((name, is_stem))
        if layer is None:
            layer = Layer(name, kind, module, arguments, output.shape, 0, is_stem)
            found[name, is_stem] = layer
        layer.count += 1
        layer.paths.append(path)

    return record


def _describe(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> tuple[str, str]:
    size = "×".join(str(n) for n in arguments[0][2:])
    if isinstance(module, nn.Conv2d):
        kernel = "×".join(str(k) for k in module.kernel_size)
        stride = f" /{module.stride[0]}" if module.stride[0] != 1 else ""
        channels = f"{module.in_channels} → {module.out_channels}"
        return "convolution", f"conv {kernel}{stride}, {channels}, {size}"
    if isinstance(module, SplitBatchNorm2d):
        extra = " + add" if isinstance(arguments[1], torch.Size) else ""
        extra += " + ReLU" if arguments[2] else ""
        return "BatchNorm", f"split BN{extra}, {module.num_features}, {size}"
    if isinstance(module, nn.Linear):
        return "linear", f"linear {module.in_features} → {module.out_features}"
    if isinstance(module, _Addition):
        return "addition", f"addition, {arguments[0][1]}, {size}"
    return "pool", f"average pool, {arguments[0][1]}, {size}"


def predict(
    layer: Layer,
    workload: Workload,
    flops_per_second: float,
    bytes_per_second: float,
    element: int,
) -> dict[str, float]:
    """Seconds that all layers of an entry take in one step at these rates.

    Returns:
        "attack": all steps of the attack, statistics of the batch; "attack_folded": the same with
        running statistics, folded into the convolutions; "train": the forward and backward pass of
        both halves.
    """
    rates = flops_per_second, bytes_per_second
    batch = workload.batch_size
    attack = layer.forward(batch, element).seconds(*rates)
    attack += layer.input_gradient(batch, element).seconds(*rates)
    train = layer.forward(2 * batch, element).seconds(*rates)
    train += layer.weight_gradient(2 * batch, element).seconds(*rates)
    if not layer.is_stem:
        train += layer.input_gradient(2 * batch, element).seconds(*rates)
    folded = attack
    if layer.kind == "BatchNorm":
        folded = _folded(layer, workload, element).seconds(*rates)
    times = layer.count * workload.num_steps
    return {
        "attack": times * attack,
        "attack_folded": times * folded,
        "train": layer.count * train,
    }


def _folded(layer: Layer, workload: Workload, element: int) -> Cost:
    """Of one BatchNorm with running statistics, forward and backward in the attack."""
    if workload.model in RESNETS:
        # All in the epilogues of the convolutions, which have the bandwidth to spare.
        return Cost()
    # Only a BatchNorm behind a convolution folds: bn2 of each block. The others read and write on
    # the way forth, and on the way back read the gradient and the ReLU's mask and write.
    behind_addition = sum(not path.endswith("bn2") for path in layer.paths) / layer.count
    size = workload.batch_size * layer.arguments[0][1:].numel()
    return Cost(0.0, element * 5 * size * behind_addition)


def roofline(
    workload: Workload,
    device: torch.device,
    rates: dict[str, Any],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Predicted and measured seconds per step, layer by layer.

    Every layer is measured by itself, on random inputs of the step's shapes, dtype and layout that
    the caches may hold; on a GPU as a replayed CUDA graph, without launches.

    Args:
        workload: the step.
        device: where.
        rates: of this run, from :func:`benchmarks.machine.rates`.
        dtype: of activations.

    Returns:
        "layers": name, count, and predicted and measured seconds of all of them per step;
        "predicted" and "predicted_folded": their sums, the step's bounds; "measured": the sum.
    """
    element = torch.empty((), dtype=dtype).element_size()
    speeds = rates["matmul_flops_per_second"], rates["copy_bytes_per_second"]
    rows = []
    for layer in network_layers(workload):
        expected = predict(layer, workload, *speeds, element)
        attack, train = measure_layer(layer, workload.batch_size, device, dtype)
        measured = {
            "attack": layer.count * workload.num_steps * attack,
            "train": layer.count * train,
        }
        rows.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "count": layer.count,
                "predicted": expected,
                "measured": measured,
            }
        )
    return {
        "workload": dataclasses.asdict(workload),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": rows,
        **totals(rows),
    }


def totals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The sums over all layers: bounds of the step, and what the layers took."""
    return {
        "predicted": sum(r["predicted"]["attack"] + r["predicted"]["train"] for r in rows),
        "predicted_folded": sum(
            r["predicted"]["attack_folded"] + r["predicted"]["train"] for r in rows
        ),
        "measured": sum(r["measured"]["attack"] + r["measured"]["train"] for r in rows),
    }


def measure_layer(
    layer: Layer, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of one such layer: forward and input gradient of ``batch`` samples as in the attack,
    and forward and backward of twice as many as in training."""
    module = copy.deepcopy(layer.module).to_empty(device=device).train()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(1) if tensor.ndim < 2 or layer.kind == "BatchNorm" else tensor.normal_()
    is_float32 = isinstance(module, (StemConv2d, SplitBatchNorm2d))
    if layer.kind == "convolution":
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    if not is_float32:
        module.to(dtype)

    def inputs(samples: int) -> tuple[Any, ...]:
        kind = torch.float32 if isinstance(module, StemConv2d) else dtype
        return tuple(
            _random((samples, *a[1:]), device, kind) if isinstance(a, torch.Size) else a
            for a in layer.arguments
        )

    def call(arguments: tuple[Any, ...]) -> Tensor:
        result: Tensor = module(*arguments)
        return result

    with torch.autocast(device.type, dtype, enabled=is_float32 and dtype != torch.float32):
        arguments = inputs(batch)
        with use_branch(module, "adv"), use_statistics(module, "batch"):
            attack = _time(call, arguments, [], device)
        arguments = inputs(2 * batch)
        if layer.is_stem:
            arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        with use_branch(module, "both"):
            train = _time(call, arguments, list(module.parameters()), device)
    return attack, train


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, device=device).to(dtype)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def _time(
    call: Callable[[tuple[Any, ...]], Tensor],
    arguments: tuple[Any, ...],
    parameters: list[nn.Parameter],
    device: torch.device,
) -> float:
    """Seconds of a forward pass and of the gradients of tensor arguments and parameters."""
    wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad] + parameters
    with torch.no_grad():
        upstream = torch.randn_like(call(arguments))

    def once() -> None:
        torch.autograd.grad(call(arguments), wanted, upstream)

    repeats = 1
    run: Callable[[], object] = once
    if device.type == "cuda":
        repeats = 10
        run = _captured(once, repeats)
    times = [seconds(run, device) for _ in range(4)]
    return statistics.median(times[1:]) / repeats


def _captured(call: Callable[[], None], repeats: int) -> Callable[[], None]:
    """A CUDA graph of ``repeats`` calls, after warming up."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's constructor
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay
