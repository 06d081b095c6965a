"""Every operation of arat_kernels, with the calls whose launches are compiled ahead of time.

``shipped`` makes the calls of the recipes that come with arat_fast; ``sweep`` goes over shapes,
dtypes, layouts, places in memory and options. Both pass CPU tensors to the operators inside
:func:`kernels.aot.launches.recorded`, where no kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from unittest.mock import patch

import torch
from kernels.aot.launches import Launch, maximal, recorded
from torch import Tensor

from arat_kernels.checks import at_an_odd_place, randn
from arat_kernels.cosine_invariance import triton as cosine_invariance
from arat_kernels.crop_flip import triton as crop_flip
from arat_kernels.cross_entropy_grad import triton as cross_entropy_grad
from arat_kernels.forks import every_second
from arat_kernels.frozen_affine import triton as frozen_affine
from arat_kernels.image_parts import triton as image_parts
from arat_kernels.pgd_step import triton as pgd_step
from arat_kernels.split_batch_norm import around, one_pass, skip_of
from arat_kernels.split_batch_norm import triton as split_batch_norm

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Channels and dtype of the recipes' layers; 64 stands for all wider ones.
LAYERS = ((16, torch.bfloat16), (64, torch.bfloat16), (32, torch.float32))
RNG = torch.tensor([1, 2])
NORMS = ("Linf", "L2", "L1")


@dataclass(frozen=True)
class Operation:
    """One operation.

    Args:
        shipped, sweep: make calls.
        bulk: by kernel, the pointers whose accesses must be 16 bytes wide per thread where sizes
            are multiples of 16 elements.
    """

    shipped: Callable[[], None]
    sweep: Callable[[], None]
    bulk: dict[str, tuple[str, ...]]

    def bulk_of(self, launch: Launch) -> set[str]:
        """The pointers of ``launch`` whose accesses must be wide."""
        # Small tiles of few classes have less than 16 bytes per thread.
        small = launch.kernel.startswith("cross_entropy") and launch.given["COLS"] < 1024
        aligned = launch.kernel == "image_parts_fwd_kernel" or "one_pass" in launch.kernel
        if small or not launch.given.get("ALIGNED", aligned):
            return set()
        wide = set(self.bulk.get(launch.kernel, ())) & launch.types.keys()
        # The gradient of parts is three of the eight channels of a pixel.
        return wide - ({"grad_ptr"} if "parts_ptr" in launch.types else set())


@cache
def launches(name: str, whole: bool) -> list[Launch]:
    """As few launches of an operation as cover those of the recipes; with ``whole`` every launch of
    the recipes, and as few as cover the sweep."""
    operation = OPERATIONS[name]
    with recorded() as shipped:
        operation.shipped()
    if not whole:
        return maximal(shipped)
    with recorded() as swept:
        operation.sweep()
    return list({launch.label: launch for launch in shipped + maximal(swept)}.values())


def at_places(t: Tensor) -> list[Tensor]:
    """``t``, and the same numbers not at a multiple of 16 bytes."""
    return [t, at_an_odd_place(t).requires_grad_(t.requires_grad)]


def normalize(
    channels: int,
    dtype: torch.dtype,
    *,
    residual: bool = False,
    relu: bool = True,
    pooled: bool = False,
    affine: bool = True,
    training: bool = True,
    parameters: bool = True,
    residual_grad: bool = True,
    size: tuple[int, int, int] = (3, 3, 3),
    odd: bool = False,
    narrow: bool = False,
    differentiable: bool = True,
    forks: bool = False,
    few: bool = False,
    both: bool = False,
    mean: bool = False,
) -> None:
    """Split BatchNorm forward and backward; without ``parameters`` as in the attack, which moves no
    running statistics and asks for no gradient of theirs; with ``forks`` x and y have two readers,
    the second one of y, with ``few``, of every second pixel; with ``both`` the residual is
    normalised too; with ``mean`` the result is that of y alone.
    """
    n, height, width = size
    memory = torch.zeros(n, channels, height, width, dtype=dtype)
    memory = memory.contiguous(memory_format=torch.channels_last)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = [torch.ones(2, channels, dtype=dtype if narrow else wide) for _ in range(4)]
    x = at_an_odd_place(memory) if odd else memory.clone()
    if odd:
        rows[2] = at_an_odd_place(rows[2])
    extra = memory.clone() if residual else None
    leaves = [x, *([extra] if extra is not None and residual_grad else [])]
    for leaf in (*leaves, *rows[:2]):
        leaf.requires_grad_(differentiable)
    given = rows if affine else [None, None, *rows[2:]]
    options = (training, parameters, 0.1, 1e-5, extra, relu, pooled, None, torch.tensor([0, 0]))
    options += ((*given, torch.tensor([0, 0])) if both else None, mean)
    y, features = split_batch_norm.split_batch_norm_triton(x, *given, (1, n - 1), *options)
    outputs = [y] if features is None else [y, features]
    if forks:
        outputs += [every_second(y) if few else skip_of(y), around(y, x)]
    wanted = leaves + (rows[:2] if parameters and affine else [])
    if differentiable:
        torch.autograd.grad(outputs, wanted, [torch.zeros_like(t) for t in outputs])


def normalize_shipped() -> None:
    for channels, dtype in LAYERS:
        for parameters in (True, False):
            normalize(channels, dtype, parameters=parameters)
            normalize(channels, dtype, residual=True, parameters=parameters)
            normalize(channels, dtype, relu=False, parameters=parameters)
            normalize(channels, dtype, mean=True, parameters=parameters)
            normalize(channels, dtype, forks=True, parameters=parameters)
            normalize(channels, dtype, residual=True, forks=True, parameters=parameters)
            normalize(channels, dtype, forks=True, few=True, parameters=parameters)
            normalize(channels, dtype, residual=True, forks=True, few=True, parameters=parameters)
            normalize(channels, dtype, residual=True, both=True, forks=True, parameters=parameters)
        x = torch.zeros(3, channels, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        row, count = torch.zeros(2, channels), torch.tensor([0, 0])
        split_batch_norm.sum_statistics(x, x, row, row, count, 1, 0.1)
        normalize(channels, dtype, pooled=True)
        normalize(channels, dtype, relu=False, pooled=True)
        normalize(channels, dtype, residual=True, pooled=True)
        normalize(channels, dtype, residual=True, pooled=True, forks=True)


def normalize_sweep() -> None:
    options = list(product((True, False), repeat=5))
    for channels, dtype in product((1, 16, 24, 32, 50, 64, 65), FLOATS):
        for residual, relu, pooled, training, affine in options:
            chosen = {"residual": residual, "relu": relu, "pooled": pooled, "training": training}
            odd, narrow = relu is pooled, residual is not affine
            forks = {"forks": relu and not odd, "few": pooled is not affine}
            normalize(channels, dtype, **chosen, **forks, affine=affine, odd=odd, narrow=narrow)
            normalize(channels, dtype, **chosen, **forks, parameters=False, residual_grad=not relu)
            normalize(channels, dtype, **chosen, affine=affine, differentiable=False)
            if relu and not residual and not pooled:
                normalize(channels, dtype, mean=True, training=training, affine=affine)
                normalize(channels, dtype, mean=True, training=training, differentiable=False)
            if residual and not pooled:
                # forks.read_by has it that no other width is read by every second pixel.
                forks["few"] = forks["few"] and channels % 16 == 0
                normalize(channels, dtype, **chosen, **forks, affine=affine, odd=odd, both=True)
        # The gradient where the statistics are those of several processes.
        x = torch.zeros(3, channels, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        row = torch.zeros(2, channels, dtype=split_batch_norm.wide_dtype(x))
        for moved in ((None, None, None), (row, row, torch.tensor([0, 0]))):
            split_batch_norm.sum_statistics(x, x, *moved, 2, 0.1)
        counts, sums = row[:, 0].contiguous(), torch.stack([row, row])
        mask = torch.zeros(27, (channels + 7) // 8, dtype=torch.uint8)
        for pooled, affine, (bits, relu) in product(
            (None, row.new_zeros(3, channels)),
            (row, None),
            ((mask, True), (None, True), (None, False)),
        ):
            given = (x, x, x, pooled, x, row, row, affine, affine, bits)
            given += (None, None, None, None, sums, counts)
            split_batch_norm.backward_input(*given, 2, 1e-5, relu, False)


def in_one_pass(
    channels: int, images: int, area: int, dtype: torch.dtype, *, relu: bool, bits: bool, few: bool
) -> None:
    """Both launches on an H200; with ``bits`` there is a residual, with ``few`` x and y have two
    readers."""
    shape = (images, channels, area, area)
    x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    row = torch.ones(2, channels, dtype=split_batch_norm.wide_dtype(x))
    with patch.object(one_pass, "programs_of", lambda *_: 132):
        residual, moved = x if bits else None, (row, row, torch.tensor([0, 0]))
        y, mask, mean, var = one_pass.forward(
            x, residual, row, row, *moved, 0, 0.1, 1e-5, relu, bits and relu
        )
        second = (y[:, :, ::2, ::2], x) if few else (None, None)
        flags = 0, 1e-5, relu, bits and relu
        if one_pass.fits(x, 0, "backward"):
            kept = mask if bits and relu else None
            one_pass.backward(y, *second, x, mean, var, row, row, kept, *flags)


def in_one_pass_shipped() -> None:
    for bits in (True, False):
        in_one_pass(64, 128, 28, torch.bfloat16, relu=True, bits=bits, few=True)


def in_one_pass_sweep() -> None:
    flags = list(product((True, False), repeat=3))
    for dtype, (relu, bits, few) in product(FLOATS, flags):
        options = {"relu": relu, "bits": bits, "few": few}
        for channels in (64, 32, 16):
            in_one_pass(channels, 16 // dtype.itemsize, 32, dtype, **options)
        # As many rows as fill the most tiles of each width, backward and forward.
        for kilobytes in (4, 8, 16, 12, 24, 48, 96):
            if dtype in FLOATS[:2]:
                in_one_pass(64, 16 * kilobytes // dtype.itemsize, 32, dtype, **options)


def affine_shipped() -> None:
    for channels, dtype in LAYERS:
        x = torch.zeros(2, channels, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
        row = torch.zeros(channels)
        for residual, relu in product((x, None), (True, False)):
            _, _, bits = frozen_affine.forward(x, row, row, residual, relu, None, relu)
            y = bits if relu else None
            frozen_affine.backward(x, None, None, y, row, True, residual is x)
            if relu:
                for skip in (x, x[:, :, ::2, ::2]):
                    frozen_affine.backward(x, skip, x, y, row, True, residual is x)
        frozen_affine.forward(x, row, row, None, True, x, True)
        # The end of a folded convolution.
        for skip in (x, None, x[:, :, ::2, ::2]):
            frozen_affine.backward(x, skip, None, x, None, True, False)


def affine_sweep() -> None:
    shapes = [(2, 64, 4, 4), (2, 32, 3, 3), (3, 16, 8, 12), (2, 48, 7, 7), (2, 3, 5, 5), (4, 10)]
    shapes += [(2, 100, 1, 1), (1, 1, 1, 1), (2, 8, 8, 8), (2, 65, 3, 4)]
    flags = list(product((True, False), repeat=3))
    for shape, dtype, constant in product(shapes, FLOATS, FLOATS):
        images = [randn(shape, 0, dtype)]
        if len(shape) == 4:
            images.append(images[0].to(memory_format=torch.channels_last))
        scale, shift = (randn(shape[1:2], i, constant) for i in range(2))
        for image, (with_scale, residual, relu) in product(images, flags):
            x = at_places(image)[residual]
            factor = at_places(scale)[relu] if with_scale else None
            extra = image if residual else None
            kept = relu and with_scale
            _, _, y = frozen_affine.forward(x, factor, shift, extra, relu, None, kept)
            if kept and not residual:
                frozen_affine.forward(x, factor, shift, None, True, image, True)
            y = y if relu else None
            for dx in (True, False):
                if factor is not None and (dx or residual):
                    skip, beside = (image if given else None for given in (relu, relu and dx))
                    frozen_affine.backward(image, skip, beside, y, factor, dx, residual)
            frozen_affine.backward(image, extra, None, image, None, True, False)


def distances(widths: tuple[int, ...], dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    predictions = [randn((3, w), i, dtype) for i, w in enumerate(widths)]
    targets = [randn((3, w), i + 50, target_dtype) for i, w in enumerate(widths)]
    for first in at_places(predictions[0]):
        given = [first, *predictions[1:]]
        out = cosine_invariance.forward(given, targets, 1e-8)
        cosine_invariance.backward(torch.zeros_like(out), given, targets, 1e-8)


def distances_shipped() -> None:
    # The regularised layers of resnet8, ResNet-18, WRN-34-10, ResNet-50 and ConvNeXt-T.
    for widths in ((32,) * 4, (512,) * 4, (320,) + (640,) * 10, (2048,) * 4, (768,) * 3):
        distances(widths, torch.float32, torch.float32)


def distances_sweep() -> None:
    networks = [(1,), (16,), (100,), (128,), (129,), (512,), (1000,), (1024,), (1025,), (2048,)]
    networks += [(2000,), (2049,), (4096,), (7, 2048), (16, 5000)]
    networks += [(512,) * layers for layers in (2, 3, 4, 5, 10, 11, 12, 23)]
    for count in cosine_invariance.LAYER_COUNTS[1:]:
        for width in (128, 127, 511, 1024, 1023, 2048, 2047, 4096, 4095):
            # Ragged, as published networks' are; the widest decides the tile.
            networks.append((width,) * (count - 1) + (width // 32 * 16,))
    for widths, dtype, target_dtype in product(networks, FLOATS, FLOATS):
        # Others the public function refuses or widens first.
        if target_dtype == dtype or (target_dtype == torch.float32 and dtype.itemsize == 2):
            distances(widths, dtype, target_dtype)


def steps(shape: tuple[int, ...], dtype: torch.dtype, norm: str) -> None:
    x, grad = randn(shape, 0), randn(shape, 1, dtype)
    if len(shape) == 4 and dtype == torch.bfloat16:
        x = x.to(memory_format=torch.channels_last)
    for image, gradient in product(at_places(x), at_places(grad)):
        pgd_step.step(image, gradient, x, None, 0.1, 1.0, norm)
        for first in (0, 1, 16):
            pgd_step.start(image, at_places(RNG)[1], 0.1, norm, first)
    if len(shape) == 4:
        image = x.to(memory_format=torch.channels_last)
        parts = image_parts.forward(image)
        pgd_step.step(image, parts.to(dtype), image, parts, 0.1, 1.0, norm)


def steps_shipped() -> None:
    for shape in ((2, 1, 8, 8), (2, 3, 32, 32), (2, 3, 64, 64), (1, 3, 224, 224)):
        for norm in NORMS:
            steps(shape, torch.float32, norm)


def steps_sweep() -> None:
    shapes = [(3, 5), (1, 1), (2, 16), (2, 1000), (3, 4096), (2, 4097), (1, 16384), (1, 16400)]
    shapes += [(2, 3, 32, 32), (2, 3, 5, 7), (1, 3, 75, 75), (1, 20_001), (1, 4095), (1, 16383)]
    for shape, dtype, norm in product(shapes, FLOATS, NORMS):
        steps(shape, dtype, norm)


def crops_shipped() -> None:
    index = torch.zeros(3, dtype=torch.int64)
    for shape, dtype in product(((5, 1, 8, 8), (5, 3, 32, 32)), FLOATS[:2]):
        images = torch.zeros(shape, dtype=torch.uint8)
        crop_flip.forward(images, index, RNG, None, 4, True, 255.0, dtype, True)
        crop_flip.forward(images, index, None, None, 0, False, 255.0, dtype, True)


def crops_sweep() -> None:
    outputs = list(product(FLOATS[:3], (True, False)))
    for channels, size in product((1, 3), (1, 7, 28, 32)):
        stored = torch.zeros(5, channels, size, size + 1, dtype=torch.uint8)
        views = [*at_places(stored), stored[..., :size], stored.transpose(2, 3)]
        for images, index_dtype, output in product(views, (torch.int32, torch.int64), outputs):
            index = at_places(torch.zeros(3, dtype=index_dtype))[channels > 1]
            offsets = at_places(torch.zeros(3, 3, dtype=torch.int32))[channels > 1]
            for rng, given, flip in (
                (RNG, None, True),
                (at_places(RNG)[1], None, False),
                (None, offsets, False),
                (None, None, False),
            ):
                crop_flip.forward(images, index, rng, given, 1, flip, 1.0, *output)


def parts_launched() -> None:
    for channels in (1, 3, 4, 5):
        image_parts.forward(torch.zeros(2, channels, 5, 7))


def classes_shipped() -> None:
    for num_classes, dtype in product((10, 100, 200, 1000), FLOATS[:2]):
        logits = torch.zeros(4, num_classes, dtype=dtype)
        cross_entropy_grad.forward(logits, torch.zeros(4, dtype=torch.int64))
        cross_entropy_grad.forward_weighted(logits, torch.zeros(4, num_classes))


def classes_sweep() -> None:
    sizes = [1, 2, 10, 16, 64, 100, 128, 200, 1000, 1024, 1025, 4000, 4096, 4097, 8192]
    for num_classes, dtype, kind in product(sizes, FLOATS, (torch.int64, torch.int32)):
        logits = randn((3, num_classes), 0, dtype)
        wider = randn((3, num_classes + 1), 0, dtype)
        views = (*at_places(logits), wider[:, :-1], wider[:, 1:], logits[:1].expand(3, -1))
        for given, target in product(views, at_places(torch.zeros(3, dtype=kind))):
            cross_entropy_grad.forward(given, target)
    for num_classes, dtype in product((10, 16, 1000, 1024, 1025), FLOATS):
        given = randn((3, num_classes), 0, dtype)
        cross_entropy_grad.forward_weighted(given, torch.zeros(3, num_classes))


OPERATIONS = {
    "split_batch_norm": Operation(
        normalize_shipped,
        normalize_sweep,
        {
            "split_batch_norm_statistics_kernel": ("x_ptr", "addend_ptr", "sum_ptr"),
            "split_batch_norm_fwd_kernel": ("x_ptr", "residual_ptr", "y_ptr"),
            "split_batch_norm_bwd_sums_kernel": (
                "dy_ptr", "dy_skip_ptr", "x_ptr", "residual_ptr", "dresidual_ptr",
            ),
            "split_batch_norm_bwd_input_kernel": (
                "dy_ptr", "dy_skip_ptr", "dx_around_ptr", "x_ptr", "residual_ptr", "dx_ptr",
                "dresidual_ptr",
            ),
        },
    ),
    "split_batch_norm-one-pass": Operation(
        in_one_pass_shipped,
        in_one_pass_sweep,
        {
            "split_batch_norm_fwd_one_pass_kernel": ("x_ptr", "residual_ptr", "y_ptr"),
            "split_batch_norm_bwd_one_pass_kernel": (
                "dy_ptr", "dy_skip_ptr", "dx_around_ptr", "x_ptr", "dx_ptr", "dresidual_ptr",
            ),
        },
    ),
    "frozen_affine": Operation(
        affine_shipped,
        affine_sweep,
        {
            "frozen_affine_fwd_kernel": ("x_ptr", "addend_ptr", "sum_ptr", "residual_ptr", "y_ptr"),
            "frozen_affine_bwd_kernel": (
                "dy_ptr", "dy_skip_ptr", "dx_around_ptr", "y_ptr", "dx_ptr", "dresidual_ptr",
            ),
        },
    ),
    "cosine_invariance": Operation(
        distances_shipped,
        distances_sweep,
        {
            "cosine_invariance_fwd_kernel": ("predictions", "targets"),
            "cosine_invariance_bwd_kernel": ("predictions", "targets", "dpredictions"),
        },
    ),
    "pgd_step": Operation(
        steps_shipped,
        steps_sweep,
        {
            **dict.fromkeys(
                ("pgd_step_linf_kernel", "pgd_step_l2_kernel", "pgd_step_l1_kernel"),
                ("x_adv_ptr", "grad_ptr", "x_ptr"),
            ),
            **dict.fromkeys(
                ("random_start_linf_kernel", "random_start_radial_kernel"), ("x_ptr", "x_adv_ptr")
            ),
        },
    ),
    "crop_flip": Operation(crops_shipped, crops_sweep, {"crop_flip_kernel": ("x_ptr",)}),
    "image_parts": Operation(
        parts_launched, parts_launched, {"image_parts_fwd_kernel": ("parts_ptr",)}
    ),
    "cross_entropy_grad": Operation(
        classes_shipped,
        classes_sweep,
        dict.fromkeys(
            ("cross_entropy_grad_kernel", "cross_entropy_grad_weighted_kernel"),
            ("logits_ptr", "dlogits_ptr"),
        ),
    ),
}  # fmt: skip
