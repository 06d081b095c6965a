"""Evaluation of a saved network, whoever wrote it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from arat_fast.build import build_model
from arat_fast.config import Config, config_from_dict
from arat_fast.data import DataSplits, load_data
from arat_fast.data.batches import stream_generator
from arat_fast.device import describe_device, resolve_device, source_commit, versions
from arat_fast.display import Display
from arat_fast.evaluation.evaluate import ImageSet
from arat_fast.evaluation.suite import evaluate_all
from arat_fast.evaluation.threat_model import ThreatModel
from arat_fast.interop import export_plain
from arat_fast.interop.export import read_safetensors
from arat_fast.interop.official import official_network
from arat_fast.interop.weights import load_weights, read_tensor_file
from arat_fast.models.split_batch_norm import SplitBatchNorm2d
from arat_fast.recipes import recipe as recipe_by_name
from arat_fast.training.averaging import refresh_batch_norm
from arat_fast.training.checkpoint import is_training_checkpoint, training_state

Builder = Callable[[DataSplits, torch.device], tuple[nn.Module, str]]


class _Saved(NamedTuple):
    """What a file holds.

    Attributes:
        config: of the run that wrote it, else the recipe's.
        build: makes the network from the data and the device; returns it with the name of its
            weights.
    """

    config: Config
    build: Builder


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    recipe: str | None = None,
    norm: Literal["Linf", "L2"] | None = None,
    eps: float | None = None,
    num_steps: int | None = None,
    alpha: float | None = None,
    autoattack: bool = True,
    aa_torchattacks10: bool = False,
    max_samples: int = 0,
    num_restarts: int = 1,
    batch_size: int | None = None,
    data_root: Path | None = None,
    device: str = "auto",
    seed: int = 0,
    display: Display | None = None,
) -> dict[str, Any]:
    """Accuracies of a checkpoint on the test images of its dataset.

    Args:
        checkpoint: a run's folder, its checkpoint, exported safetensors, or an official AR-AT file.
        recipe: gives data, model and threat model; needed where the file does not hold them. A
            run's own checkpoint does; its exported weights name recipe, model and ball.
        norm, eps, num_steps, alpha, batch_size, data_root: override the run's; None keeps them.
            Another norm needs a radius; in another ball the step size is a quarter of it.
        autoattack: run standard AutoAttack too.
        aa_torchattacks10: run the 10-step AutoAttack too, which overstates robustness and is for
            comparison with the paper's table only.
        max_samples: the first samples only; 0 for all.
        num_restarts: of PGD, >= 1.
        device: auto, cpu, cuda or cuda:N.
        seed: of the attacks.
        display: where progress is shown.

    Returns:
        The record, as JSON types.

    Raises:
        FileNotFoundError: no such file, or the dataset is not there.
        ValueError: the file is cut or of another architecture, a recipe or the radius of another
            norm is missing, or an argument is out of range.
    """
    path = checkpoint / "checkpoint.pt" if checkpoint.is_dir() else checkpoint
    target = resolve_device(device)
    saved = _read(path, recipe)
    if norm not in (None, saved.config.attack.norm) and eps is None:
        raise ValueError(
            f"--eps RADIUS is expected with --norm {norm}: the radius of the run, "
            f"{saved.config.attack.eps:.6g}, is one of {saved.config.attack.norm}"
        )
    config = _with_overrides(saved.config, attack={"norm": norm, "eps": eps})
    if config.attack != saved.config.attack:
        # The run's step size was chosen for its own ball.
        evaluation = dataclasses.replace(config.eval, alpha=None)
        config = dataclasses.replace(config, eval=evaluation)
    config = _with_overrides(
        config,
        data={"root": data_root},
        eval={
            "num_steps": num_steps,
            "alpha": alpha,
            "batch_size": batch_size,
            "max_samples": max_samples,
        },
    )
    data = load_data(
        config.data, device=target, seed=config.seed, eval_batch_size=config.eval.batch_size
    )
    model, weights = saved.build(data, target)
    model = model.to(target)
    images = ImageSet.from_batches(data.test, max_samples)
    start = time.perf_counter()
    with (display or Display()).evaluating() as bar:
        suite = evaluate_all(
            model,
            images,
            ThreatModel(config.attack.eps, config.attack.norm),
            num_steps=config.eval.num_steps,
            alpha=config.eval.step_size(config.attack.eps),
            num_restarts=num_restarts,
            with_autoattack=autoattack,
            with_torchattacks10=aa_torchattacks10,
            batch_size=config.eval.batch_size,
            seed=seed,
            progress=bar,
        )
    return {
        "checkpoint": str(path),
        "recipe": config.recipe,
        "split": "test",
        "model": weights,
        "accuracy": suite.record(),
        "wall_seconds": {"eval": time.perf_counter() - start},
        "device": describe_device(target),
        "versions": versions(),
        "commit": source_commit(),
    }


def _read(path: Path, recipe: str | None) -> _Saved:
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        config = _exported_config(path, metadata, recipe)
        return _Saved(config, partial(_from_safetensors, path, config, tensors))
    content = read_tensor_file(path)
    if is_training_checkpoint(content):
        state = training_state(content, path)
        config = config_from_dict(state["config"])
        return _Saved(config, partial(_from_training, path, config, state))
    return _Saved(_recipe_for(path, recipe), partial(_from_official, path, content))


def _exported_config(path: Path, metadata: dict[str, str], recipe: str | None) -> Config:
    """What a run wrote into the header of its exported weights, over the recipe's."""
    config = _recipe_for(path, recipe or metadata.get("recipe"))
    if "recipe" not in metadata:
        return config
    try:
        return _with_overrides(
            config,
            model={"name": metadata.get("model")},
            attack={
                "norm": metadata.get("norm"),
                "eps": float(metadata["eps"]) if "eps" in metadata else None,
            },
        )
    except ValueError as error:
        raise ValueError(f"{path} has metadata that no run writes: {error}") from error


