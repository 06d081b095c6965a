"""BatchNorm on running statistics, folded into the convolutions before it.

On running statistics BatchNorm is an affine map with constants. Where it follows a convolution it
disappears into the convolution's weight and bias, and what is left is convolution, bias, residual
and ReLU in one operation; elsewhere one pass of :func:`arat_kernels.frozen_affine.frozen_affine`
does the map, the residual and the ReLU.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn.modules.batchnorm import _BatchNorm

from arat_fast.device import full_float32
from arat_fast.models.batch_norm import PlainBatchNorm2d
from arat_fast.models.layers import StemConv2d, weight_for_parts
from arat_fast.models.split_batch_norm import (
    ADV,
    SplitBatchNorm2d,
    SplitBatchNormAct2d,
    use_branch,
    use_statistics,
)
from arat_kernels.forks import around, few_of, gradients, is_bare, of_few, reads_few, skip_of
from arat_kernels.frozen_affine import add_frozen_affine, frozen_affine, relu_backward
from arat_kernels.image_parts import image_parts
from arat_kernels.implementation import Impl

_AnyNorm: TypeAlias = SplitBatchNorm2d | _BatchNorm
_NORMS = (
    SplitBatchNorm2d,
    SplitBatchNormAct2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    PlainBatchNorm2d,
)
_ADDS = (operator.add, operator.iadd, torch.add)
_RELUS = (torch.relu, F.relu, torch.relu_, F.relu_)


class FoldedNetwork(nn.Module):
    """The ``adv`` branch of a network in eval mode, for gradients of the images only.

    Computes what ``model`` computes under ``use_branch(model, "adv")`` and
    ``use_statistics(model, "running")``, up to rounding, on constants that :meth:`refresh` makes
    from the network's parameters and statistics: call it after they have changed. Parameters get no
    gradient through the folded layers. Everything else (linear layers, activations, attention) is
    the network's own module, in its own mode: run it under ``use_statistics(folded, "running")``,
    as :class:`arat_fast.attacks.pgd.PGD` does.

    Args:
        model: any network that ``torch.fx`` can trace; with split BatchNorm or PyTorch's own.
        example: images (N, C, H, W) such as it will see; one forward pass of each network compares
            them.
        impl: implementation of the elementwise operations, "triton" or "reference"; None takes
            Triton for CUDA tensors.
        constant: the weights stay as they are for very many calls, as in an evaluation: they are
            laid out for speed, channels last, and a convolution whose image is no larger than its
            window (3x3 on 2x2 pixels), or with one channel no larger than eight windows, becomes
            one matrix product.

    Attributes:
        folded: module paths of the BatchNorm layers that went into the convolution before them.
        affine: paths of those that are an affine map of their own.
        unfolded: paths of those left as they are: no running statistics, hooks, or a subclass
            whose forward is not known.

    Raises:
        ValueError: the network cannot be traced, or the folded one computes something else.
    """

    def __init__(
        self, model: nn.Module, example: Tensor, impl: Impl | None = None, *, constant: bool = False
    ) -> None:
        super().__init__()
        with use_branch(model, "adv"), use_statistics(model, "running"):
            try:
                network = fx.GraphModule(model, _Tracer().trace(model))
                with torch.no_grad():
                    ShapeProp(network).propagate(example[:2])  # type: ignore[no-untyped-call]
            except Exception as error:  # tracing runs the network's own code
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{type(model).__name__} cannot be traced, which folding needs: {reason}; set "
                    "step.fold to False (--step.no-fold)"
                ) from error
        self.folded, self.affine, self.unfolded, self._sites = _fold(network, impl)
        # Made anew, it holds the layers that the graph still calls.
        self.network = fx.GraphModule(network, network.graph)
        for site in self._sites:
            site.constant = constant
        with torch.autocast(example.device.type, enabled=False), full_float32():
            self.refresh()
            self._compare(model, example[:2])
        self.refresh()

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to the network's output."""
        y: Tensor = self.network(x)
        return y

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the constants anew, in the autocast dtype where autocast is on."""
        if not self._sites:
            return
        scales, shifts = _scales_and_shifts([site.norm for site in self._sites])
        for site, scale, shift in zip(self._sites, scales, shifts, strict=True):
            site.refresh(scale, shift)
        wide: list[Tensor] = []
        rounded: list[Tensor] = []
        for site in self._sites:
            if isinstance(site, _FoldedConv) and site.keeps_bias:
                site.bias = site.total_shift()
                if site.bias.dtype != site.weight.dtype:
                    wide.append(site.bias)
                    site.bias = torch.empty_like(site.bias, dtype=site.weight.dtype)
                    rounded.append(site.bias)
        if wide:
            torch._foreach_copy_(rounded, wide)

    @torch.no_grad()
    def _compare(self, model: nn.Module, example: Tensor) -> None:
        with use_branch(model, "adv"), use_statistics(model, "running"):
            expected = model(example)
        with use_statistics(self, "running"):
            difference = float((self(example) - expected).abs().max())
        scale = float(expected.abs().max())
        # Far above rounding and far below a layer gone wrong.
        if not difference <= torch.finfo(expected.dtype).eps ** 0.5 * scale:
            raise ValueError(
                f"the folded {type(model).__name__} gives another output than the network itself "
                f"(difference {difference:.3g}, outputs up to {scale:.3g}); set step.fold to False "
                "(--step.no-fold)"
            )


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf: bool = super().is_leaf_module(m, module_qualified_name)
        return leaf or isinstance(m, (SplitBatchNorm2d, StemConv2d, _BatchNorm))

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not isinstance(m, PlainBatchNorm2d):
            return super().call_module(m, forward, args, kwargs)
        # As it is for any network: BatchNorm, addition and ReLU, one after the other.
        x, *rest = args
        y = super().call_module(m, forward, (x,), {})
        residual = rest[0] if rest else kwargs.get("residual")
        if residual is not None:
            y = y + residual
        return y.relu() if kwargs.get("relu") else y


class _Site(nn.Module):
    """One BatchNorm with what was fused around it."""

    def __init__(self, norm: _AnyNorm, relu: bool, impl: Impl | None) -> None:
        super().__init__()
        # In a tuple, so that the network's own layers are not registered a second time.
        self._norm = (norm,)
        self.relu = relu
        self.impl: Impl | None = impl
        self.constant = False

    @property
    def norm(self) -> _AnyNorm:
        return self._norm[0]


def _scales_and_shifts(norms: list[_AnyNorm]) -> tuple[list[Tensor], list[Tensor]]:
    """The affine maps of BatchNorm layers on running statistics, (C,) each."""

    def rows(name: str, missing: float) -> list[Tensor]:
        found = []
        for norm in norms:
            row = getattr(norm, name)
            if row is None:
                row = torch.full_like(norm.running_var, missing)  # type: ignore[arg-type]  # has them: _known
            found.append(row[ADV] if isinstance(norm, SplitBatchNorm2d) else row)
        return found

    scales = torch._foreach_add(rows("running_var", 0), [norm.eps for norm in norms])
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, rows("weight", 1))
    shifts = torch._foreach_neg(rows("running_mean", 0))
    torch._foreach_mul_(shifts, scales)
    torch._foreach_add_(shifts, rows("bias", 0))
    return list(scales), list(shifts)


class _FoldedConv(_Site):
    """``[relu](conv(x) + bias [+ residual])`` with the BatchNorm inside weight and bias."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, norm: _AnyNorm, relu: bool, impl: Impl | None) -> None:
        super().__init__(norm, relu, impl)
        self._conv = (conv,)
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.shortcut: _FoldedConv | None = None
        """A convolution whose output is only the residual of this one, which adds both biases."""
        self.bias = None
        self.keeps_bias = True
        self.of_parts = False
        self._matrices: dict[tuple[int, int], _Matrix] = {}

    def refresh(self, scale: Tensor, shift: Tensor) -> None:
        """The weight and the own shift; the bias is made of the shifts of all."""
        (conv,) = self._conv
        self.shift = shift if conv.bias is None else shift + scale * conv.bias
        # The parameter, whatever stands in its place for the time of a step.
        own = conv._parameters["weight"]
        assert own is not None
        dtype, device_type = own.dtype, own.device.type
        autocast = torch.is_autocast_enabled(device_type)
        self.of_parts = autocast and isinstance(conv, StemConv2d) and conv.split_weight is not None
        if autocast and not isinstance(conv, StemConv2d):
            dtype = torch.get_autocast_dtype(device_type)
        # The product is rounded as it is stored.
        weight = torch.empty_like(own, dtype=dtype)
        self.weight = torch.mul(own, scale[:, None, None, None], out=weight)
        if self.of_parts:
            self.weight = weight_for_parts(self.weight)
        self._matrices.clear()
        if self.constant:
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)

    def total_shift(self) -> Tensor:
        """The shift, with that of the shortcut."""
        return self.shift if self.shortcut is None else self.shift + self.shortcut.shift

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        (conv,) = self._conv
        geometry = _Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]  # not a string: _convolution
        if self.constant and x.dtype == self.weight.dtype and self._fits_matrix(x):
            product: Tensor = _MatrixAct.apply(  # type: ignore[no-untyped-call]
                x, self._matrix(x, geometry), residual, self.relu, self.impl
            )
            return product
        if self.of_parts:
            x = image_parts(x, impl=self.impl)
        out_dtype = self.weight.dtype
        device_type = x.device.type
        if isinstance(conv, StemConv2d) and torch.is_autocast_enabled(device_type):
            out_dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            y, skip, few = _ConvAct.apply(  # type: ignore[no-untyped-call]
                x.to(self.weight.dtype),
                self.weight,
                self.bias,
                None if residual is None else residual.to(self.weight.dtype),
                self.relu,
                geometry,
                self.impl,
            )
        given: Tensor = y.to(out_dtype)
        if given is y and self.relu:
            given._skip, given._few = skip, few
        return given

    def _fits_matrix(self, x: Tensor) -> bool:
        """Whether the matrix product takes no more multiplications than the convolution; eight
        times as many are no slower for one channel, which leaves vectors of a processor empty."""
        (conv,) = self._conv
        limit = self.weight[0, 0].numel() * (8 if x.shape[1] == 1 else 1)
        return conv.groups == 1 and x[0, 0].numel() <= limit

    def _matrix(self, x: Tensor, geometry: _Geometry) -> _Matrix:
        size = (x.shape[2], x.shape[3])
        if size not in self._matrices:
            self._matrices[size] = _Matrix.of(self.weight, self.bias, size, geometry)
        return self._matrices[size]


