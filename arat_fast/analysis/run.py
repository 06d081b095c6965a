"""The analyses of saved networks, as files beside them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
import tyro
from torch import nn

from arat_fast.analysis.masking import masking_check
from arat_fast.analysis.snapshot import analyze_training
from arat_fast.build import build_network, build_objective
from arat_fast.command_line import NetworkName
from arat_fast.config import Config, DataConfig
from arat_fast.data import DataSplits, load_data
from arat_fast.data.bad_images import BadImages
from arat_fast.device import describe_device, resolve_device, source_commit, versions
from arat_fast.display import Display
from arat_fast.evaluation import ImageSet, ThreatModel
from arat_fast.evaluation.checkpoint import place_network
from arat_fast.files import make_folder, write_json
from arat_fast.saved.network import SavedNetwork, read_saved
from arat_fast.saved.weights import load_weights
from arat_fast.settings import Count, Number, Range, check_settings
from arat_fast.training.checkpoint import load_checkpoint

Part = Literal["gradient-conflict", "mixture", "masking"]
PARTS: tuple[Part, ...] = get_args(Part)
Several = Annotated[int, Range(low=2)]


@dataclasses.dataclass(frozen=True)
class AnalyzeSettings:
    """What to analyse and how thoroughly; the fields are those of ``arat-fast analyze``."""

    parts: tuple[Part, ...] = PARTS
    """What to do: gradient-conflict, mixture, masking; default all."""
    recipe: str | None = None
    """Recipe whose data, model and threat model are used; needed where a file is no run's own."""
    source: tuple[Path, ...] = ()
    """More networks whose adversarial examples are tried on each; the others given are, too."""
    num_batches: Count = 4
    """Training batches for gradient conflict and mixture distribution; >= 1."""
    num_images: Number = 200
    """Test images for the attacks, the first ones; 0 for all."""
    num_steps: Several = 50
    """Steps of PGD, >= 2; the step size is a quarter of the radius."""
    num_restarts: Several = 5
    """Runs of PGD in the masking check; >= 2."""
    num_queries: Number = 1000
    """Queries of Square for each image in the masking check; 0 leaves it out."""
    batch_size: Count | None = None
    """Samples attacked at a time; default the run's."""
    data_root: Path | None = None
    """Folder of the datasets; default the run's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the attacks."""

    def __post_init__(self) -> None:
        check_settings("", self)


@dataclasses.dataclass(frozen=True)
class AnalyzeOptions:
    """Gradient conflict, mixture distribution, masked gradients."""

    checkpoints: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")
    ]
    """Runs' folders, checkpoint.pt, model.safetensors, or official AR-AT checkpoints."""
    settings: Annotated[AnalyzeSettings, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=AnalyzeSettings
    )
    model: NetworkName = dataclasses.field(default_factory=NetworkName)


class Analysis(NamedTuple):
    """The analysis of one network.

    Attributes:
        name: of the network, short.
        checkpoint: what was given.
        folder: where its files are.
        steps: that the network was trained, None where the file does not say.
        records: what was found, by part.
        left_out: why a part was not done, by part.
    """

    name: str
    checkpoint: Path
    folder: Path
    steps: int | None
    records: dict[Part, dict[str, Any]]
    left_out: dict[Part, str]


class _Opened(NamedTuple):
    name: str
    path: Path
    saved: SavedNetwork
    config: Config
    data: DataSplits
    model: nn.Module


