"""arat_fast: fast training of adversarially robust image classifiers with ARAT."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from arat_fast.attacks import PGD
    from arat_fast.evaluation import ThreatModel
    from arat_fast.evaluation.pictures import LoadedNetwork
    from arat_fast.evaluation.suite import evaluate
    from arat_fast.models import convert_split_batch_norm
    from arat_fast.objectives import ARAT
    from arat_fast.recipes import recipe
    from arat_fast.run.train import train
    from arat_fast.training.awp import AWP
    from arat_fast.training.step import TrainStep
    from arat_fast.training.targets import Targets

__version__ = "0.1.0"

__all__ = [
    "ARAT",
    "AWP",
    "PGD",
    "Targets",
    "ThreatModel",
    "TrainStep",
    "__version__",
    "convert_split_batch_norm",
    "evaluate",
    "load",
    "recipe",
    "train",
]

_PLACES = {
    "ARAT": "arat_fast.objectives",
    "AWP": "arat_fast.training.awp",
    "PGD": "arat_fast.attacks",
    "Targets": "arat_fast.training.targets",
    "ThreatModel": "arat_fast.evaluation",
    "TrainStep": "arat_fast.training.step",
    "convert_split_batch_norm": "arat_fast.models",
    "evaluate": "arat_fast.evaluation.suite",
    "recipe": "arat_fast.recipes",
    "train": "arat_fast.run.train",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that the version can be read without torch.
    if name not in _PLACES:
        raise AttributeError(f"module 'arat_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__


def load(
    path: str | Path,
    *,
    branch: Literal["adv", "clean"] | None = None,
    weights: Literal["deployed", "last"] = "deployed",
    recipe: str | None = None,
    model: str | nn.Module | Callable[..., nn.Module] | None = None,
) -> LoadedNetwork:
    """Load a trained network for use: ordinary BatchNorm, float32, on the CPU, in eval mode.

    Args:
        path: a run's folder, a ``checkpoint.pt``, a ``model.safetensors``, an official AR-AT
            checkpoint, or a folder that ``arat-fast export`` wrote in the format hub, robustbench,
            torchvision or timm; "hf:USER/NAME" is one on the Hugging Face Hub.
        branch: of a network with split BatchNorm; None is "adv", the robust one.
        weights: "deployed", the average where the run has one, or "last".
        recipe: tells which network a safetensors file is that does not say so itself.
        model: where a run trained a network of one's own: its name, package.module:callable, the
            callable, or a network like it, which is copied. A file that names a module imports
            nothing. Weights alone, which name no network, go into one's own by
            ``network.load_state_dict(safetensors.torch.load_file(path))``.

    Returns:
        The network: images (N, C, H, W) in [0, 1] → logits (N, num_classes), normalisation inside,
        with ``classes``, ``image_shape``, ``preprocess`` for pictures and ``predict``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not a network of this package, or lacks the branch.
    """
    # Imported here for the same reason.
    from arat_fast.evaluation.pictures import usable
    from arat_fast.saved.network import read_saved

    saved = read_saved(path, recipe=recipe, weights=weights, model=model)
    return usable(saved, saved.plain(branch)[0])
