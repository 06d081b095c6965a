"""Labels have a meaning: class names go with a network, and are compared with the images'."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import unicodedata
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import encoded, image_folder, picture
from report.fake_run import rewrite, write_fake_run
from rich.console import Console

from arat_fast.analysis.run import AnalyzeSettings, analyze_networks
from arat_fast.config import Config
from arat_fast.data.fingerprint import class_names, class_order
from arat_fast.display import Display
from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.export.folder import export_checkpoint
from arat_fast.recipes import recipe
from arat_fast.report import write_report
from arat_fast.run.loop import train
from arat_fast.saved.network import read_saved
from arat_fast.training.checkpoint import load_checkpoint, save_checkpoint

QUIET = Display(Console(quiet=True))


def config_for(root: Path) -> Config:
    config = recipe("folder-resnet18")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name="resnet8"),
        data=dataclasses.replace(
            config.data, root=root, image_size=16, batch_size=8, loader="dataloader", num_workers=0
        ),
        attack=dataclasses.replace(config.attack, num_steps=1),
        train=dataclasses.replace(config.train, epochs=1, device="cpu"),
        eval=dataclasses.replace(config.eval, num_steps=1, autoattack=False),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch on three classes, whose images lie beside the run."""
    folder = tmp_path_factory.mktemp("classes")
    train(config_for(image_folder(folder / "images")), folder / "run", display=QUIET)
    return folder / "run"


def renamed(run: Path, target: Path, **names: str) -> Path:
    """The images of the run with other names of their folders."""
    shutil.copytree(run.parent / "images", target)
    for split in ("train", "val"):
        for before, after in names.items():
            (target / split / before).rename(target / split / after)
    return target


def evaluate(
    path: Path, root: Path | None = None, shown: Display = QUIET, **options: Any
) -> dict[str, Any]:
    return evaluate_checkpoint(
        path, attacks=["pgd"], device="cpu", data_root=root, display=shown, **options
    )


def test_names_are_in_everything_that_a_run_leaves(run: Path, tmp_path: Path) -> None:
    names = ["cat", "dog", "owl"]
    assert json.loads((run / "summary.json").read_text())["classes"] == names
    export = tmp_path / "export"
    assert export_checkpoint(run, "hub", export)["classes"] == names
    for path in (run, run / "model.safetensors", export, export / "model.safetensors"):
        assert read_saved(path).classes == tuple(names)
    assert evaluate(run)["classes"] == names


def test_images_that_were_moved_are_the_same(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    record, here = tmp_path / "evaluation.json", renamed(run, tmp_path / "here")
    first = evaluate(tmp_path / "run", here, out=record)
    moved, other = here.rename(tmp_path / "moved"), renamed(run, tmp_path / "other")
    said = io.StringIO()
    for root in (here, moved):
        with pytest.raises(FileNotFoundError, match="data-root") if root == here else nullcontext():
            found = evaluate(
                tmp_path / "run", root, out=record, shown=Display(Console(file=said, width=500))
            )
    assert found["accuracy"] == first["accuracy"] and found["root"] == str(moved)
    train(
        config_for(moved),
        tmp_path / "run",
        resume=True,
        display=Display(Console(file=said, width=500)),
    )
    line = f"images from {moved}; the run had them from {run.parent / 'images'}\n"
    assert said.getvalue().count(line) == 2
    for file in (other / "val").rglob("*.png"):
        file.write_bytes(encoded(picture(len(file.name) + 99), ".png"))
    with pytest.raises(ValueError, match="root"):
        evaluate(tmp_path / "run", other, out=record)


@pytest.mark.slow
def test_names_can_be_given_later(tmp_path: Path) -> None:
    rng, root = np.random.default_rng(0), tmp_path / "images"
    root.mkdir()
    np.save(root / "images.npy", rng.integers(0, 256, (24, 8, 8, 3), np.uint8))
    np.save(root / "labels.npy", np.arange(24) % 3)
    config = config_for(root)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, name="arrays"))
    train(config, tmp_path / "run", display=QUIET)
    assert read_saved(tmp_path / "run").classes == ()
    (root / "classes.txt").write_text("cat\ndog\nowl\n")
    assert evaluate(tmp_path / "run")["classes"] == ["cat", "dog", "owl"]
    train(config, tmp_path / "run", resume=True, display=QUIET)