class _FrozenAffine(_Site):
    """``[relu](x * scale + shift [+ residual])``; with an addend of ``x`` and ReLU, the sum too."""

    scale: Tensor
    shift: Tensor

    def refresh(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = scale, shift

    def forward(
        self, x: Tensor, residual: Tensor | None = None, addend: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if addend is not None:
            if addend.dtype != x.dtype:
                dtype = torch.promote_types(x.dtype, addend.dtype)
                x, addend = x.to(dtype), addend.to(dtype)
            return add_frozen_affine(x, addend, self.scale, self.shift, impl=self.impl)
        if residual is not None:
            residual = residual.to(x.dtype)
        return frozen_affine(
            x, self.scale, self.shift, residual=residual, relu=self.relu, impl=self.impl
        )


class _Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class _Matrix(NamedTuple):
    """A convolution of images of one size as a matrix.

    Attributes:
        weight: (H·W·C, H'·W'·C'), channels last on both sides.
        bias: (H'·W'·C') or None.
        out_shape: H', W', C'.
    """

    weight: Tensor
    bias: Tensor | None
    out_shape: tuple[int, int, int]

    @classmethod
    @torch.no_grad()
    def of(
        cls, weight: Tensor, bias: Tensor | None, size: tuple[int, int], geometry: _Geometry
    ) -> _Matrix:
        """The matrix of a convolution with ``weight`` (C', C, kH, kW) of images of ``size``."""
        height, width = size
        entries = height * width * weight.shape[1]
        unit = torch.eye(entries, dtype=weight.dtype, device=weight.device)
        images = unit.view(entries, height, width, -1).permute(0, 3, 1, 2)
        answers = F.conv2d(images, weight, None, *geometry).permute(0, 2, 3, 1)
        _, *out_shape = answers.shape
        positions = out_shape[0] * out_shape[1]
        return cls(
            answers.reshape(entries, -1).contiguous(),
            None if bias is None else bias.repeat(positions),
            (out_shape[0], out_shape[1], out_shape[2]),
        )


class _MatrixAct(torch.autograd.Function):
    """:class:`_ConvAct` through a matrix."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: _Matrix, residual: Tensor | None, relu: bool, impl: Impl | None
    ) -> Tensor:
        height, width, channels = matrix.out_shape
        # Not a view of the product: what follows may change it in place.
        y = torch.empty(
            (len(x), channels, height, width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        rows, out = (t.permute(0, 2, 3, 1).flatten(1) for t in (x, y))
        if matrix.bias is None:
            torch.mm(rows, matrix.weight, out=out)
        else:
            torch.addmm(matrix.bias, rows, matrix.weight, out=out)
        if residual is not None:
            y += residual
        if relu:
            y.relu_()
        ctx.relu, ctx.impl, ctx.matrix, ctx.shape = relu, impl, matrix, x.shape
        ctx.save_for_backward(*([y] if relu else []))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.relu:
            dy = relu_backward(dy, ctx.saved_tensors[0], impl=ctx.impl)
        dx = None
        if ctx.needs_input_grad[0]:
            flat = dy.permute(0, 2, 3, 1).flatten(1) @ ctx.matrix.weight.t()
            batch, channels, height, width = ctx.shape
            dx = flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return dx, None, dy if ctx.needs_input_grad[2] else None, None, None


class _ConvAct(torch.autograd.Function):
    """Convolution, bias, residual, ReLU, for two readers; backward to the input and the residual
    only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        geometry: _Geometry,
        impl: Impl | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = _conv_act(x, weight, bias, residual, relu, geometry)
        ctx.relu, ctx.geometry, ctx.impl = relu, geometry, impl
        ctx.save_for_backward(x, weight, *([y] if relu else []))
        ctx.set_materialize_grads(False)
        ctx.shape = y.shape
        return y, y.detach(), few_of(y)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dy_skip: Tensor | None, dy_few: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        dy, dy_skip = gradients(ctx.shape, dy, dy_skip, dy_few)
        assert dy is not None
        if ctx.relu:
            dy = relu_backward(dy, saved[0], dy_skip=dy_skip, impl=ctx.impl)
        dx = _input_gradient(dy, x, weight, ctx.geometry) if ctx.needs_input_grad[0] else None
        return dx, None, None, dy if ctx.needs_input_grad[3] else None, None, None, None


def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    # A strided shortcut reads few of the pixels; PyTorch on a CPU also works for the others.
    few = not x.is_cuda and weight.shape[2:] == (1, 1) and padding == (0, 0)
    if few and stride != (1, 1):
        dx = torch.zeros_like(x)
        read = dx[:, :, :: stride[0], :: stride[1]]
        read.copy_(_input_gradient(dy, read, weight, _Geometry((1, 1), padding, dilation, groups)))
        return dx
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        dy,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        groups,
        (True, False, False),
    )
    return found[0]


def _conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    geometry: _Geometry,
) -> Tensor:
    y: Tensor
    if x.is_cuda and relu and bias is not None and _has_cudnn(x.dtype):
        layer = x.shape, weight.shape, x.dtype, residual is None, geometry
        try:
            if layer not in _UNFUSED:
                if residual is None:
                    y = torch.cudnn_convolution_relu(x, weight, bias, *geometry)
                else:
                    y = torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
                return y
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # No engine for this dtype, stride, number of groups or channels.
            if not _UNFUSED:
                reason = str(error).partition("\n")[0]
                warnings.warn(f"cuDNN fuses not every convolution here: {reason}", stacklevel=2)
            _UNFUSED.add(layer)
    y = F.conv2d(x, weight, bias, *geometry)
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


