"""Evaluation of a saved network, whoever wrote it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import nn

from arat_fast import doctor
from arat_fast.attacks import PGD
from arat_fast.build import build_objective
from arat_fast.config import OWN_IMAGES, Config, DataConfig, EvalConfig, ModelConfig
from arat_fast.data import DataSplits, load_data
from arat_fast.data.bad_images import BadImages
from arat_fast.data.batches import stream_generator
from arat_fast.data.fingerprint import class_order
from arat_fast.data.load import download_data
from arat_fast.data.prepare import own_dataset
from arat_fast.datasets import DATASETS
from arat_fast.device import describe_device, source_commit, versions
from arat_fast.display import Display
from arat_fast.distributed import ALONE, Ranks
from arat_fast.evaluation.evaluate import ImageSet, ThreatModel
from arat_fast.evaluation.pieces import checksum
from arat_fast.evaluation.record import (
    checksum_of_images,
    earlier_record,
    root_of_own_images,
    save_per_example,
    set_damaged_aside,
)
from arat_fast.evaluation.suite import attacks_left_out, evaluate_all, per_example
from arat_fast.files import alone, write_json
from arat_fast.recipes import recipe as recipe_by_name
from arat_fast.saved.network import SavedNetwork, read_saved, read_weights
from arat_fast.settings import NormName
from arat_fast.training.averaging import refresh_batch_norm

Section = TypeVar("Section", DataConfig, EvalConfig)


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    model: ModelConfig | None = None,
    data: str | None = None,
    recipe: str | None = None,
    norm: NormName | None = None,
    eps: float | None = None,
    num_steps: int | None = None,
    alpha: float | None = None,
    attacks: Sequence[str] = ("pgd", "autoattack"),
    max_samples: int = 0,
    num_restarts: int = 1,
    batch_size: int | None = None,
    data_root: Path | None = None,
    device: str = "auto",
    seed: int = 0,
    out: Path | None = None,
    display: Display | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Accuracies of a checkpoint on the test images of its dataset, or on others.

    Args:
        checkpoint: a run's folder, its checkpoint, exported weights or their folder, or an official
            AR-AT file; with ``model`` any file of that network's weights.
        model: the network that a file holds nothing but the weights of; its module is imported.
        data: other images with the same classes: a dataset by its name, or a folder or a file of
            one's own; where these have no test images, all of them are taken. None: the run's own.
        recipe: gives data, model and threat model; needed where the file does not hold them. A
            run's own checkpoint does; its exported weights name recipe, model and ball.
        norm, eps, num_steps, alpha, batch_size, data_root: override the run's; None keeps them.
            Another norm needs a radius; in another ball the step size is a quarter of it.
        attacks: of :data:`arat_fast.evaluation.suite.ATTACKS`.
        max_samples: the first samples only; 0 for all.
        num_restarts: of PGD, >= 1.
        device: auto, cpu, cuda or cuda:N.
        seed: of the attacks.
        out: file for the record, NAME.json; one of the same weights, images and settings is added
            to, also if another evaluation has written it meanwhile. The results image by image are
            written beside it as NAME.npz, and what is finished is kept in the folder NAME.partial,
            from which the same evaluation goes on if it is interrupted. None writes nothing.
        display: where progress is shown.
        ranks: the processes that share the images; each returns the record.

    Returns:
        The record, as JSON types; "interrupted" holds the steps trained and those of the whole run
        where the checkpoint is of a run that had not come to its end, "per_example" the name of the
        file of results image by image.

    Raises:
        FileNotFoundError: no such file, or the dataset is not there.
        ValueError: the file is cut or of another architecture, a recipe or the radius of another
            norm is missing, an argument is out of range, or ``out`` holds results of these weights
            that would be lost, or PGD with another step size or number of restarts. It is looked at
            again before it is written; what was found then stays in NAME.partial.
        OSError: ``out`` cannot be written; what is finished stays in NAME.partial.
    """
    if out is not None and (out.suffix != ".json" or out.is_dir()):
        raise ValueError(f"--out expects the name of a JSON file, NAME.json, got {out}")
    target = ranks.device(device)
    saved = None if model else read_saved(checkpoint, recipe=recipe, with_config=True)
    trained = saved.config if saved else foreign_config(model, recipe, data, norm, eps)
    assert trained is not None
    if norm not in (None, trained.attack.norm) and eps is None:
        raise ValueError(
            f"--eps RADIUS is expected with --norm {norm}: the radius of the run, "
            f"{trained.attack.eps:.6g}, is one of {trained.attack.norm}"
        )
    threat = ThreatModel(trained.attack.eps if eps is None else eps, norm or trained.attack.norm)
    settings = trained.eval
    if threat != ThreatModel(trained.attack.eps, trained.attack.norm):
        # The run's step size was chosen for its own ball.
        settings = dataclasses.replace(settings, alpha=None)
    given = {"num_steps": num_steps, "alpha": alpha, "batch_size": batch_size}
    settings = _replaced(settings, max_samples=max_samples, **given)
    alpha = settings.step_size(threat.eps)
    threat.ball.check("alpha", alpha)
    source = _replaced(trained.data, root=data_root)
    if data is not None:
        source = _other_images(source, data, data_root, saved)
    if saved is None or saved.statistics_fresh:
        # Generated images are for training.
        source = dataclasses.replace(source, unsup=None)
    display = display or Display()
    if not ranks.is_main:
        display = Display(Console(quiet=True))
    if data is None and source.root != trained.data.root:
        of_run = saved is not None and saved.steps is not None
        before = f"; the run had them from {trained.data.root}" if of_run else ""
        display.say_once(f"images from {source.root}{before}")
    download_data(source, ranks)
    with display.evaluating() as bar:
        splits = load_data(
            source,
            device=target,
            seed=trained.seed,
            eval_batch_size=settings.batch_size,
            bad_images=BadImages((saved.path if saved else checkpoint).parent, ranks, bar),
            all_to_test=data is not None,
        )
    test = splits.test
    if saved is None:
        saved = read_weights(checkpoint, trained, test.num_classes, test.image_shape)
    network = place_network(saved, trained, splits, target, by_name=True)
    found = ImageSet.from_batches(test, max_samples, ranks.shard)
    images = found.in_order(saved.classes, saved.path)
    mapped = images is not found
    if mapped:
        display.say_once(
            f"the images count the same {len(images.classes)} classes in another order than the "
            "network: they are matched by their names"
        )
    facts = {
        "model": saved.weights,
        "weights_sha256": checksum(network),
        "dataset": source.name,
        "root": root_of_own_images(source),
        "split": "test",
        "num_samples": min(max_samples or test.num_samples, test.num_samples),
        "norm": threat.norm,
        "eps": threat.eps,
        "seed": seed,
        "batch_size": settings.batch_size,
        "processes": ranks.world_size,
        "device": describe_device(target),
        "versions": versions(),
        "commit": source_commit(),
        "images_sha256": checksum_of_images(found),
    }
    wanted: dict[str, dict[str, Any]] = {name: {} for name in attacks if name != "pgd"}
    if "pgd" in attacks:
        wanted[f"pgd{settings.num_steps}"] = {"num_restarts": num_restarts, "alpha": alpha}
    if out is not None and ranks.is_main:
        for moved in set_damaged_aside(out):
            display.say(f"warning: {moved}")
        earlier_record(out, facts, wanted)
    for name, reason in attacks_left_out(attacks, test.num_classes).items():
        display.say_once(f"{name} is left out: {reason}")
    replaced = {}
    if target.type == "cuda":
        attack = PGD(threat.eps, alpha, norm=threat.norm, bn="running")
        shapes = test.image_shape, test.num_classes, settings.batch_size
        replaced = doctor.prepare(
            doctor.evaluated(doctor.operations_of(network, *shapes, attack, torch.float32)),
            torch.float32,
            target,
            ranks,
            display,
            lambda text: display.say_once(f"warning: {text}"),
            trains=False,
        )
    start = time.perf_counter()
    with display.evaluating() as bar:
        suite = evaluate_all(
            network,
            images,
            threat,
            num_steps=settings.num_steps,
            alpha=alpha,
            num_restarts=num_restarts,
            attacks=attacks,
            batch_size=settings.batch_size,
            seed=seed,
            folder=None if out is None else out.with_suffix(".partial"),
            progress=bar,
            ranks=ranks,
        )
    seconds = time.perf_counter() - start
    unfinished = saved.unfinished
    record: dict[str, Any] = {
        "checkpoint": str(saved.path),
        "recipe": trained.recipe or None,
        **facts,
        "classes": list(images.classes),
        **({"matched_by_name": list(found.classes)} if mapped else {}),
        **({"replaced": replaced} if replaced else {}),
        **({"train_limit": trained.data.limit} if trained.data.limit else {}),
        **(
            {"interrupted": dict(zip(("steps", "of"), unfinished, strict=True))}
            if unfinished
            else {}
        ),
        "accuracy": suite.record(),
        **suite.remarks(),
        "wall_seconds": {"eval": seconds},
    }
    if out is not None:
        arrays = per_example(network, images, suite, settings.batch_size, ranks)
        if ranks.is_main:
            # What another process writes is waited for.
            with alone(out.with_name(f".{out.name}.lock")):
                # What another evaluation has written since this one began is kept too.
                try:
                    earlier = earlier_record(out, facts, wanted)
                except ValueError as error:
                    partial = out.with_suffix(".partial")
                    raise ValueError(
                        f"{error}; it was written since this evaluation began, whose results are "
                        f"in {partial}: named after another record, they are found there"
                    ) from error
                record = {**_added(record, earlier), "per_example": out.with_suffix(".npz").name}
                save_per_example(out.with_suffix(".npz"), arrays, keep=bool(earlier))
                write_json(out, record)
    ranks.meet()
    suite.pieces.remove()
    return record


