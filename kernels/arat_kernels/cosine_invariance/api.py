"""Public function: argument checks, choice of the implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arat_kernels.cosine_invariance.reference import cosine_invariance_reference
from arat_kernels.implementation import DTYPES, Impl, choose


def cosine_invariance(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    eps: float = 1e-8,
    impl: Impl | None = None,
) -> Tensor:
    """Per layer the mean over the batch of ``1 - cos(prediction, target)``.

    ``eps`` is that of ``torch.nn.functional.cosine_similarity``: a norm below it counts as ``eps``.
    Targets are stopped: no gradient reaches them. Up to 11 layers are one kernel launch forward and
    one backward, more of them a launch for each 11; the sum over the batch has a fixed order.

    Calls may be captured in CUDA graphs, by ``torch.compile(mode="reduce-overhead")`` too, and
    replayed before, between and beside eager calls on any stream. Each launch has counters of its
    own that no graph's pool holds if it is among the first 256 captured on its device and a call
    outside of a capture came before on that device. Any other's counters are in the pool of its
    graph, which clears them before the kernel: one small launch more.

    Args:
        predictions: one (N, D_l) per layer, one of float16, bfloat16, float32 and float64 for all
            layers; the widths D_l may differ.
        targets: one (N, D_l) per layer, one of the same dtypes for all layers, float64 if and only
            if the predictions are. With Triton those in neither the predictions' dtype nor float32
            are widened to it first.
        eps: smallest norm, > 0.
        impl: the implementation; None picks Triton for CUDA tensors, else the reference.

    Returns:
        (L,) in float32 (float64 for float64 predictions): the distance of every layer, in [0, 2]
        up to rounding.

    Raises:
        ValueError: a length, a shape, a dtype or a device does not fit; the message holds got and
            expected.

    Source: Waseda et al., ICLR 2025 (arXiv 2402.14648), section 4, the invariance loss.
    """
    if not predictions or len(predictions) != len(targets):
        raise ValueError(
            "as many predictions as targets are expected, at least 1, "
            f"got {len(predictions)} and {len(targets)}"
        )
    num = predictions[0].shape[:1]
    for layer, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        if prediction.ndim != 2 or prediction.shape[:1] != num:
            raise ValueError(
                f"predictions[{layer}] must be (N, D) with the N of predictions[0], "
                f"{tuple(num)}, got shape {tuple(prediction.shape)}"
            )
        if target.shape != prediction.shape:
            raise ValueError(
                f"targets[{layer}] must have the shape of predictions[{layer}], "
                f"{tuple(prediction.shape)}, got {tuple(target.shape)}"
            )
    for name, tensors in (("predictions", predictions), ("targets", targets)):
        dtypes = {t.dtype for t in tensors}
        if len(dtypes) > 1 or tensors[0].dtype not in DTYPES:
            raise ValueError(
                f"{name} must have one floating-point dtype of {DTYPES}, "
                f"got {sorted(map(str, dtypes))}"
            )
    kinds = predictions[0].dtype, targets[0].dtype
    if kinds[0] != kinds[1] and torch.float64 in kinds:
        raise ValueError(
            "predictions and targets must both be float64 or neither, "
            f"got {kinds[0]} and {kinds[1]}"
        )
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be finite and > 0, got {eps}")
    stopped = [target.detach() for target in targets]
    if (
        impl != "reference"
        and choose(impl, *predictions, *targets, operation="cosine_invariance") == "triton"
    ):
        from arat_kernels.cosine_invariance.triton import forward

        if kinds[1] not in (kinds[0], torch.float32):
            stopped = [target.float() for target in stopped]
        out: Tensor = forward(list(predictions), stopped, eps)
        return out
    return cosine_invariance_reference(list(predictions), stopped, eps)
