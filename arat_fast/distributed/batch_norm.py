"""BatchNorm whose statistics are those of the batch over all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from arat_fast.models.batch_norm import PlainBatchNorm2d
from arat_fast.models.split_batch_norm import SplitBatchNorm2d
from arat_fast.objectives.predictor import PredictorStack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def synchronize_batch_norm(module: nn.Module, group: ProcessGroup) -> None:
    """Make every BatchNorm of a network or an objective use the statistics of all processes.

    Split BatchNorm, one branch at a time, BatchNorm2d, and the BatchNorm of the predictors; in
    place.

    Args:
        module: the network or the objective.
        group: the processes.

    Raises:
        ValueError: a BatchNorm of another kind, or one without running statistics.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, (SplitBatchNorm2d, PredictorStack)):
            layer.group = group
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if type(layer) not in (nn.BatchNorm2d, PlainBatchNorm2d) or layer.running_mean is None:
                raise ValueError(
                    f"{name} is a {type(layer).__name__}; to synchronise it, a split BatchNorm or "
                    "a BatchNorm2d with running statistics is expected: set "
                    "--distributed.no-sync-bn"
                )
            layer.__class__ = PlainBatchNorm2d
            assert isinstance(layer, PlainBatchNorm2d)
            layer.group = group


def running_statistics(*modules: nn.Module) -> list[Tensor]:
    """Running means and variances that each process moves by its own samples: those of layers in
    training mode that belong to no group."""
    return [
        buffer
        for module in modules
        for layer in module.modules()
        if layer.training and getattr(layer, "group", None) is None
        for name in ("running_mean", "running_var")
        if isinstance(buffer := getattr(layer, name, None), Tensor)
    ]
