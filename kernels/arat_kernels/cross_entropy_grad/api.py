"""Public function: argument checks, choice of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from arat_kernels.cross_entropy_grad.reference import cross_entropy_grad_reference
from arat_kernels.implementation import DTYPES, Impl, choose


def cross_entropy_grad(
    logits: Tensor, target: Tensor, *, impl: Impl | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of the summed cross-entropy, ``softmax(logits) - one_hot(target)``, and the losses;
    with weights ``t`` of the classes ``sum(t) * softmax(logits) - t``.

    One operator where autograd runs five that write a tensor (float32, summed loss; counted by
    dispatch, not a measurement of time); an attack passes the gradient on:
    ``torch.autograd.grad(logits, x_adv, dlogits)``. The losses are differentiable (the gradient
    that is already there is scaled), the gradient itself is not.

    Args:
        logits: (N, K), float16, bfloat16, float32 or float64, K >= 1.
        target: (N,), int64 (an int32 one is converted first), in [0, K); a row whose target is not
            gets NaN, for the host does not look. Or weights of the classes, (N, K), floating point.
        impl: the implementation; None picks Triton for CUDA tensors, else the reference.

    Returns:
        ``dlogits``, shape and dtype of ``logits``, and ``loss`` (N,) in float32 (float64 for
        float64 ``logits``), the cross-entropy of every sample.

    Raises:
        ValueError: a shape, a dtype or a device does not fit; the message holds got and expected.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype not in DTYPES:
        raise ValueError(
            f"logits must be (N, K) with K >= 1 of one of {DTYPES}, "
            f"got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    hard = target.shape == logits.shape[:1] and target.dtype in (torch.int64, torch.int32)
    if not hard and not (target.shape == logits.shape and target.is_floating_point()):
        raise ValueError(
            f"target must be (N,) = ({logits.shape[0]},) int64 or int32, or floating point (N, K), "
            f"got {target.dtype} of shape {tuple(target.shape)}"
        )
    if (
        impl != "reference"
        and choose(impl, logits, target, operation="cross_entropy_grad") == "triton"
    ):
        from arat_kernels.cross_entropy_grad.triton import forward, forward_weighted

        dlogits, loss = forward(logits, target) if hard else forward_weighted(logits, target)
        return dlogits, loss
    return cross_entropy_grad_reference(logits, target)
