"""Networks of the timm package, an extra."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from arat_fast.extras import install_command
from arat_fast.models.layers import Norm, Normalize, StemConv2d


class TimmNetwork(nn.Module):
    """A network of timm, ``network``, after a normalisation of the images.

    Args:
        name: timm's name of the architecture; the weights are fresh.
        num_classes: number of logits.
        in_channels: channels of the image.
        norm: "shared"; the architectures here have LayerNorm and no BatchNorm that could be split.
        mean, std: per-channel normalisation inside the network; empty for none.

    Raises:
        ValueError: timm is not installed, or ``norm`` is "split".
    """

    def __init__(
        self,
        name: str,
        *,
        num_classes: int,
        in_channels: int,
        norm: Norm,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        if norm == "split":
            raise ValueError(
                f"{name} has LayerNorm and no BatchNorm that could be split, got norm=split; leave "
                "--model.norm at auto: ARAT is then the invariance loss and its predictor"
            )
        try:
            import timm
        except ImportError as error:
            raise ValueError(
                f"{name} is a network of timm, which is not installed: {install_command('timm')}"
            ) from error
        self.normalize: nn.Module = Normalize(mean, std) if mean else nn.Identity()
        options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
        self.network: nn.Module = timm.create_model(name, pretrained=False, **options)
        # Under autocast LayerNorm's float32 reaches other convolutions too, which need no care.
        stem = next(m for m in self.network.modules() if isinstance(m, nn.Conv2d))
        stem.__class__ = StemConv2d

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to logits (N, classes)."""
        logits: Tensor = self.network(self.normalize(x))
        return logits