_UNFUSED: set[object] = set()
"""Convolutions that cuDNN was found not to fuse with bias, residual and ReLU."""


def _has_cudnn(dtype: torch.dtype) -> bool:
    fast = (torch.bfloat16, torch.float16, torch.float32)
    if dtype not in fast or torch.version.hip is not None:
        return False
    return bool(torch.backends.cudnn.is_available())  # type: ignore[no-untyped-call]


def _fold(
    network: fx.GraphModule, impl: Impl | None
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], list[_FoldedConv | _FrozenAffine]]:
    """Rewrite the graph in place; the paths by what became of them, and the new layers."""
    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        # What nothing does would hide who reads what.
        module = modules[str(node.target)] if node.op == "call_module" else None
        if type(module) is nn.Identity and not _has_hooks(module):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
    nodes = list(network.graph.nodes)
    folded, affine, unfolded = [], [], []
    sites: dict[fx.Node, _FoldedConv | _FrozenAffine] = {}
    for node in nodes:
        norm = modules[str(node.target)] if node.op == "call_module" else None
        if not isinstance(norm, (SplitBatchNorm2d, _BatchNorm)):
            continue
        path = str(node.target)
        if not _known(norm):
            unfolded.append(path)
            continue
        x, residual, relu = _arguments(node)
        conv = _convolution(x, modules)
        if conv is not None and _mutation_between(nodes, x, node, modules):
            conv = None
        start: fx.Node = node if conv is None else x
        end: fx.Node = node
        replaced: tuple[fx.Node, ...] = (node,)
        activated = isinstance(norm, SplitBatchNormAct2d)
        if not activated:
            absorbed = _absorb(node, residual, relu, modules)
            if not _mutation_between(nodes, start, absorbed[0], modules, but=absorbed[3]):
                end, residual, relu, replaced = absorbed
        site: _FoldedConv | _FrozenAffine
        source: Any
        if conv is None:
            site, source = _FrozenAffine(norm, relu, impl), x
            affine.append(path)
        else:
            site, source = _FoldedConv(conv, norm, relu, impl), x.args[0]
            folded.append(path)
        name = f"_folded_{len(sites)}"
        network.add_module(name, site)
        modules[name] = site
        with network.graph.inserting_after(end):
            new = network.graph.call_module(name, (source, residual))
            new.meta = dict(end.meta)
        end.replace_all_uses_with(new)
        sites[new] = site
        # One by one: dead code elimination would take in-place operations for dead.
        for old in reversed((x, *replaced) if conv is not None else replaced):
            network.graph.erase_node(old)
        if activated:
            with network.graph.inserting_after(new):
                activation = network.graph.call_module(f"{path}.act", (new,))
            new.replace_all_uses_with(activation)
            activation.args = (new,)
    shortcuts = _merge_biases(sites)
    sites = _take_sums(network, sites, modules)
    _route_forks(network, sites, modules)
    # A shortcut's shift is made before the convolution that adds it.
    ordered = [*shortcuts, *(site for site in sites.values() if site not in shortcuts)]
    return tuple(folded), tuple(affine), tuple(unfolded), ordered


