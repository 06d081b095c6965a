"""The analyses of saved networks, as files beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
import tyro
from torch import nn

from arat_fast.analysis.attacker import attacker_numbers, attacker_view
from arat_fast.analysis.masking import masking_check
from arat_fast.analysis.snapshot import analyze_training, first_batches
from arat_fast.analysis.surface import loss_surface
from arat_fast.build import build_network, build_objective
from arat_fast.config import Config, DataConfig
from arat_fast.data import DataSplits, load_data
from arat_fast.data.bad_images import BadImages
from arat_fast.device import describe_device, resolve_device, source_commit, versions
from arat_fast.display import Display
from arat_fast.evaluation import ImageSet, ThreatModel
from arat_fast.evaluation.checkpoint import place_network
from arat_fast.files import write_atomic, write_json
from arat_fast.report.analysis import draw_analyses, read_analyses
from arat_fast.report.analysis_plots import (
    conflict_between,
    mixture_by_layer,
    mixture_over_time,
)
from arat_fast.report.run import read_run
from arat_fast.saved.network import SavedNetwork, read_saved
from arat_fast.saved.weights import load_weights
from arat_fast.training.checkpoint import load_checkpoint

Part = Literal["gradient-conflict", "mixture", "surface", "masking", "attacker"]
PARTS: tuple[Part, ...] = get_args(Part)

_TRAINING_PARTS = {"gradient-conflict": "gradient_conflict", "mixture": "mixture"}


@dataclasses.dataclass(frozen=True)
class AnalyzeSettings:
    """What to analyse and how thoroughly; the fields are those of ``arat-fast analyze``."""

    parts: tuple[Part, ...] = PARTS
    """What to do: gradient-conflict, mixture, surface, masking, attacker; default all."""
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
    num_surfaces: int = 6
    """Images whose surroundings are drawn; >= 1."""
    points: int = 41
    """Points along each side of a surface; odd, >= 3."""
    batch_size: int | None = None
    """Samples attacked at a time; default the run's."""
    data_root: Path | None = None
    """Folder of the datasets; default the run's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the attacks."""

    def __post_init__(self) -> None:
        for name, low in (("num_batches", 1), ("num_images", 0), ("num_surfaces", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")


@dataclasses.dataclass(frozen=True)
class AnalyzeOptions:
    """Gradient conflict, mixture distribution, loss surfaces, masked gradients, attacker's view."""

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
        folder: where its files are.
        records: what was found, by part.
        left_out: why a part was not done, by part.
    """

    name: str
    folder: Path
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
    """Analyse saved networks; numbers go to JSON files, arrays to NPZ files, one for each part.

    Gradient conflict and mixture distribution are those of the state of the training (its last
    weights and predictors), the rest is of the weights that are deployed, and on test images.

    Args:
        checkpoints: runs' folders, checkpoints, exported safetensors or official AR-AT files.
        settings: what to do.
        display: where progress is shown.

    Returns:
        One analysis per checkpoint; its folder is ``analysis`` in a run's folder, ``NAME.analysis``
        beside a file ``NAME.pt``. Plots of several networks together, ``compared-….png``, go to
        the folder of the first.

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
    found = [_analyze(each, networks, settings, display) for each in opened]
    if len(found) > 1:
        _write_comparison(opened, found)
    return found


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
    deployed = _of_network(opened, images, _rivals(opened, networks), settings, display, folder)
    deployed_about = {"model": opened.saved.weights, "split": "test", "seed": settings.seed}
    records |= {part: {**deployed_about, **record} for part, record in deployed.items()}
    for part, record in records.items():
        write_json(folder / f"{part}.json", {**about, **record})
    _write_plots(folder, opened)
    name = next(name for name, network in networks.items() if network is opened)
    return Analysis(name, folder, records, left_out)


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
        elif config.objective.name == "lbgat":
            left_out[part] = "the labels of lbgat reach its guide alone, and not the network"
        else:
            left_out[part] = (
                f"the loss of {config.objective.name} has no part that ties clean and adversarial "
                "images together"
            )
    return records, left_out


def _of_network(
    opened: _Opened,
    images: ImageSet,
    rivals: Mapping[str, nn.Module],
    settings: AnalyzeSettings,
    display: Display,
    folder: Path,
) -> dict[Part, dict[str, Any]]:
    """Surface, masking check and the attacker's view of the deployed weights."""
    config = opened.config
    threat = ThreatModel(config.attack.eps, config.attack.norm)
    attack: dict[str, Any] = {"num_steps": settings.num_steps, "alpha": threat.eps / 4}
    common: dict[str, Any] = {
        "batch_size": settings.batch_size or config.eval.batch_size,
        "seed": settings.seed,
    }
    model = opened.model
    records: dict[Part, dict[str, Any]] = {}
    if "surface" in settings.parts:
        few = ImageSet(
            images.x[: settings.num_surfaces], images.y[: settings.num_surfaces], images.classes
        )
        surface = loss_surface(model, few, threat, points=settings.points, **attack, **common)
        arrays = {"axis": surface.axis, "loss": surface.loss, "margin": surface.margin}
        names = [str(images.classes[label]) for label in few.y.tolist()]
        _write_npz(folder / "surface.npz", {**arrays, "labels": np.array(names)})
        records["surface"] = {"norm": threat.norm, "eps": threat.eps, **surface.record()}
    if "masking" in settings.parts:
        with display.evaluating() as bar:
            records["masking"] = masking_check(
                model,
                images,
                threat,
                num_steps=settings.num_steps,
                num_restarts=settings.num_restarts,
                num_queries=settings.num_queries,
                sources=rivals,
                progress=bar,
                **common,
            )
    if "attacker" in settings.parts:
        view = attacker_view(model, images, threat, **attack, **common)
        _write_npz(folder / "attacker.npz", view)
        records["attacker"] = {
            "norm": threat.norm,
            "eps": threat.eps,
            **attack,
            **attacker_numbers(view),
        }
    return records


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


def _write_plots(folder: Path, opened: _Opened) -> None:
    analyses = read_analyses(folder, opened.saved.steps)
    for name, drawing in draw_analyses(analyses, _analysis_lines(opened.path)).items():
        content = drawing.to_png()
        write_atomic(folder / f"{name}.png", partial(_write_all, content))


def _write_comparison(opened: Sequence[_Opened], found: Sequence[Analysis]) -> None:
    """Plots of several networks together, of what two or more of them have."""
    lines = {
        each.name: [_analysis_lines(one.path)] for one, each in zip(opened, found, strict=True)
    }
    along = {name: runs for name, runs in lines.items() if runs[0]}
    mixtures = {e.name: [e.records["mixture"]] for e in found if "mixture" in e.records}
    drawings = {
        "gradient-conflict": conflict_between(along) if len(along) > 1 else None,
        "mixture": mixture_over_time(along) if len(along) > 1 else None,
        "mixture-layers": mixture_by_layer(mixtures) if len(mixtures) > 1 else None,
    }
    for name, drawing in drawings.items():
        if drawing is not None:
            path = found[0].folder / f"compared-{name}.png"
            write_atomic(path, partial(_write_all, drawing.to_png()))


def _analysis_lines(checkpoint: Path) -> Sequence[Mapping[str, Any]]:
    return read_run(checkpoint).analyses if (checkpoint / "config.json").is_file() else ()


def _write_all(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    write_atomic(path, lambda file: np.savez(file, **arrays))
