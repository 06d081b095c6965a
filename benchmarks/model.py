"""``python -m benchmarks.model``: what a training step launches, moves and computes on a GPU, and
the least time that it can take there; from shapes, on a machine without one.

The step runs on tensors without memory (:class:`FakeTensorMode`) that say that they are on a GPU:
what is recorded are the operations of the GPU's path, kernels of ``arat_kernels`` and ATen's, each
of which reads and writes what it is given once. Left out: cuDNN's helpers, the gain of tensors that
stay in the L2, and launches that a multi-tensor operation is cut into.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import tyro
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from arat_fast.models.folding import FoldedNetwork
from arat_fast.models.layers import split_stems
from arat_fast.models.registry import model_spec
from arat_fast.objectives import ARAT
from arat_fast.training.rounding import rounded_weights
from arat_fast.training.step import TrainStep
from arat_kernels.implementation import experimental
from arat_kernels.split_batch_norm import one_pass
from benchmarks.workload import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Workload, forward_flops

# The first that is found in an operation's name decides.
KINDS = (
    ("convolution, forward", "conv_forward"),
    ("convolution, gradients", "conv_input", "conv_weight"),
    ("BN in one pass", "one_pass"),
    ("BN statistics", "batch_norm_statistics", "sum_statistics"),
    ("BN normalise", "split_batch_norm_normalize"),
    ("BN backward sums", "backward_sums"),
    ("BN backward input", "split_batch_norm_backward_input"),
    ("frozen affine", "frozen_affine"),
    ("attack: images, update, start", "image_parts", "pgd_step", "random_start"),
    ("optimiser", "_fused_"),
    ("casts, copies, fills", "_to_copy", "copy_", "clone", "cat", "stack", "zeros", "ones_like"),
    ("losses and heads", "cross_entropy", "cosine", "nll", "softmax", "mm", "mean", "native_batch"),
)
_CUDNN = (
    torch.ops.aten.cudnn_convolution_relu.default,
    torch.ops.aten.cudnn_convolution_add_relu.default,
)
# They make or describe memory, or give a view that the tags of PyTorch do not call one.
_FREE = ("empty", "new_empty", "detach", "_unsafe_view", "device", "_record_function")


class Node(NamedTuple):
    """One launch: its operation, bytes read and written, FLOPs."""

    name: str
    bytes: int
    flops: int = 0

    @property
    def kind(self) -> str:
        return next((k for k, *names in KINDS if any(n in self.name for n in names)), "elementwise")


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.nodes: list[Node] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        if func in _CUDNN:
            # ReLU's place is its input: the result has the convolution's shape and layout.
            x, weight, *_, stride, padding, dilation, groups = args
            geometry = (stride, padding, dilation, False, [0, 0], groups)
            with self._paused():
                out = torch.ops.aten.convolution(x, weight, None, *geometry)
            self._add("conv_forward", (args, out), _convolution_flops(out, weight))
            return out
        out = func(*args, **kwargs)
        if func.is_view or any(name.startswith(free) for free in _FREE):
            return out
        if name == "convolution":
            self._add("conv_forward", (args, out), _convolution_flops(out, args[1]))
        elif name == "convolution_backward":
            dy, x, weight = args[:3]
            work = _convolution_flops(dy, weight)
            for wanted, part, others in zip(
                args[-1],
                ("conv_input", "conv_weight", "bias"),
                ((weight,), (x,), ()),
                strict=True,
            ):
                if wanted:
                    self._add(part, (dy, others, out[0 if part == "conv_input" else 1]), work)
        else:
            written = [
                value
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None
                and argument.alias_info.is_write
                and value is not out
            ]
            flops = 0
            if name in ("mm", "addmm", "bmm", "baddbmm"):
                left = args[1] if "add" in name else args[0]
                flops = 2 * out.numel() * left.shape[-1]
            # What a copy writes, it does not read.
            read = args[1:] if name in ("copy_", "_foreach_copy_") else args
            self._add(
                name, (read, [v for k, v in kwargs.items() if k != "out"], out, written), flops
            )
        return out

    def _add(self, name: str, values: Any, flops: int) -> None:
        tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
        self.nodes.append(Node(name, sum(map(_bytes, tensors)), flops))

    @contextmanager
    def _paused(self) -> Iterator[None]:
        kept = list(self.nodes)
        yield
        self.nodes[:] = kept


def _bytes(t: Tensor) -> int:
    """Of the elements that there are in memory: an expanded tensor is one row."""
    sizes = (size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)
    return prod(sizes) * t.element_size() if t.numel() else 0


def _convolution_flops(out: Tensor, weight: Tensor) -> int:
    return 2 * out.numel() * weight[0].numel()


def recorded(workload: Workload, bn: str, one_pass_on: int = 0) -> list[Node]:
    """The launches of one step of ARAT in bf16.

    Args:
        workload: network, batch, attack.
        bn: BatchNorm in the attack, as :attr:`arat_fast.attacks.PGD.bn`; "running" is folded.
        one_pass_on: multiprocessors of a card on which BatchNorm takes one launch each way where
            their registers hold the tensor; 0 for the usual launches.
    """
    network = workload.network()
    layers = model_spec(workload.model).regularized_layers
    objective = ARAT(network, layers, workload.image_shape)
    optimizer = torch.optim.SGD(
        [*network.parameters(), *objective.parameters()],
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    # Folding looks at numbers, once; the steps only make its constants anew.
    folded = FoldedNetwork(network, torch.rand(2, *workload.image_shape))
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(torch.Tensor, "is_cuda", property(lambda self: True)))
        enter(patch.object(torch.backends.cudnn, "is_available", lambda: True))
        if one_pass_on:
            enter(patch.object(one_pass, "programs_of", lambda *_: one_pass_on))
            enter(experimental("one_pass"))
        step = TrainStep(
            network,
            objective,
            workload.attack(bn),
            optimizer,
            precision=torch.bfloat16,
            check_inputs=False,
        )
        step.folded_network = folded
        # The first step looks at numbers too.
        step.num_calls = 1
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        x = torch.empty(workload.batch_size, *workload.image_shape)
        x = x.contiguous(memory_format=torch.channels_last)
        y = torch.empty(workload.batch_size, dtype=torch.int64)
        recorder: _Recorder = enter(_Recorder())
        with (
            torch.autocast("cpu", torch.bfloat16),
            split_stems([network]),
            rounded_weights([network, objective], torch.bfloat16),
        ):
            step(x, y)
    return recorder.nodes


@dataclass(frozen=True, kw_only=True)
class Options:
    """Launches, bytes and FLOPs of a training step by kind, and the least time they take."""

    model: tuple[str, ...] = ("resnet18", "wrn34-10")
    """resnet8, resnet18, wrn34-10."""
    batch_size: tuple[int, ...] = (128, 512)
    """Images of a step."""
    bn: tuple[str, ...] = ("batch", "running")
    """BatchNorm in the attack; running is folded."""
    tflops: float = 790.0
    """Dense bf16 matrix products of the card, TFLOP/s: what it reaches, not its data sheet."""
    tbs: float = 4.3
    """Copy bandwidth, read and written, TB/s."""
    convolutions: float = 1.0
    """Share of the matrix rate that convolutions reach, in (0, 1]; real ones about 0.6."""
    launch_us: float = 2.0
    """The least that a launch takes, microseconds."""
    one_pass_on: int = 0
    """Multiprocessors of a card (an H200 has 132) on which split BatchNorm takes one launch each
    way, where their registers hold the tensor; 0: the usual launches."""
    details: bool = False
    """A table by kind for each step."""

    def seconds(self, node: Node) -> float:
        """The longest of FLOPs, bytes and launch."""
        rate = self.tflops * 1e12 * (self.convolutions if node.name.startswith("conv_") else 1)
        return max(node.flops / rate, node.bytes / (self.tbs * 1e12), self.launch_us * 1e-6)


def tables(options: Options) -> Iterator[str]:
    """Markdown: a row for each step; with ``details`` what its kinds cost beyond 26
    forward-equivalents (of PGD-10) at the matrix rate."""
    yield "| step | launches | GB | TFLOP | ideal, images/s | bound, images/s |"
    yield "|---" * 6 + "|"
    for model in options.model:
        for bn in options.bn:
            for batch in options.batch_size:
                workload = Workload(model=model, batch_size=batch)
                nodes = recorded(workload, bn, options.one_pass_on)
                rate = options.tflops * 1e12
                ideal = workload.forward_equivalents * forward_flops(workload) * batch / rate
                bound = sum(map(options.seconds, nodes))
                yield (
                    f"| {model}, {batch}, {'running, folded' if bn == 'running' else bn} "
                    f"| {len(nodes):,} | {sum(n.bytes for n in nodes) / 1e9:.1f} "
                    f"| {sum(n.flops for n in nodes) / 1e12:.2f} "
                    f"| {batch / ideal:,.0f} | {batch / bound:,.0f} |"
                )
                if options.details:
                    yield from _by_kind(nodes, options)


def _by_kind(nodes: list[Node], options: Options) -> Iterator[str]:
    launches, size, lost = Counter[str](), Counter[str](), Counter[str]()
    for node in nodes:
        launches[node.kind] += 1
        size[node.kind] += node.bytes
        lost[node.kind] += options.seconds(node) - node.flops / (options.tflops * 1e12)  # type: ignore[assignment]  # seconds
    yield "\n| kind | launches | GB | lost, ms |\n|---|---|---|---|"
    for kind, seconds in lost.most_common():
        yield f"| {kind} | {launches[kind]:,} | {size[kind] / 1e9:.2f} | {seconds * 1e3:.2f} |"
    yield ""


if __name__ == "__main__":
    for line in tables(tyro.cli(Options, prog="python -m benchmarks.model")):
        print(line, flush=True)
