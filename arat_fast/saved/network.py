"""A saved network without its dataset, whoever wrote the file.

A file is read in three steps: what it holds (tensors and facts, :class:`Content`), what a recipe
adds to that, and the network.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arat_fast.attacks.norms import NORMS
from arat_fast.build import build_network
from arat_fast.config import Config, config_from_dict, recorded_model
from arat_fast.data.fingerprint import class_names
from arat_fast.datasets import DATASETS
from arat_fast.files import parse_json, read_json
from arat_fast.models.registry import MODELS, adopt_model, create_model, image_size
from arat_fast.recipes import recipe as recipe_by_name
from arat_fast.saved.hub import SCHEME, fetched
from arat_fast.saved.naming import SCHEMES, to_own
from arat_fast.saved.official import detect, is_official, official_to_state_dict
from arat_fast.saved.plain import export_plain
from arat_fast.saved.weights import (
    NORMALIZATION,
    is_split,
    load_weights,
    network_size,
    read_safetensors,
    state_dict_of,
    without_wrappers,
)
from arat_fast.training.checkpoint import (
    CHECKPOINT,
    is_training_checkpoint,
    read_tensor_file,
    training_state,
)

SAFETENSORS = "model.safetensors"
RECORD = "config.json"
"""Of a run's folder: its configuration. Of an export: what was exported."""

Which = Literal["deployed", "last"]
_NO_RECIPE = (
    "holds weights only, and not those of an official AR-AT checkpoint (BatchNorm branches clean "
    "and adv): name the recipe that says which data and model they are for (--recipe NAME; in "
    "Python recipe=NAME), or load them into a network of your own by "
    "network.load_state_dict(safetensors.torch.load_file(FILE))"
)


