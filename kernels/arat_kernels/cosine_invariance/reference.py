"""Plain PyTorch definition of the cosine distance; differentiable by autograd, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_invariance_reference(
    predictions: list[Tensor], targets: list[Tensor], eps: float
) -> Tensor:
    """Arguments and results as in :func:`arat_kernels.cosine_invariance.api.cosine_invariance`."""
    wide = torch.float64 if predictions[0].dtype == torch.float64 else torch.float32
    return torch.stack(
        [
            (1 - F.cosine_similarity(p.to(wide), t.to(wide), dim=1, eps=eps)).mean()
            for p, t in zip(predictions, targets, strict=True)
        ]
    )