@pytest.mark.parametrize(
    ("dataset", "names", "known"),
    [
        ("arrays", "012", ""),
        ("webdataset", "123", ""),
        ("arrays", "210", "210"),
        ("arrays", "abc", "abc"),
        ("folder", "012", "012"),
        ("digits", "0123456789", "0123456789"),
    ],
)
def test_a_number_is_the_name_of_a_folder_alone(dataset: str, names: str, known: str) -> None:
    assert class_names(dataset, tuple(names)) == tuple(known)


@pytest.mark.parametrize("names", [{"cat": "zebra"}, {"dog": "hund"}, {"cat": "1", "owl": "2"}])
@pytest.mark.parametrize("file", ["checkpoint.pt", "model.safetensors"])
def test_other_classes_are_refused(
    run: Path, tmp_path: Path, file: str, names: dict[str, str]
) -> None:
    root = renamed(run, tmp_path / "images", **names)
    with pytest.raises(ValueError, match=f"{next(iter(names))}.*{next(iter(names.values()))}"):
        evaluate(run / file, root, out=tmp_path / "record.json")
    assert not (tmp_path / "record.json").exists()
    with pytest.raises(ValueError, match="classes"):
        analyze_networks([run / file], AnalyzeSettings(data_root=root, device="cpu"), QUIET)
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(ValueError, match="classes"):
        train(
            dataclasses.replace(
                config_for(root), train=dataclasses.replace(config_for(root).train, epochs=1)
            ),
            tmp_path / "run",
            resume=True,
            display=QUIET,
        )


@pytest.mark.parametrize(
    "order",
    [
        [1, 2, 0],
        pytest.param([2, 1, 0], marks=pytest.mark.slow),
        pytest.param([0, 2, 1], marks=pytest.mark.slow),
    ],
)
def test_the_same_classes_in_another_order_are_matched(
    run: Path, tmp_path: Path, order: list[int]
) -> None:
    state = load_checkpoint(run / "checkpoint.pt")
    for weights in (state["model"], state["average"]["model"] or {}):
        for name in ("linear.weight", "linear.bias"):
            if name in weights:
                weights[name] = weights[name][torch.tensor(order)]
    names = ["cat", "dog", "owl"]
    state["run"]["classes"] = [names[i] for i in order]
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    found, expected = evaluate(tmp_path), evaluate(run)
    assert found["matched_by_name"] == names and "matched_by_name" not in expected
    assert found["classes"] == state["run"]["classes"]
    assert found["accuracy"]["clean"]["correct"] == expected["accuracy"]["clean"]["correct"]
    with pytest.raises(ValueError, match="order"):
        analyze_networks([tmp_path], AnalyzeSettings(device="cpu"), QUIET)
    with pytest.raises(ValueError, match="order"):
        train(config_for(run.parent / "images"), tmp_path, resume=True, display=QUIET)


def test_one_name_in_two_forms_is_one_class() -> None:
    names = ["Käse", "Brot", "Ei"]
    other = [unicodedata.normalize("NFD", name) for name in names]
    assert other != names and class_order(names, other, "it") is None
    assert class_order(names, other[::-1], "it") == [2, 1, 0]
    assert class_order([], names, "it") is None


@pytest.mark.parametrize(
    ("theirs", "mismatch"),
    [
        pytest.param(["a", "b", "c"], None, marks=pytest.mark.slow),
        (["b", "c", "a"], "order"),
        pytest.param([], None, marks=pytest.mark.slow),
        (["a", "b", "d"], "refused"),
    ],
)
def test_reports_compare_names(tmp_path: Path, theirs: list[str], mismatch: str | None) -> None:
    runs = [write_fake_run(tmp_path / name, epochs=1) for name in ("ours", "theirs")]
    for folder, names in zip(runs, (["a", "b", "c"], theirs), strict=True):
        rewrite(folder / "summary.json", "classes", names)
    if mismatch == "refused":
        with pytest.raises(ValueError, match="only here d"):
            write_report(runs[0], [runs[1]])
        return
    page = write_report(runs[0], [runs[1]]).read_text()
    assert ("order of the classes" in page) == (mismatch == "order")