def analyze_networks(
    checkpoints: Sequence[Path], settings: AnalyzeSettings, display: Display | None = None
) -> list[Analysis]:
    """Analyse saved networks; the numbers go to JSON files, one for each part.

    Gradient conflict and mixture distribution are those of the state of the training (its last
    weights and predictors), the rest is of the weights that are deployed, and on test images.

    Args:
        checkpoints: runs' folders, checkpoints, exported safetensors or official AR-AT files.
        settings: what to do.
        display: where progress is shown.

    Returns:
        One analysis per checkpoint; its folder is ``analysis`` in a run's folder, ``NAME.analysis``
        beside a file ``NAME.pt``.

    Raises:
        FileNotFoundError: no such file, or the dataset is not there.
        ValueError: a file is cut or of another architecture, a recipe is missing, or an argument
            is out of range.
    """
    display = display or Display()
    device = resolve_device(settings.device)
    paths = list(dict.fromkeys((*checkpoints, *settings.source)))
    loaded: dict[tuple[DataConfig, int], DataSplits] = {}
    networks = {
        path: _open(path, name, settings, display, device, loaded)
        for name, path in zip(short_names(paths), paths, strict=True)
    }
    return [
        _analyze(networks[path], networks.values(), settings, display)
        for path in dict.fromkeys(checkpoints)
    ]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names of runs' folders and of files, short, and no two the same.

    Args:
        paths: no two of them the same.
    """
    names: list[str] = []
    for path in paths:
        whole = path.resolve()
        name = whole.name if path.is_dir() else f"{whole.parent.name}/{whole.stem}"
        others = (f"{name} ({number})" for number in itertools.count(2))
        names.append(
            next(unique for unique in itertools.chain([name], others) if unique not in names)
        )
    return names


def _open(
    path: Path,
    name: str,
    settings: AnalyzeSettings,
    display: Display,
    device: torch.device,
    loaded: dict[tuple[DataConfig, int], DataSplits],
) -> _Opened:
    """A network with its data, which those of one dataset share."""
    saved = read_saved(path, recipe=settings.recipe, with_config=True)
    config = saved.config
    assert config is not None
    data_config = config.data
    if settings.data_root is not None:
        data_config = dataclasses.replace(data_config, root=settings.data_root)
        display.say(f"images from {settings.data_root}; the run had them from {config.data.root}")
    key = (data_config, config.seed)
    if key not in loaded:
        with display.evaluating() as bar:
            loaded[key] = load_data(
                data_config,
                device=device,
                seed=config.seed,
                eval_batch_size=config.eval.batch_size,
                bad_images=BadImages(saved.path.parent, progress=bar),
            )
    model = place_network(saved, config, loaded[key], device)
    return _Opened(name, path, saved, config, loaded[key], model)


def _analyze(
    opened: _Opened, networks: Iterable[_Opened], settings: AnalyzeSettings, display: Display
) -> Analysis:
    path, saved, config, test = opened.path, opened.saved, opened.config, opened.data.test
    folder = path / "analysis" if path.is_dir() else path.with_name(f"{path.stem}.analysis")
    make_folder(folder)
    images = ImageSet.from_batches(test, settings.num_images)
    records, left_out = _of_training(opened, settings)
    if "masking" in settings.parts:
        rivals = {
            other.name: other.model
            for other in networks
            if other is not opened
            and other.data.test.image_shape == test.image_shape
            and other.data.test.classes == test.classes
        }
        with display.evaluating() as bar:
            found = masking_check(
                opened.model,
                images,
                ThreatModel(config.attack.eps, config.attack.norm),
                num_steps=settings.num_steps,
                num_restarts=settings.num_restarts,
                num_queries=settings.num_queries,
                sources=rivals,
                batch_size=settings.batch_size or config.eval.batch_size,
                seed=settings.seed,
                progress=bar,
            )
        deployed = {"model": saved.weights, "split": "test", "seed": settings.seed}
        records["masking"] = {**deployed, **found}
    about = {
        "checkpoint": str(path),
        "recipe": config.recipe,
        "device": describe_device(images.x.device),
        "versions": versions(),
        "commit": source_commit(),
        "steps": saved.steps,
        **({"train_limit": config.data.limit} if config.data.limit else {}),
    }
    for part, record in records.items():
        write_json(folder / f"{part}.json", {**about, **record})
    return Analysis(opened.name, path, folder, saved.steps, records, left_out)


def _of_training(
    opened: _Opened, settings: AnalyzeSettings
) -> tuple[dict[Part, dict[str, Any]], dict[Part, str]]:
    """Gradient conflict and mixture distribution, and why one of them is left out."""
    wanted: list[Part] = [part for part in settings.parts if part != "masking"]
    if not wanted:
        return {}, {}
    config, data = opened.config, opened.data.train
    if opened.saved.steps is None:
        reason = "the file holds no predictors and no training state; give a run's checkpoint"
        return {}, dict.fromkeys(wanted, reason)
    state = load_checkpoint(opened.saved.path)
    device = next(opened.model.parameters()).device
    model = build_network(config, data.num_classes, data.image_shape).to(device)
    objective = build_objective(config, model, data.num_classes, data.image_shape)
    load_weights(model, state["model"], str(opened.path))
    load_weights(objective, state["objective"], str(opened.path))
    batches = itertools.islice(data.epoch(0), settings.num_batches)
    found = analyze_training(config, model, objective, batches)
    about = {"model": "last", "split": "train", "epoch": state["progress"]["step"] / len(data)}
    if objective.ties:
        why = f"the labels of {objective.label} do not reach the network itself"
    else:
        why = f"the loss of {objective.label} has no part that ties clean to adversarial images"
    reasons: dict[Part, str] = {
        "gradient-conflict": why,
        "mixture": "nothing is attacked in training, or there is no BatchNorm",
    }
    records: dict[Part, dict[str, Any]] = {
        part: {**about, **record}
        for part in wanted
        if (record := found[part.replace("-", "_")]) is not None
    }
    return records, {part: reasons[part] for part in wanted if part not in records}
