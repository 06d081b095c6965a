"""arat_fast: fast training of adversarially robust image classifiers with ARAT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def load(
    path: str | Path,
    *,
    branch: Literal["adv", "clean"] | None = None,
    weights: Literal["deployed", "last"] = "deployed",
    recipe: str | None = None,
) -> nn.Module:
    """Load a trained network for use: ordinary BatchNorm, float32, on the CPU, in eval mode.

    Args:
        path: a run's folder, a ``checkpoint.pt``, a ``model.safetensors``, an official AR-AT
            checkpoint, or a folder that ``arat-fast export`` wrote in the format hub, robustbench,
            torchvision or timm.
        branch: of a network with split BatchNorm; None is "adv", the robust one.
        weights: "deployed", the average where the run has one, or "last".
        recipe: tells which network a safetensors file is that does not say so itself.

    Returns:
        The network: images (N, C, H, W) in [0, 1] → logits (N, num_classes), normalisation inside.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not a network of this package, or lacks the branch.
    """
    # Imported here, so that the version can be read without torch.
    from arat_fast.saved.network import read_saved

    return read_saved(path, recipe=recipe, weights=weights).plain(branch)[0]
