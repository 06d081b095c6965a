"""Plain PyTorch definition of the cross-entropy and its gradient; any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_grad_reference(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as in
    :func:`arat_kernels.cross_entropy_grad.api.cross_entropy_grad`."""
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    if target.ndim == 2:
        weights, log_probabilities = target.to(wide.dtype), wide.log_softmax(1)
        with torch.no_grad():
            dlogits = log_probabilities.exp() * weights.sum(1, keepdim=True) - weights
        return dlogits.to(logits.dtype), -(weights * log_probabilities).sum(1)
    num_classes = logits.shape[1]
    known = (target >= 0) & (target < num_classes)
    safe = torch.where(known, target, 0).long()[:, None]
    log_probabilities = wide.log_softmax(1)
    loss = torch.where(known, -log_probabilities.gather(1, safe)[:, 0], torch.nan)
    with torch.no_grad():
        one_hot = torch.arange(num_classes, device=logits.device) == safe
        dlogits = torch.where(known[:, None], log_probabilities.exp() - one_hot.float(), torch.nan)
        return dlogits.to(logits.dtype), loss