@dataclass(frozen=True)
class SavedNetwork:
    """A network that was read.

    Attributes:
        path: the file.
        model: the network, float32, on the CPU, in eval mode.
        config: of the run that wrote it, else the recipe's; None where neither is known.
        facts: as :func:`describe` writes them, as far as they are known; "branch" is "both" for a
            network with split BatchNorm, and "weights" is "file" where the file does not say.
        steps: steps trained; None where the file does not say.
        steps_per_epoch: of the run; None where the file does not say.
        num_classes: number of logits.
        statistics_fresh: False for an SWA average whose BatchNorm statistics were not yet
            re-estimated.
    """

    path: Path
    model: nn.Module
    config: Config | None
    facts: Mapping[str, Any]
    num_classes: int
    steps: int | None = None
    steps_per_epoch: int | None = None
    statistics_fresh: bool = True

    @property
    def name(self) -> str:
        """Name of the network that it is."""
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
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the logits; empty where the file has none."""
        names = tuple(self.facts.get("classes", ()))
        return names if self.config is None else class_names(self.config.data.name, names)

    @property
    def unfinished(self) -> tuple[int, int] | None:
        """Steps trained and those of the whole run, where it had not come to its end."""
        if self.config is None or self.steps is None or self.steps_per_epoch is None:
            return None
        train = self.config.train
        whole = self.steps_per_epoch * train.epochs
        whole = min(train.max_steps or whole, whole)
        return (self.steps, whole) if self.steps < whole else None

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
    config: Config,
    weights: str,
    branch: str,
    image_shape: tuple[int, int, int],
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """What is written beside exported weights, as JSON types.

    Args:
        config: of the run.
        weights: "last" or the kind of the average.
        branch: "adv" or "clean" of a split BatchNorm, or "shared".
        image_shape: (C, H, W).
        classes: names in the order of the logits; empty where they are not known.
    """
    dataset, crop = DATASETS[config.data.name], config.data.crop
    # Images of one size, and those in arrays, are not cut.
    cut = None if dataset.image_size else dataset.crop
    if cut and crop != "auto":
        cut = crop
    return {
        "recipe": config.recipe,
        "dataset": config.data.name,
        "model": config.model.name,
        "objective": config.objective.name,
        "weights": weights,
        "branch": branch,
        "norm": config.attack.norm,
        "eps": config.attack.eps,
        "mean": list(config.model.mean),
        "std": list(config.model.std),
        "activation": config.model.activation,
        "image_shape": list(image_shape),
        "additional_data": config.data.unsup is not None,
        **({"crop": cut} if cut else {}),
        **({"classes": list(classes)} if classes else {}),
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
    model: str | nn.Module | Callable[..., nn.Module] | None = None,
) -> SavedNetwork:
    """Read a network, whatever wrote it, without its dataset.

    Args:
        path: a file or a folder, as in :func:`arat_fast.load`.
        recipe: gives the configuration where the file does not hold it.
        weights: "deployed", the average where the run has one, or "last".
        with_config: refuse a file whose data and threat model are not known.
        model: of a network of one's own, as in :func:`arat_fast.load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or does not fit the network it names, or a recipe is
            needed.
    """
    content = read_content(path, weights)
    path, found = content.path, content.facts
    if weights == "last" and found.get("weights", "file") not in ("last", "file"):
        raise ValueError(f"{path} holds the {found['weights']} weights only, got --weights last")
    config = content.config or _config(path, found, recipe, with_config)
    # Recipes have no additional data; the run may have had some.
    known = {} if config is None else describe(config, "file", "adv", (0, 0, 0))
    facts: dict[str, Any] = {"branch": "adv", "weights": "file", "mean": [], "std": []}
    facts |= {"activation": "relu", **known, "additional_data": None, **found}
    if "model" not in (facts if model is None else found):
        raise ValueError(f"{path} {_NO_RECIPE}")
    name, tensors = facts["model"], content.tensors
    if model is not None and name not in MODELS:
        adopt_model(name, model)
    norm: Literal["split", "shared"] = "split" if is_split(tensors) else "shared"
    try:
        if name in MODELS and content.config is None:
            with torch.device("meta"):
                own = create_model(name, 2, norm=norm).state_dict()
            tensors = to_own(_under_own_names(tensors, own), own)
        if name in MODELS:
            classes, channels = network_size(tensors, name)
        elif {"classes", "image_shape"} <= found.keys():
            classes, channels = len(found["classes"]), found["image_shape"][0]
        else:
            raise ValueError(
                f"of {name} a run's own file is expected, which names classes and images"
            )
        if "image_shape" not in found:
            size = image_size(name)
            if config is not None:
                size = DATASETS[config.data.name].image_size or config.data.image_size
            facts["image_shape"] = [channels, size, size]
        if content.config is not None:
            network = build_network(content.config, classes, tuple(found["image_shape"]))
        else:
            network = create_model(
                name,
                classes,
                channels,
                norm,
                tuple(facts["mean"]),
                tuple(facts["std"]),
                facts["activation"],
                facts["image_shape"][1],
            )
    except ValueError as error:
        raise ValueError(f"{path} does not fit the network: {error}") from error
    load_weights(network, tensors, str(path))
    return SavedNetwork(path, network.eval(), config, facts, classes, **content.progress)


def read_weights(
    path: Path, config: Config, num_classes: int, image_shape: tuple[int, int, int]
) -> SavedNetwork:
    """A network with the weights of a file that holds nothing else, whoever wrote it.

    Args:
        path: of a state dict, .safetensors or by ``torch.save``, bare or in the usual wrapping;
            what it normalises with itself is taken over.
        config: names the network; its own module is imported.
        num_classes: number of logits.
        image_shape: (C, H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or does not fit the network.
    """
    content = _of_tensors(path, _tensor_file(path)[0], {})
    own = config.model
    normalization = {
        key: tuple(content.facts.get(key, getattr(own, key))) for key in ("mean", "std")
    }
    model = create_model(
        own.name,
        num_classes,
        image_shape[0],
        "shared",
        **normalization,
        activation=own.activation,
        image_size=image_shape[1],
    )
    # Files from before PyTorch 0.4.1 do not count batches.
    counts = {k: v for k, v in model.state_dict().items() if k.endswith(".num_batches_tracked")}
    tensors = _under_own_names(content.tensors, model.state_dict())
    load_weights(model, {**counts, **tensors}, str(path))
    facts = {**describe(config, "file", "shared", image_shape), **content.facts, **normalization}
    return SavedNetwork(path, model.eval(), config, facts, num_classes)


def _under_own_names(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was read without wrappers, for a network whose own names may all begin alike."""
    names = dict(zip(without_wrappers(own), own, strict=True))
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Content:
    """Of a file: tensors under the names of the built-in network, and what it says of them."""

    path: Path
    tensors: Mapping[str, Tensor]
    facts: dict[str, Any]
    config: Config | None = None
    progress: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_content(path: str | Path, weights: Which = "deployed") -> Content:
    """What a file holds, without building its network.

    Args:
        path: a file or a folder, as in :func:`arat_fast.load`.
        weights: of a run, as for :func:`read_saved`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    path = _main_file(path)
    if path.name == RECORD:
        return _from_export(path, read_json(path))
    content, strings = _tensor_file(path)
    if is_training_checkpoint(content):
        return _from_training(path, training_state(content, path), weights)
    return _of_tensors(path, content, _parse(path, strings))


def _main_file(path: str | Path) -> Path:
    """Of a folder what tells most: a run's checkpoint, an export's record, bare weights; a folder
    on the hub is fetched."""
    name = str(path)
    path = fetched(name[len(SCHEME) :]) if name.startswith(SCHEME) else Path(path)
    if not path.is_dir() or (path / CHECKPOINT).is_file():
        return path / CHECKPOINT if path.is_dir() else path
    if (path / RECORD).is_file() and "format" in read_json(path / RECORD):
        return path / RECORD
    return path / (SAFETENSORS if (path / SAFETENSORS).is_file() else CHECKPOINT)


def _tensor_file(path: Path) -> tuple[object, dict[str, str]]:
    """The content of a file of tensors, and the strings in its header where it has one."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return read_tensor_file(path), {}


def _of_tensors(path: Path, content: object, facts: dict[str, Any]) -> Content:
    tensors = state_dict_of(content, path)
    for key in ("mean", "std"):
        # What the file itself normalises with, where it does.
        if f"{NORMALIZATION}{key}" in tensors:
            facts[key] = tensors.pop(f"{NORMALIZATION}{key}").flatten().tolist()
    if is_official(tensors):
        try:
            tensors = official_to_state_dict(tensors)
            # The official networks do not normalise.
            facts = {"model": detect(tensors), "mean": [], "std": [], **facts}
        except ValueError as error:
            raise ValueError(f"{path} is not an official checkpoint: {error}") from error
    if is_split(tensors):
        facts["branch"] = "both"
    return Content(path, tensors, facts)


def _from_training(path: Path, state: Mapping[str, Any], weights: Which) -> Content:
    config, average = config_from_dict(state["run"]["config"]), state["average"]
    averaged = weights == "deployed" and average["model"] is not None
    tensors = average["model"] if averaged else state["model"]
    facts = describe(
        config,
        config.average.kind if averaged else "last",
        "both" if is_split(tensors) else "shared",
        tuple(state["run"]["image_shape"]),
        state["run"].get("classes", ()),
    )
    progress = {
        "steps": state["progress"]["step"],
        "steps_per_epoch": state["progress"]["steps_per_epoch"],
        "statistics_fresh": bool(average["statistics_fresh"]) if averaged else True,
    }
    return Content(path, tensors, facts, config, progress)


def _from_export(path: Path, record: Mapping[str, Any]) -> Content:
    scheme, name = str(record["format"]), str(record.get("weights_file"))
    if scheme not in SCHEMES:
        reader = {"torch-export": "torch.export.load", "onnx": "onnxruntime"}.get(scheme)
        hint = f"run its {name} with {reader}" if reader else f"expected {', '.join(SCHEMES)}"
        raise ValueError(f"{path.parent} is an export in the format {scheme}: {hint}")
    file = path.parent / name
    # By its name: in the cache of a hub files are links to where they lie.
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{path} names the file {name}, expected one in its own folder")
    content = _of_tensors(file, _tensor_file(file)[0], _parse(path, record))
    return dataclasses.replace(content, path=path)


def _parse(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a header or a record, with their types; what else is there is left out."""
    facts = {}
    for key, (read, fits) in FACTS.items():
        value = values.get(key)
        if value is None:
            continue
        try:
            # In a header everything is a string.
            is_json = isinstance(value, str) and read is not str
            facts[key] = read(parse_json(value) if is_json else value)
            if not fits(facts[key]):
                raise ValueError("not a value of it")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} has metadata that no run writes: {key}={value!r} ({error})"
            ) from error
    return facts


FACTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool]]] = {
    **{key: (str, bool) for key in ("recipe", "dataset", "model", "objective", "weights")},
    "branch": (str, ("adv", "clean", "shared").__contains__),
    "activation": (str, ("relu", "silu").__contains__),
    "norm": (str, NORMS.__contains__),
    "eps": (float, lambda eps: 0 <= eps < math.inf),
    "mean": (lambda values: [*map(float, values)], lambda _: True),
    "std": (lambda values: [*map(float, values)], lambda _: True),
    "image_shape": (lambda values: [*map(int, values)], lambda s: len(s) == 3),
    "crop": (str, ("pad", "resized").__contains__),
    "additional_data": (lambda value: value, (True, False).__contains__),
    "classes": (lambda names: [*map(str, names)], lambda n: len(n) == len(set(n))),
}
"""What :func:`describe` writes: how each is read, and whether it can be."""


def _config(
    path: Path, facts: Mapping[str, Any], recipe: str | None, required: bool
) -> Config | None:
    """What a run wrote beside its exported weights, over the recipe's configuration."""
    name = recipe or facts.get("recipe")
    if name is None:
        if required:
            raise ValueError(f"{path} {_NO_RECIPE}")
        return None
    told: dict[str, Any] = {k: tuple(facts[k]) for k in ("mean", "std") if k in facts}
    told |= {k: facts[f] for k, f in (("name", "model"), ("activation",) * 2) if f in facts}
    data: dict[str, Any] = {
        k: facts[f] for k, f in (("name", "dataset"), ("crop",) * 2) if f in facts
    }
    if "image_shape" in facts:
        data["image_size"] = facts["image_shape"][1]
    attack = {key: facts[key] for key in ("norm", "eps") if key in facts}
    try:
        config = recipe_by_name(name)
        model = {**vars(config.model), **told}
        return dataclasses.replace(
            config,
            model=recorded_model(model["name"])(**model),
            data=dataclasses.replace(config.data, **data),
            attack=dataclasses.replace(config.attack, **attack),
        )
    except ValueError as error:
        # The weights can be used whether or not this version has the recipe that they name.
        if recipe is None and not required:
            return None
        raise ValueError(f"{path}: {error}") from error


def _contiguous(model: nn.Module) -> nn.Module:
    """The same logits, bit for bit, wherever a network was read from."""
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's stub
    return model