def _merge_biases(sites: dict[fx.Node, _FoldedConv | _FrozenAffine]) -> list[_FoldedConv]:
    """Let a convolution add the bias of the one that is only its residual; the latter ones."""
    merged: list[_FoldedConv] = []
    for node, main in sites.items():
        residual = node.args[1]
        if not isinstance(main, _FoldedConv) or not isinstance(residual, fx.Node):
            continue
        shortcut = sites.get(residual)
        if not isinstance(shortcut, _FoldedConv) or shortcut.relu or residual.args[1] is not None:
            continue
        if len(residual.users) == 1:
            main.shortcut, shortcut.keeps_bias = shortcut, False
            merged.append(shortcut)
    return merged


def _take_sums(
    network: fx.GraphModule,
    sites: dict[fx.Node, _FoldedConv | _FrozenAffine],
    modules: dict[str, nn.Module],
) -> dict[fx.Node, _FoldedConv | _FrozenAffine]:
    """Let an affine map with ReLU add the two tensors whose sum it is the first to read; the sites
    by the nodes that their results have then."""
    order = {node: place for place, node in enumerate(network.graph.nodes)}
    moved: dict[fx.Node, _FoldedConv | _FrozenAffine] = {}
    for node, site in sites.items():
        source, residual = node.args
        terms = source.args if isinstance(source, fx.Node) else ()
        if (
            not isinstance(site, _FrozenAffine)
            or not site.relu
            or residual is not None
            or not isinstance(source, fx.Node)
            or source.target not in (operator.add, torch.add, "add")
            or len(terms) != 2
            or source.kwargs
            or not all(isinstance(t, fx.Node) and _shape(t) == _shape(source) for t in terms)
            or _shape(source) is None
            or any(order[reader] < order[node] for reader in source.users)
            or any(_is_in_place(n, modules) for t in (source, *terms) for n in t.users)  # type: ignore[union-attr]  # nodes
        ):
            moved[node] = site
            continue
        node.args = (terms[0], None, terms[1])
        with network.graph.inserting_after(node):
            summed = network.graph.call_function(operator.getitem, (node, 1))
            result = network.graph.call_function(operator.getitem, (node, 0))
        for old, new in ((node, result), (source, summed)):
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in (result, summed))  # noqa: B023  # called at once
        network.graph.erase_node(source)
        moved[result] = site
    return moved


