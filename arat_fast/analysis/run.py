"""The analyses of saved networks, as files beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro
from torch import nn

from arat_fast.analysis.masking import masking_check
from arat_fast.analysis.snapshot import analyze_training, first_batches
from arat_fast.build import build_network, build_objective
from arat_fast.config import Config, DataConfig
from arat_fast.data import DataSplits, load_data
from arat_fast.data.bad_images import BadImages
from arat_fast.device import describe_device, resolve_device, source_commit, versions
from arat_fast.display import Display
from arat_fast.evaluation import ImageSet, ThreatModel
from arat_fast.evaluation.checkpoint import place_network
from arat_fast.files import write_json
from arat_fast.saved.network import SavedNetwork, read_saved
from arat_fast.saved.weights import load_weights
from arat_fast.training.checkpoint import load_checkpoint

Part = Literal["gradient-conflict", "mixture", "masking"]
PARTS: tuple[Part, ...] = get_args(Part)

_TRAINING_PARTS = {"gradient-conflict": "gradient_conflict", "mixture": "mixture"}


@dataclasses.dataclass(frozen=True)
class AnalyzeSettings:
    """What to analyse and how thoroughly; the fields are those of ``arat-fast analyze``."""

    parts: tuple[Part, ...] = PARTS
    """What to do: gradient-conflict, mixture, masking; default all."""
    recipe: str | None = None
    """Recipe whose data, model and threat model are used; needed where a file is no run's own."""
    source: tuple[Path, ...] = ()
    """More networks whose adversarial examples are tried on each; the others given are, too."""
    num_batches: int = 4
    """Training batches for gradient conflict and mixture distribution; >= 1."""
    num_images: int = 200
    """Test images for the attacks, the first ones; 0 for all."""
    num_steps: int = 50
    """Steps of PGD, >= 2; the step size is a quarter of the radius."""
    num_restarts: int = 5
    """Runs of PGD in the masking check; >= 2."""
    num_queries: int = 1000
    """Queries of Square for each image in the masking check; 0 leaves it out."""
    batch_size: int | None = None
    """Samples attacked at a time; default the run's."""
    data_root: Path | None = None
    """Folder of the datasets; default the run's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the attacks."""

    def __post_init__(self) -> None:
        for name, low in (("num_batches", 1), ("num_images", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")


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
    opener = _Opener(settings, display)
    paths = list(dict.fromkeys((*checkpoints, *settings.source)))
    names = short_names(paths)
    networks = {name: opener.open(path) for name, path in zip(names, paths, strict=True)}
    opened = [networks[names[paths.index(path)]] for path in dict.fromkeys(checkpoints)]
    return [_analyze(each, networks, settings, display) for each in opened]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names of runs' folders and of files, short, and no two the same.

    Args:
        paths: no two of them the same.
    """
    names = []
    for path in paths:
        whole = path.resolve()
        name = whole.name if path.is_dir() else f"{whole.parent.name}/{whole.stem}"
        number = 2
        unique = name
        while unique in names:
            unique, number = f"{name} ({number})", number + 1
        names.append(unique)
    return names


def analysis_folder(checkpoint: Path) -> Path:
    """Where the analysis of a checkpoint or of a run's folder is."""
    if checkpoint.is_dir():
        return checkpoint / "analysis"
    return checkpoint.with_name(f"{checkpoint.stem}.analysis")


class _Opener:
    """Opens networks; those of one dataset share it."""

    def __init__(self, settings: AnalyzeSettings, display: Display) -> None:
        self.settings = settings
        self.display = display
        self.device = resolve_device(settings.device)
        self.loaded: dict[tuple[DataConfig, int], DataSplits] = {}

    def open(self, checkpoint: Path) -> _Opened:
        saved = read_saved(checkpoint, recipe=self.settings.recipe, with_config=True)
        config = saved.config
        assert config is not None
        data_config = config.data
        if self.settings.data_root is not None:
            data_config = dataclasses.replace(data_config, root=self.settings.data_root)
        key = (data_config, config.seed)
        if key not in self.loaded:
            with self.display.evaluating() as bar:
                self.loaded[key] = load_data(
                    data_config,
                    device=self.device,
                    seed=config.seed,
                    eval_batch_size=config.eval.batch_size,
                    bad_images=BadImages(saved.path.parent, progress=bar),
                )
        data = self.loaded[key]
        model = place_network(saved, config, data, self.device)
        return _Opened(checkpoint, saved, config, data, model)


def _analyze(
    opened: _Opened,
    networks: Mapping[str, _Opened],
    settings: AnalyzeSettings,
    display: Display,
) -> Analysis:
    folder = analysis_folder(opened.path)
    folder.mkdir(exist_ok=True)
    config = opened.config
    images = ImageSet.from_batches(opened.data.test, settings.num_images)
    device = images.x.device
    about = {
        "checkpoint": str(opened.path),
        "recipe": config.recipe,
        "device": describe_device(device),
        "versions": versions(),
        "commit": source_commit(),
        "steps": opened.saved.steps,
    }
    records, left_out = _of_training(opened, settings)
    if "masking" in settings.parts:
        with display.evaluating() as bar:
            found = masking_check(
                opened.model,
                images,
                ThreatModel(config.attack.eps, config.attack.norm),
                num_steps=settings.num_steps,
                num_restarts=settings.num_restarts,
                num_queries=settings.num_queries,
                sources=_rivals(opened, networks),
                batch_size=settings.batch_size or config.eval.batch_size,
                seed=settings.seed,
                progress=bar,
            )
        deployed = {"model": opened.saved.weights, "split": "test", "seed": settings.seed}
        records["masking"] = {**deployed, **found}
    for part, record in records.items():
        write_json(folder / f"{part}.json", {**about, **record})
    name = next(name for name, network in networks.items() if network is opened)
    return Analysis(name, opened.path, folder, opened.saved.steps, records, left_out)


def _of_training(
    opened: _Opened, settings: AnalyzeSettings
) -> tuple[dict[Part, dict[str, Any]], dict[Part, str]]:
    """Gradient conflict and mixture distribution, and why one of them is left out."""
    wanted = [part for part in settings.parts if part in _TRAINING_PARTS]
    if not wanted:
        return {}, {}
    config, data = opened.config, opened.data
    if opened.saved.steps is None:
        reason = "the file holds no predictors and no training state; give a run's checkpoint"
        return {}, dict.fromkeys(wanted, reason)
    state = load_checkpoint(opened.saved.path)
    device = next(opened.model.parameters()).device
    model = build_network(config, data.train.num_classes, data.train.image_shape).to(device)
    objective = build_objective(config, model, data.train.num_classes, data.train.image_shape)
    load_weights(model, state["model"], str(opened.path))
    load_weights(objective, state["objective"], str(opened.path))
    batches = first_batches(data.train, settings.num_batches)
    found = analyze_training(config, model, objective, batches)
    records: dict[Part, dict[str, Any]] = {}
    left_out: dict[Part, str] = {}
    for part in wanted:
        record = found[_TRAINING_PARTS[part]]
        if record is not None:
            epochs = state["progress"]["step"] / len(data.train)
            records[part] = {"model": "last", "split": "train", "epoch": epochs, **record}
        elif part == "mixture":
            left_out[part] = "nothing is attacked in training, or there is no BatchNorm"
        elif objective.ties:
            left_out[part] = f"the labels of {objective.label} do not reach the network itself"
        else:
            left_out[part] = (
                f"the loss of {objective.label} has no part that ties clean and adversarial images "
                "together"
            )
    return records, left_out


def _rivals(opened: _Opened, networks: Mapping[str, _Opened]) -> dict[str, nn.Module]:
    """The other networks that see the same images and know the same classes."""
    shape, classes = opened.data.test.image_shape, opened.data.test.classes
    return {
        name: other.model
        for name, other in networks.items()
        if other is not opened
        and other.data.test.image_shape == shape
        and other.data.test.classes == classes
    }