def _recipe_for(path: Path, recipe: str | None) -> Config:
    if recipe is None:
        raise ValueError(
            f"{path} holds weights only: add --recipe NAME to say which data and model they are for"
        )
    return recipe_by_name(recipe)


def _from_training(
    path: Path, config: Config, state: dict[str, Any], data: DataSplits, device: torch.device
) -> tuple[nn.Module, str]:
    model = build_model(config, data.train)
    average = state["average"]
    if average["model"] is None:
        load_weights(model, state["model"], str(path))
        return model, "last"
    load_weights(model, average["model"], str(path))
    if not average["statistics_fresh"]:
        model = model.to(device)
        refresh_batch_norm(
            model,
            data.train.epoch(config.train.epochs),
            None if config.objective.name == "natural" else config.attack,
            stream_generator(config.seed, "refresh", device),
            mixture=config.objective.mixes_images,
        )
    return model, config.average.kind


def _from_official(
    path: Path, content: object, data: DataSplits, device: torch.device
) -> tuple[nn.Module, str]:
    return official_network(content, path, data.test.num_classes), "file"


def _from_safetensors(
    path: Path,
    config: Config,
    tensors: dict[str, Tensor],
    data: DataSplits,
    device: torch.device,
) -> tuple[nn.Module, str]:
    model = build_model(config, data.test)
    if any(isinstance(module, SplitBatchNorm2d) for module in model.modules()):
        model = export_plain(model)
    load_weights(model, tensors, str(path))
    return model, "file"


def _with_overrides(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with the values that are not None put in."""
    changes = {}
    for name, values in sections.items():
        given = {key: value for key, value in values.items() if value is not None}
        changes[name] = dataclasses.replace(getattr(config, name), **given)
    return dataclasses.replace(config, **changes)