def _route_forks(
    network: fx.GraphModule,
    sites: dict[fx.Node, _FoldedConv | _FrozenAffine],
    modules: dict[str, nn.Module],
) -> None:
    """Give later readers of what a site makes, or of what an affine map is made of, the tensor
    whose gradient the site's own backward adds."""

    def route(source: fx.Node, site: fx.Node, function: Any, *arguments: fx.Node) -> None:
        order = {node: place for place, node in enumerate(network.graph.nodes)}
        readers = [reader for reader in source.users if order[reader] > order[site]]
        readers = readers[1:] if source is site else readers
        if readers and not any(_is_in_place(reader, modules) for reader in source.users):
            with network.graph.inserting_after(site):
                second = network.graph.call_function(function, arguments)
            for reader in readers:
                if source is site and _projects(reader, modules):
                    with network.graph.inserting_before(reader):
                        conv = network.graph.get_attr(str(reader.target))
                    reader.op, reader.target = "call_function", of_few
                    reader.args, reader.kwargs = (conv, source), {}
                else:
                    reader.replace_input_with(source, second)
            if not second.users:
                network.graph.erase_node(second)

    for node, site in sites.items():
        if site.relu:
            route(node, node, skip_of, node)
            # Where the site forms the sum itself, its other readers are seen by its backward.
            if isinstance(site, _FrozenAffine) and node.op == "call_module":
                source = node.args[0]
                assert isinstance(source, fx.Node)
                route(source, node, around, node, source)


