"""Evaluation of a saved network, whoever wrote it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from arat_fast.build import build_model
from arat_fast.config import Config, config_from_dict
from arat_fast.data import DataSplits, load_data
from arat_fast.data.batches import stream_generator
from arat_fast.device import describe_device, resolve_device, source_commit, versions
from arat_fast.display import Display
from arat_fast.evaluation.evaluate import ImageSet
from arat_fast.evaluation.suite import evaluate_all
from arat_fast.evaluation.threat_model import ThreatModel
from arat_fast.interop import export_plain, load_official_checkpoint, load_safetensors
from arat_fast.interop.weights import load_weights
from arat_fast.models.split_batch_norm import SplitBatchNorm2d
from arat_fast.recipes import recipe as recipe_by_name
from arat_fast.training.averaging import refresh_batch_norm
from arat_fast.training.checkpoint import (
    is_training_checkpoint,
    load_checkpoint,
    read_checkpoint_file,
)


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    recipe: str | None = None,
    norm: Literal["Linf", "L2"] | None = None,
    eps: float | None = None,
    num_steps: int | None = None,
    alpha: float | None = None,
    autoattack: bool = True,
    max_samples: int = 0,
    batch_size: int | None = None,
    data_root: Path | None = None,
    device: str = "auto",
    seed: int = 0,
    display: Display | None = None,
) -> dict[str, Any]:
    """Accuracies of a checkpoint on the test images of its dataset.

    Args:
        checkpoint: a run's folder, its checkpoint, exported safetensors, or an official AR-AT file.
        recipe: gives data, model and threat model; needed where the file does not hold them.
        norm, eps, num_steps, alpha, batch_size, data_root: override the run's; None keeps them.
        autoattack: run standard AutoAttack too.
        max_samples: the first samples only; 0 for all.
        device: auto, cpu, cuda or cuda:N.
        seed: of the attacks.
        display: where progress is shown.

    Returns:
        The record, as JSON types.

    Raises:
        FileNotFoundError: no such file, or the dataset is not there.
        ValueError: the file is cut or of another architecture, or a recipe is missing.
    """
    path = checkpoint / "checkpoint.pt" if checkpoint.is_dir() else checkpoint
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    target = resolve_device(device)
    content = None if path.suffix == ".safetensors" else read_checkpoint_file(path)
    state = load_checkpoint(path) if is_training_checkpoint(content) else None
    trained: Config | None = None
    if state is not None:
        trained = config = config_from_dict(state["config"])
    elif recipe is not None:
        config = recipe_by_name(recipe)
    else:
        raise ValueError(
            f"{path} holds weights only: add --recipe NAME to say which data and model they are for"
        )
    config = _with_overrides(
        config,
        data={"root": data_root},
        attack={"norm": norm, "eps": eps},
        eval={"num_steps": num_steps, "alpha": alpha, "batch_size": batch_size},
    )
    data = load_data(
        config.data, device=target, seed=config.seed, eval_batch_size=config.eval.batch_size
    )
    if state is not None and trained is not None:
        model, weights = _from_training(state, trained, data, target, path)
    else:
        model, weights = _from_weights(path, config, data), "file"
    model = model.to(target)
    images = ImageSet.from_batches(data.test, max_samples)
    start = time.perf_counter()
    with (display or Display()).evaluating() as bar:
        suite = evaluate_all(
            model,
            images,
            ThreatModel(config.attack.eps, config.attack.norm),
            num_steps=config.eval.num_steps,
            alpha=config.eval.alpha,
            with_autoattack=autoattack,
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


def _from_training(
    state: dict[str, Any], config: Config, data: DataSplits, device: torch.device, path: Path
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
            mixture=config.objective.name == "arat",
        )
    return model, config.average.kind


def _from_weights(path: Path, config: Config, data: DataSplits) -> nn.Module:
    if path.suffix != ".safetensors":
        return load_official_checkpoint(path, data.test.num_classes)
    model = build_model(config, data.test)
    if any(isinstance(module, SplitBatchNorm2d) for module in model.modules()):
        model = export_plain(model)
    load_safetensors(model, path)
    return model


def _with_overrides(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with the values that are not None put in."""
    changes = {}
    for name, values in sections.items():
        given = {key: value for key, value in values.items() if value is not None}
        changes[name] = dataclasses.replace(getattr(config, name), **given)
    return dataclasses.replace(config, **changes)
