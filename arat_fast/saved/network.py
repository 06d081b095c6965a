"""A saved network without its dataset, whoever wrote the file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arat_fast.build import build_network
from arat_fast.config import Config, config_from_dict
from arat_fast.datasets import DATASETS
from arat_fast.models.registry import create_model, model_spec
from arat_fast.models.split_batch_norm import SplitBatchNorm2d
from arat_fast.recipes import recipe as recipe_by_name
from arat_fast.saved.naming import NORMALIZATION, SCHEMES, from_scheme
from arat_fast.saved.official import official_network
from arat_fast.saved.plain import export_plain, read_safetensors
from arat_fast.saved.weights import load_weights, network_size, read_tensor_file
from arat_fast.training.checkpoint import CHECKPOINT, is_training_checkpoint, training_state

SAFETENSORS = "model.safetensors"
RECORD = "config.json"
"""Of a run's folder: its configuration. Of an export: what was exported."""

Which = Literal["deployed", "last"]

_TEXTS = ("recipe", "model", "objective", "weights", "branch", "norm")
_NUMBERS = {"eps": float, "mean": float, "std": float, "image_shape": int}
_FLAG = "additional_data"


@dataclass(frozen=True)
class SavedNetwork:
    """What a file holds.

    Attributes:
        path: the file.
        model: the network, float32, on the CPU, in eval mode.
        config: of the run that wrote it, else the recipe's; None where neither is known.
        facts: as :func:`describe` writes them, as far as they are known; "branch" is "both" for a
            network with split BatchNorm, and "weights" is "file" where the file does not say.
        steps: steps trained; None where the file does not say.
        steps_per_epoch: of the run; None where the file does not say.
        statistics_fresh: False for an SWA average whose BatchNorm statistics were not yet
            re-estimated.
    """

    path: Path
    model: nn.Module
    config: Config | None
    facts: Mapping[str, Any]
    steps: int | None = None
    steps_per_epoch: int | None = None
    statistics_fresh: bool = True

    @property
    def name(self) -> str:
        """Name of the built-in network that it is."""
        return str(self.facts["model"])

    @property
    def weights(self) -> str:
        """ "last", the kind of the average ("swa", "ema"), or "file"."""
        return str(self.facts["weights"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images it is for."""
        channels, height, width = self.facts["image_shape"]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return network_size(self.model.state_dict(), self.name)[0]

    def plain(self, branch: Literal["adv", "clean"] | None = None) -> tuple[nn.Module, str]:
        """The network with ordinary BatchNorm, in eval mode, and the branch that it is.

        Args:
            branch: of a network with two; None takes "adv", or what the file has.

        Returns:
            The network and "adv", "clean" or, where there was never but one, "shared".

        Raises:
            ValueError: the file has another branch only, or statistics that were never estimated.
        """
        if not self.statistics_fresh:
            raise ValueError(
                f"{self.path}: the run stopped before the BatchNorm statistics of its average were "
                "estimated; finish it with --resume, or take its last weights (--weights last)"
            )
        own = str(self.facts["branch"])
        if own == "both":
            return _contiguous(export_plain(self.model, branch or "adv")), branch or "adv"
        if branch is not None and branch != own:
            raise ValueError(
                f"{self.path} has no {branch} branch to choose, its BatchNorm is {own}: leave out "
                "the branch"
            )
        return _contiguous(self.model), own


def describe(
    config: Config, weights: str, branch: str, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """What is written beside exported weights, as JSON types.

    Args:
        config: of the run.
        weights: "last" or the kind of the average.
        branch: "adv" or "clean" of a split BatchNorm, or "shared".
        image_shape: (C, H, W).
    """
    return {
        "recipe": config.recipe,
        "model": config.model.name,
        "objective": config.objective.name,
        "weights": weights,
        "branch": branch,
        "norm": config.attack.norm,
        "eps": config.attack.eps,
        "mean": list(config.model.mean),
        "std": list(config.model.std),
        "image_shape": list(image_shape),
        "additional_data": config.data.unsup is not None,
    }


def header(facts: Mapping[str, Any]) -> dict[str, str]:
    """:func:`describe` as the strings of a safetensors header."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}


def read_saved(
    path: str | Path,
    *,
    recipe: str | None = None,
    weights: Which = "deployed",
    with_config: bool = False,
) -> SavedNetwork:
    """Read a network, whatever wrote it, without its dataset.

    Args:
        path: a file or a folder, as in :func:`arat_fast.load`.
        recipe: gives the configuration where the file does not hold it.
        weights: "deployed", the average where the run has one, or "last".
        with_config: refuse a file whose data and threat model are not known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or does not fit the network it names, or a recipe is
            needed.
    """
    path = Path(path)
    if path.is_dir():
        path = _main_file(path)
    if path.name == RECORD:
        facts, tensors = _read_export(path)
        found = _exported(path, tensors, facts, recipe, with_config)
    elif path.suffix == ".safetensors":
        tensors, strings = read_safetensors(path)
        found = _exported(path, tensors, _parse(path, strings), recipe, with_config)
    else:
        content = read_tensor_file(path)
        if is_training_checkpoint(content):
            return _from_training(path, training_state(content, path), weights)
        found = _from_official(path, content, recipe, with_config)
    if weights == "last" and found.weights not in ("last", "file"):
        raise ValueError(f"{path} holds the {found.weights} weights only, got --weights last")
    return found


def _main_file(folder: Path) -> Path:
    """What tells most: a run's checkpoint, else an export's record, else bare weights."""
    record = folder / RECORD
    if not (folder / CHECKPOINT).is_file():
        if record.is_file() and "format" in _read_json(record):
            return record
        if (folder / SAFETENSORS).is_file():
            return folder / SAFETENSORS
    return folder / CHECKPOINT


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def _read_export(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of an export, under the names of the built-in network."""
    record = _read_json(path)
    scheme, name = record["format"], record.get("weights_file")
    if not isinstance(scheme, str) or scheme not in SCHEMES or not isinstance(name, str):
        reader = {"torch-export": "torch.export.load", "onnx": "onnxruntime"}.get(str(scheme))
        hint = f"run its {name} with {reader}" if reader else f"expected {', '.join(SCHEMES)}"
        raise ValueError(f"{path.parent} is an export in the format {scheme}: {hint}")
    file = path.parent / name
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError(f"{path} names the file {name}, expected one in its own folder")
    if file.suffix == ".safetensors":
        tensors, _ = read_safetensors(file)
    else:
        content = read_tensor_file(file)
        if not isinstance(content, dict) or any(
            not isinstance(value, Tensor) for value in content.values()
        ):
            raise ValueError(f"{file}: expected a state dict, got a {type(content).__name__}")
        tensors = content
    known = {key: record[key] for key in (*_TEXTS, *_NUMBERS, _FLAG) if record.get(key) is not None}
    facts = _parse(path, known)
    for key in ("mean", "std"):
        # What the file itself normalises with, where it does.
        if f"{NORMALIZATION}{key}" in tensors:
            facts[key] = tensors[f"{NORMALIZATION}{key}"].flatten().tolist()
    return facts, from_scheme(tensors, scheme)


def _parse(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a header or a record, with their types; what else is there is left out."""
    facts: dict[str, Any] = {key: str(values[key]) for key in _TEXTS if key in values}
    for key, number in _NUMBERS.items():
        if key not in values:
            continue
        try:
            value = values[key]
            value = json.loads(value) if isinstance(value, str) else value
            facts[key] = number(value) if key == "eps" else [number(item) for item in value]
        except (ValueError, TypeError) as error:
            raise _odd(path, f"{key}={values[key]!r}") from error
    if _FLAG in values:
        flag = str(values[_FLAG]).lower()
        if flag not in ("true", "false"):
            raise _odd(path, f"{_FLAG}={values[_FLAG]!r}, expected true or false")
        facts[_FLAG] = flag == "true"
    if facts.get("norm", "Linf") not in ("Linf", "L2"):
        raise _odd(path, f"norm={facts['norm']!r}, expected Linf or L2")
    if not 0 <= facts.get("eps", 0.0) < math.inf:
        raise _odd(path, f"eps={values['eps']!r}, expected a radius >= 0")
    if len(facts.get("image_shape", "CHW")) != 3:
        raise _odd(path, f"image_shape={values['image_shape']!r}, expected three numbers")
    return facts


def _odd(path: Path, what: object) -> ValueError:
    return ValueError(f"{path} has metadata that no run writes: {what}")


def _exported(
    path: Path,
    tensors: Mapping[str, Tensor],
    found: dict[str, Any],
    recipe: str | None,
    with_config: bool,
) -> SavedNetwork:
    config = None
    if recipe or with_config:
        config = _exported_config(path, found, recipe)
    elif "recipe" in found:
        # The weights can be used whether or not this version has the recipe.
        try:
            config = _exported_config(path, found, None)
        except ValueError:
            config = None
    name = found.get("model") or (config.model.name if config is not None else None)
    if name is None:
        raise ValueError(_no_recipe(path))
    try:
        model_spec(name)
    except ValueError as error:
        raise _odd(path, error) from error
    try:
        classes, channels = network_size(tensors, name)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the network: {error}") from error
    # What the file does not say is the recipe's, where one is known.
    known = {} if config is None else describe(config, "file", "adv", (0, 0, 0))
    mean, std = (tuple(found.get(key, known.get(key, ()))) for key in ("mean", "std"))
    try:
        model = create_model(name, classes, channels, "shared", mean, std)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    load_weights(model, tensors, str(path))
    facts = {
        # A header without it is of the branch that is deployed.
        **known,
        "mean": mean,
        "std": std,
        "image_shape": (channels, *_image_size(config, name)),
        # Recipes have none; the run may have had some.
        _FLAG: None,
        **found,
        "model": name,
    }
    facts.setdefault("branch", "adv")
    facts.setdefault("weights", "file")
    if facts["branch"] not in ("adv", "clean", "shared"):
        raise _odd(path, f"branch={facts['branch']!r}")
    return SavedNetwork(path, model.eval(), config, facts)


def _exported_config(path: Path, facts: Mapping[str, Any], recipe: str | None) -> Config:
    """What a run wrote beside its exported weights, over the recipe's."""
    config = _recipe_for(path, recipe or facts.get("recipe"))
    lists = {key: tuple(facts[key]) for key in ("mean", "std") if key in facts}
    try:
        return dataclasses.replace(
            config,
            model=_replaced(config.model, name=facts.get("model"), **lists),
            attack=_replaced(config.attack, norm=facts.get("norm"), eps=facts.get("eps")),
        )
    except ValueError as error:
        raise _odd(path, error) from error


def _replaced(section: Any, **values: Any) -> Any:
    return dataclasses.replace(section, **{k: v for k, v in values.items() if v is not None})


def _recipe_for(path: Path, recipe: str | None) -> Config:
    if recipe is None:
        raise ValueError(_no_recipe(path))
    return recipe_by_name(recipe)


def _no_recipe(path: Path) -> str:
    return f"{path} holds weights only: add --recipe NAME to say which data and model they are for"


def _contiguous(model: nn.Module) -> nn.Module:
    """The same logits, bit for bit, wherever a network was read from."""
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's stub
    return model


def _image_size(config: Config | None, name: str) -> tuple[int, int]:
    if config is None:
        size = model_spec(name).image_size
    else:
        size = DATASETS[config.data.name].image_size or config.data.image_size
    return size, size


def _from_training(path: Path, state: dict[str, Any], weights: Which) -> SavedNetwork:
    config = config_from_dict(state["run"]["config"])
    average = state["average"]
    averaged = weights == "deployed" and average["model"] is not None
    tensors = average["model"] if averaged else state["model"]
    try:
        classes, channels = network_size(tensors, config.model.name)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the network: {error}") from error
    shape = tuple(state["run"]["image_shape"])
    model = build_network(config, classes, shape)
    load_weights(model, tensors, str(path))
    split = any(isinstance(module, SplitBatchNorm2d) for module in model.modules())
    return SavedNetwork(
        path,
        model.eval(),
        config,
        describe(
            config,
            config.average.kind if averaged else "last",
            "both" if split else "shared",
            shape,
        ),
        steps=state["progress"]["step"],
        steps_per_epoch=state["progress"]["steps_per_epoch"],
        statistics_fresh=bool(average["statistics_fresh"]) if averaged else True,
    )


def _from_official(
    path: Path, content: object, recipe: str | None, with_config: bool
) -> SavedNetwork:
    config = _recipe_for(path, recipe) if recipe or with_config else None
    model, name = official_network(content, path)
    shape = (network_size(model.state_dict(), name)[1], *_image_size(config, name))
    facts: dict[str, Any] = {"mean": (), "std": (), "image_shape": shape}
    if config is not None:
        facts |= describe(config, "file", "both", shape)
    # The official networks do not normalise; what they were trained on is not in the file.
    facts |= {"model": name, "weights": "file", "branch": "both", "mean": (), "std": ()}
    facts[_FLAG] = None
    return SavedNetwork(path, model, config, facts)