def foreign_config(
    model: ModelConfig | None,
    recipe: str | None,
    data: str | None,
    norm: NormName | None,
    eps: float | None,
) -> Config:
    """What is known of somebody's network: by a recipe, or by what was asked for.

    Raises:
        ValueError: no recipe says which data or which radius, and neither is given.
    """
    assert model is not None
    if recipe is not None:
        return dataclasses.replace(recipe_by_name(recipe), model=model)
    if data is None or eps is None:
        raise ValueError(
            f"{model.name} names no data and no ball: expected --data and --eps, or --recipe NAME"
        )
    return Config(recipe="", model=model, attack=PGD(eps=eps, alpha=eps / 4, norm=norm or "Linf"))


def _other_images(
    images: DataConfig, data: str, root: Path | None, saved: SavedNetwork | None
) -> DataConfig:
    """The settings of other images, cropped as those of the run."""
    if saved is not None and not saved.statistics_fresh:
        raise ValueError(
            f"{saved.path} needs BatchNorm statistics of its own images, got other ones: finish "
            "the run with --resume first"
        )
    if data in DATASETS:
        root = root or (Path("data") if images.name in OWN_IMAGES else images.root)
        return dataclasses.replace(images, name=data, root=root, num_val=0)
    path = Path(data).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"no images at {path}, expected a folder, an .npz file, tar shards, or one of "
            f"{', '.join(DATASETS)}"
        )
    # Where images were arrays of one size, files of that size are taken as they are.
    arrays = DATASETS[images.name].image_size is not None or DATASETS[images.name].crop is None
    kept = {"crop": "pad", "image_size": saved.image_shape[1]} if saved and arrays else {}
    return _replaced(images, name=own_dataset(path).name, root=path, num_val=0, **kept)