def _projects(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is a convolution alone that reads every second pixel."""
    conv = modules[str(node.target)] if node.op == "call_module" else None
    if isinstance(conv, _FoldedConv):
        return reads_few(conv) and not conv.relu and node.args[1] is None
    return isinstance(conv, nn.Module) and is_bare(conv, nn.Conv2d) and reads_few(conv)


def _mutation_between(
    nodes: list[fx.Node],
    first: fx.Node,
    last: fx.Node,
    modules: dict[str, nn.Module],
    but: tuple[fx.Node, ...] = (),
) -> bool:
    """Whether something is changed in place between two nodes: nothing may move past that."""
    between = nodes[nodes.index(first) + 1 : nodes.index(last)]
    return any(_is_in_place(node, modules) for node in between if node not in but)


def _is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place_operator = name.startswith("i") and hasattr(operator, f"__{name}__")
        return in_place_operator or name == "setitem" or (name.endswith("_") and name[0] != "_")
    return node.op == "call_method" and str(node.target).endswith("_")


def _known(norm: _AnyNorm) -> bool:
    return type(norm) in _NORMS and norm.running_mean is not None and not _has_hooks(norm)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _convolution(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Conv2d | None:
    """The convolution that made ``node``, where a BatchNorm, its only user, can go into it."""
    if node.op != "call_module" or len(node.users) != 1:
        return None
    conv = modules[str(node.target)]
    if type(conv) not in (nn.Conv2d, StemConv2d) or _has_hooks(conv):
        return None
    assert isinstance(conv, nn.Conv2d)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    return conv


def _arguments(node: fx.Node) -> tuple[fx.Node, fx.Node | None, bool]:
    """x, residual and relu of a call of :class:`SplitBatchNorm2d` or of PyTorch's BatchNorm."""
    names = ("x" if "x" in node.kwargs else "input", "residual", "relu")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return given[names[0]], given.get("residual"), bool(given.get("relu", False))


def _absorb(
    norm: fx.Node, residual: fx.Node | None, relu: bool, modules: dict[str, nn.Module]
) -> tuple[fx.Node, fx.Node | None, bool, tuple[fx.Node, ...]]:
    """Follow the output through an addition and a ReLU that nothing else reads.

    Returns:
        the last node, the residual, whether ReLU comes last, and every node on the way.
    """
    end, way = norm, [norm]
    if residual is None and not relu:
        user = _only_user(end)
        other = None if user is None else _other_summand(user, end)
        if user is not None and other is not None:
            end, residual = user, other
            way.append(user)
    user = _only_user(end)
    if not relu and user is not None and _is_relu(user, modules):
        end, relu = user, True
        way.append(user)
    return end, residual, relu, tuple(way)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _other_summand(node: fx.Node, known: fx.Node) -> fx.Node | None:
    adds: bool = (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    if not adds or len(node.args) != 2 or node.kwargs:
        return None
    others = [argument for argument in node.args if argument is not known]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    in_place = node.target in (operator.iadd, "add_")
    if in_place and node.args[0] is not known and len(others[0].users) > 1:
        return None
    return others[0] if _shape(others[0]) == _shape(known) is not None else None


def _shape(node: fx.Node) -> torch.Size | None:
    meta = node.meta.get("tensor_meta")
    return meta.shape if isinstance(meta, TensorMetadata) else None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.ReLU and not _has_hooks(module)
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in _RELUS
