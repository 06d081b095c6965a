"""Split BatchNorm as a layer, and the switches of its branch and of its statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from arat_kernels.forks import is_bare
from arat_kernels.implementation import Impl, choose
from arat_kernels.split_batch_norm.api import check_counts
from arat_kernels.split_batch_norm.reference import split_batch_norm_reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Branch = Literal["clean", "adv", "both"]
Statistics = Literal["batch", "running", "batch_update"]

CLEAN, ADV = 0, 1


class SplitBatchNorm2d(nn.Module):
    """BatchNorm2d with parameters and statistics for clean inputs, and others for adversarial ones.

    Row 0 of every parameter and buffer is the clean branch, row 1 the adversarial one. The branch
    in use is set for a whole network by :func:`use_branch`; outside of it every layer runs ``adv``,
    the model that is deployed. ``train()`` and ``eval()`` mean what they mean for
    :class:`torch.nn.BatchNorm2d`; :func:`use_statistics` overrides them for the time of an attack.
    Three attributes may be set: ``impl``, "triton" or "reference" (None takes Triton for CUDA
    tensors); ``pooled_sink``, called in every forward with the pooled feature, (N, C); and
    ``group``, the processes of :mod:`torch.distributed` whose batches give the statistics together
    (None: this process alone). A group can be neither copied nor pickled, nor then the layer.

    Example::

        model = nn.Sequential(nn.Conv2d(3, 16, 3), SplitBatchNorm2d(16), nn.ReLU())
        with use_branch(model, "both"):
            y_clean, y_adv = model(torch.cat([x_clean, x_adv])).chunk(2)
        with use_branch(model, "adv"), use_statistics(model, "batch"):
            grad, = torch.autograd.grad(loss(model(x_adv)), x_adv)

    Args:
        num_features: channels C.
        eps: added to the variance, > 0.
        momentum: weight of the new batch in the running statistics, in [0, 1].
        affine: learn a weight and a bias, (2, C) each.

    Shapes: input (N, C, H, W), output the same.

    Source: Waseda et al., ICLR 2025 (arXiv 2402.14648), section 4.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if affine:
            self.weight = nn.Parameter(torch.ones(2, num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(2, num_features, device=device, dtype=dtype))
        for name, fill in (("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(
                name, torch.full((2, num_features), fill, device=device, dtype=dtype)
            )
        self.register_buffer("num_batches_tracked", torch.zeros(2, dtype=torch.long, device=device))
        self.branch: Branch = "adv"
        self.num_clean: int | None = None
        self.statistics: Statistics | None = None
        self.impl: Impl | None = None
        self.pooled_sink: Callable[[Tensor], None] | None = None
        self.group: ProcessGroup | None = None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        of_residual: SplitBatchNorm2d | None = None,
        only_mean: bool = False,
    ) -> Tensor:
        """Normalise ``x``, add ``residual`` (same shape) and apply ReLU, as asked; by way of
        :func:`normalize_sum`, with a residual that another layer normalises first; by way of
        :func:`mean_of_relu`, only the mean.

        Raises:
            ValueError: ``x`` or ``residual`` has another shape, a branch in training has one value
                per channel, or ``branch`` is "both" and the batch is odd while no number of clean
                samples is given; no buffer has changed then.
        """
        if x.ndim != 4 or x.shape[1] != self.num_features or x.numel() == 0:
            raise ValueError(
                f"x must be (N, C = {self.num_features}, H, W) and not empty, "
                f"got shape {tuple(x.shape)}"
            )
        if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
            raise ValueError(
                f"residual must be {x.dtype} of shape {tuple(x.shape)} as x, "
                f"got {residual.dtype} of shape {tuple(residual.shape)}"
            )
        batch = x.shape[0]
        clean = self._half(batch) if self.branch == "both" else batch * (self.branch == "clean")
        sizes = clean, batch - clean
        training = self.training if self.statistics is None else self.statistics != "running"
        update = training and self.statistics != "batch"
        if training and self.group is None and 1 in sizes:
            check_counts(x, sizes)
        run = split_batch_norm_reference
        if self.impl != "reference" and (self.impl is not None or x.is_cuda):
            buffers = self.running_mean, self.running_var
            tensors = x, self.weight, self.bias, *buffers, residual
            if choose(self.impl, *tensors, operation="split_batch_norm") == "triton":
                from arat_kernels.split_batch_norm.triton import split_batch_norm_triton

                run = split_batch_norm_triton
        y, pooled = run(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            sizes,
            training,
            update,
            self.momentum,
            self.eps,
            residual,
            relu,
            self.pooled_sink is not None,
            None if self.group is None else self.group.group_name,
            self.num_batches_tracked,
            *(() if of_residual is None else (of_residual._rows,)),
            **({"only_mean": True} if only_mean else {}),
        )
        if self.pooled_sink is not None:
            assert pooled is not None
            self.pooled_sink(pooled)
        return y

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={affine}"

    @property
    def _rows(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
        statistics = self.running_mean, self.running_var, self.num_batches_tracked
        return self.weight, self.bias, *statistics

    @property
    def _mode(self) -> tuple[object, ...]:
        """What two layers have in common whose passes can be one."""
        switches = self.branch, self.num_clean, self.statistics, self.training
        return *switches, self.eps, self.momentum, self.pooled_sink, self.group

    def _half(self, batch: int) -> int:
        """The number of clean samples in ``[x_clean; x_adv]``."""
        if self.num_clean is not None:
            if self.num_clean > batch:
                raise ValueError(f"num_clean must be <= {batch} samples, got {self.num_clean}")
            return self.num_clean
        if batch % 2:
            raise ValueError(
                f"an even batch [x_clean; x_adv] is expected with both branches, got {batch} "
                "samples; pass num_clean to use_branch for unequal parts"
            )
        return batch // 2


def add_for(norm: nn.Module, x: Tensor, addend: Tensor) -> Tensor:
    """``x + addend``, which ``norm`` normalises next.

    With Triton the pass that adds also takes the statistics, where they are those of the batch, and
    moves the running ones, where they move: ``norm`` then refuses another tensor in its place.

    Args:
        norm: of another kind than :class:`SplitBatchNorm2d`, the sum is all.
        x, addend: (N, C, H, W).
    """
    # Dynamo cannot give a tensor an attribute.
    compiling = torch.compiler.is_compiling()
    if not compiling and _in_one_pass(norm, x, addend):
        training = norm.training if norm.statistics is None else norm.statistics != "running"
        if training:
            from arat_kernels.split_batch_norm.triton import add_with_statistics

            batch = x.shape[0]
            clean = norm._half(batch) if norm.branch == "both" else batch * (norm.branch == "clean")
            moved = (None, None, None) if norm.statistics == "batch" else norm._rows[2:]
            return add_with_statistics(x, addend, moved, clean, norm.momentum)
    return x + addend


def normalize_sum(
    norm: nn.Module,
    x: Tensor,
    other: nn.Module,
    residual: Tensor,
    relu: bool,
) -> Tensor:
    """``norm(x, other(residual), relu=relu)``, where a block's own path and its shortcut end.

    With Triton each pass normalises both, if no feature is pooled.

    Args:
        norm, other: layers of one network.
        x, residual: (N, C, H, W).
        relu: apply ReLU last.
    """
    if (
        _in_one_pass(norm, x, residual)
        and _in_one_pass(other, residual, x)
        and norm._mode == other._mode
        and norm.pooled_sink is None
        and all(is_bare(layer, SplitBatchNorm2d) for layer in (norm, other))
    ):
        y: Tensor = norm(x, residual, relu, other)
    else:
        y = norm(x, other(residual), relu=relu)
    return y


def mean_of_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """The mean over H and W of ``norm(x, relu=True)``, (N, C), for the classifier.

    With Triton neither what is averaged nor its gradient is written, if no hook sees the layer and
    no feature is pooled.

    Args:
        norm: a layer that takes ``relu``.
        x: (N, C, H, W).
    """
    if _in_one_pass(norm, x, x) and norm.pooled_sink is None and is_bare(norm, SplitBatchNorm2d):
        mean: Tensor = norm(x, relu=True, only_mean=True)
        return mean
    return mean_over_positions(norm(x, relu=True))


def mean_over_positions(y: Tensor) -> Tensor:
    """The mean over H and W of ``y`` (N, C, H, W), (N, C). Its gradient is written once, in
    channels_last, which a 2-d pooling layer's is not."""
    return y.movedim(1, -1).mean((1, 2))


def _in_one_pass(norm: object, x: Tensor, beside: Tensor) -> TypeGuard[SplitBatchNorm2d]:
    """Whether kernels read two tensors for this layer alone, without a copy of either."""
    layout = torch.channels_last
    return (
        isinstance(norm, SplitBatchNorm2d)
        and norm.group is None
        # torch.fx traces with what is no tensor.
        and isinstance(x, Tensor)
        and (x.shape, x.dtype) == (beside.shape, beside.dtype)
        and x.is_contiguous(memory_format=layout)
        and beside.is_contiguous(memory_format=layout)
        and choose(norm.impl, x, beside, norm.running_mean, operation="split_batch_norm")
        == "triton"
    )


@contextmanager
def use_branch(model: nn.Module, branch: Branch, num_clean: int | None = None) -> Iterator[None]:
    """Run every :class:`SplitBatchNorm2d` of ``model`` on ``branch`` inside the context.

    Args:
        model: any network; without split layers the context does nothing.
        branch: "clean", "adv", or "both" for a batch ``[x_clean; x_adv]``.
        num_clean: with "both", the number of clean samples at the front; default half of the batch.

    Raises:
        ValueError: on entry, for another branch, or ``num_clean`` without "both" or below 0.
    """
    if branch not in get_args(Branch):
        raise ValueError(f"branch must be one of {get_args(Branch)}, got {branch!r}")
    if num_clean is not None and (branch != "both" or num_clean < 0):
        raise ValueError(
            'num_clean must be None, or >= 0 with branch "both", '
            f"got {num_clean} with branch {branch!r}"
        )
    layers = [m for m in model.modules() if isinstance(m, SplitBatchNorm2d)]
    before = [(layer.branch, layer.num_clean) for layer in layers]
    for layer in layers:
        layer.branch, layer.num_clean = branch, num_clean
    try:
        yield
    finally:
        for layer, (old_branch, old_num_clean) in zip(layers, before, strict=True):
            layer.branch, layer.num_clean = old_branch, old_num_clean


@contextmanager
def use_statistics(model: nn.Module, statistics: Statistics) -> Iterator[None]:
    """Choose which statistics every BatchNorm of ``model`` normalises with, inside the context.

    Applies to split layers and to PyTorch's own (``nn.BatchNorm1d`` … ``SyncBatchNorm``) alike.

    Args:
        model: any network.
        statistics: "batch" (those of the batch; running statistics and counters stay untouched),
            "running" (the whole model is in eval mode, dropout included), or "batch_update" (those
            of the batch, and the running statistics move).

    Raises:
        ValueError: on entry, for other statistics.
    """
    if statistics not in get_args(Statistics):
        raise ValueError(f"statistics must be one of {get_args(Statistics)}, got {statistics!r}")
    modes = [(module, module.training) for module in model.modules()]
    split = [m for m in model.modules() if isinstance(m, SplitBatchNorm2d)]
    plain = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    before_split = [layer.statistics for layer in split]
    before_plain = [layer.track_running_stats for layer in plain]
    for split_layer in split:
        split_layer.statistics = statistics
    if statistics == "running":
        model.eval()
    else:
        for plain_layer in plain:
            plain_layer.training = True
            if statistics == "batch":
                plain_layer.track_running_stats = False
    try:
        yield
    finally:
        for split_layer, old in zip(split, before_split, strict=True):
            split_layer.statistics = old
        for plain_layer, tracked in zip(plain, before_plain, strict=True):
            plain_layer.track_running_stats = tracked
        for module, mode in modes:
            module.training = mode