def place_network(
    saved: SavedNetwork,
    config: Config,
    data: DataSplits,
    device: torch.device,
    *,
    by_name: bool = False,
) -> nn.Module:
    """The network on the device, once it is sure that it fits the data.

    Args:
        saved: what a file holds.
        config: of the run.
        data: to evaluate it on; an average that has no statistics yet gets them here.
        device: where the network goes.
        by_name: whether the caller matches classes in another order by their names.

    Raises:
        ValueError: it has other classes, another number of them or of image channels, or it needs
            statistics for an objective of one's own.
    """
    classes, channels = saved.num_classes, saved.image_shape[0]
    expected = data.test.num_classes, data.test.image_shape[0]
    if (classes, channels) != expected:
        raise ValueError(
            f"{saved.path} is a network of {classes} classes for images of {channels} channels, "
            f"expected {expected[0]} and {expected[1]} for these"
        )
    reordered = class_order(saved.classes, data.test.classes, saved.path) is not None
    if reordered and not (saved.statistics_fresh and by_name):
        raise ValueError(
            f"{saved.path} counts the same classes in another order than the images, which are "
            "attacked by their labels: name the classes as in the training"
        )
    model = saved.model.to(device)
    if not saved.statistics_fresh:
        with torch.random.fork_rng(devices=[]):
            # Fresh predictors and guides: neither attack nor statistics need the trained ones.
            objective = build_objective(
                config, model, data.train.num_classes, data.train.image_shape
            )
        refresh_batch_norm(
            model,
            data.train.epoch(config.train.epochs),
            objective,
            config.attack,
            stream_generator(config.seed, "refresh", device),
        )
    return model


def _added(record: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The record with the results of an earlier one; a result of both is the new one's."""
    left_out = {**earlier.get("left_out", {}), **record.get("left_out", {})}
    seconds = earlier.get("wall_seconds", {}).get("eval", 0.0) + record["wall_seconds"]["eval"]
    return {
        **record,
        "accuracy": {**earlier.get("accuracy", {}), **record["accuracy"]},
        "per_class": {**earlier.get("per_class", {}), **record["per_class"]},
        **({"left_out": left_out} if left_out else {}),
        "wall_seconds": {"eval": seconds},
    }


def _replaced(section: Section, **values: Any) -> Section:
    """A part of a configuration with the values that are not None put in."""
    given = {key: value for key, value in values.items() if value is not None}
    return dataclasses.replace(section, **given)
