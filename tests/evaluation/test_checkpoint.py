"""Evaluation of saved networks: what is read from the file, and what may be asked for instead."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny import tiny_config

from arat_fast.display import Display
from arat_fast.evaluation import checkpoint as module
from arat_fast.files import alone
from arat_fast.models import create_model
from arat_fast.run.loop import train
from arat_fast.saved import save_safetensors
from arat_fast.training.checkpoint import load_checkpoint, save_checkpoint

CONFIG = tiny_config(epochs=1, kind="swa", start=0.0, every=1)
CONFIG = dataclasses.replace(CONFIG, attack=dataclasses.replace(CONFIG.attack, eps=0.2))

QUIET = Display(Console(quiet=True))


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    autoattack = importlib.import_module("arat_fast.evaluation.autoattack")
    monkeypatch.setattr(autoattack, "NUM_QUERIES", 100)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of the tiny digits at a radius that is not the recipe's."""
    out = tmp_path_factory.mktemp("evaluation") / "run"
    train(CONFIG, out, display=QUIET)
    return out


def evaluate(path: Path, **options: Any) -> dict[str, Any]:
    own = {"attacks": ["pgd"], "max_samples": 30, "device": "cpu", "display": QUIET}
    return module.evaluate_checkpoint(path, **{**own, **options})


def test_statistics_are_refreshed_with_the_attack_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run left the average without its statistics; another ball is evaluated."""
    state = load_checkpoint(run / "checkpoint.pt")
    state["average"]["statistics_fresh"] = False
    for name, tensor in state["average"]["model"].items():
        if name.endswith("running_mean"):
            tensor.fill_(100)
    save_checkpoint(tmp_path / "stale.pt", state)
    attacks = []
    refresh = module.refresh_batch_norm

    def noted(model: Any, batches: Any, objective: Any, attack: Any, generator: Any) -> None:
        attacks.append(attack)
        refresh(model, batches, objective, attack, generator)

    monkeypatch.setattr(module, "refresh_batch_norm", noted)
    record = evaluate(tmp_path / "stale.pt", eps=0.01, norm="L2")
    assert attacks == [CONFIG.attack]
    assert record["accuracy"]["pgd1"]["eps"] == 0.01
    assert record["accuracy"]["clean"]["correct"] == evaluate(run)["accuracy"]["clean"]["correct"]


def test_exported_weights_say_what_they_are(run: Path) -> None:
    """Recipe, model and ball are those of the file; each can be replaced."""
    path = run / "model.safetensors"
    record, whole = evaluate(path, num_steps=1), evaluate(run)
    assert record["recipe"] == "digits"
    for name in ("clean", "pgd1"):
        assert record["accuracy"][name]["correct"] == whole["accuracy"][name]["correct"]
    assert record["accuracy"]["pgd1"]["eps"] == 0.2
    assert evaluate(path, num_steps=1, eps=0.05)["accuracy"]["pgd1"]["eps"] == 0.05
    assert evaluate(path, num_steps=1, recipe="digits")["accuracy"]["pgd1"]["eps"] == 0.2


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ({}, "--recipe"),
        ({"eps": "0.1"}, "--recipe"),
        ({"recipe": "digit"}, "digit"),
        ({"recipe": "digits", "eps": "wide"}, "wide"),
        ({"recipe": "digits", "norm": "L7"}, "L7"),
        ({"recipe": "digits", "model": "vgg"}, "vgg"),
    ],
)
def test_exported_weights_with_other_metadata(
    tmp_path: Path, metadata: dict[str, str], word: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(create_model("resnet8", 10, 1, norm="shared"), path, metadata)
    with pytest.raises(ValueError, match=word):
        evaluate(path)


@pytest.mark.parametrize(
    ("options", "alpha"),
    [
        ({}, 0.02),
        ({"eps": 0.2, "norm": "Linf"}, 0.02),
        ({"eps": 0.1}, 0.025),
        ({"eps": 0.6, "norm": "L2"}, 0.15),
        ({"eps": 0.6, "norm": "L2", "alpha": 0.3}, 0.3),
        ({"alpha": 0.0}, 0.0),
    ],
)
def test_step_size_belongs_to_the_ball(run: Path, options: dict[str, Any], alpha: float) -> None:
    attack = evaluate(run, num_restarts=2, **options)["accuracy"]["pgd1"]
    assert attack["alpha"] == pytest.approx(alpha, rel=1e-12)
    assert attack["num_restarts"] == 2


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"norm": "L2"}, "--eps"),
        ({"max_samples": -5}, "max_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_restarts": 0}, "num_restarts"),
        ({"alpha": -0.1}, "alpha"),
        ({"eps": -0.1}, "eps"),
        ({"attacks": ["fgsm"]}, "fgsm"),
        ({"out": Path("record.txt")}, "--out"),
    ],
)
def test_arguments_out_of_range(run: Path, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        evaluate(run, **options)


def test_results_image_by_image(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    attacks = ["pgd", "apgd-ce", "square", "aa-torchattacks10"]
    whole = evaluate(run, max_samples=12, eps=0.5, attacks=attacks, out=out)
    record = whole["accuracy"]
    assert json.loads(out.read_text()) == whole and whole["processes"] == 1
    for name in ("clean", "pgd1", "square"):
        assert record[name]["precision"] == "float32"
    names = ("clean", "clean_branch", "pgd1", "apgd-ce", "square", "aa-torchattacks10")
    assert tuple(record) == names
    assert record["aa-torchattacks10"]["version"] == "torchattacks10"
    with np.load(tmp_path / "record.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    for name in names:
        correct = found[f"{name}_correct"]
        assert correct.sum() == record[name]["correct"] and len(correct) == 12
        low, high = record[name]["interval"]
        assert low <= record[name]["value"] <= high
        assert np.array_equal(found[f"{name}_prediction"] == found["label"], correct)
        assert np.array_equal(found[f"{name}_margin"] > 0, correct)
    assert np.array_equal(found["apgd-ce_after_apgd-ce"], found["apgd-ce_correct"])
    assert record["square"]["implementation"] == "arat_fast.attacks.SquareLinf"
    assert list(record["square"]["attacks"]) == ["square"]
    assert not (tmp_path / "record.partial").exists()


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_samples": 8, "eps": 0.02, "attacks": ["pgd", "apgd-ce"]}
    whole = evaluate(run, **options, out=tmp_path / "whole.json")["accuracy"]
    suite = importlib.import_module("arat_fast.evaluation.suite")
    real = suite.autoattack

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        real(*arguments, **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(suite, "autoattack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, **options, out=tmp_path / "record.json")
    assert len(list((tmp_path / "record.partial").glob("*/*.npz"))) == 2
    # A quick look with other settings neither uses nor removes the pieces.
    evaluate(run, max_samples=2, eps=0.02, out=tmp_path / "record.json")
    assert len(list((tmp_path / "record.partial").glob("*/*.npz"))) == 2

    def never(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("attacked again")

    monkeypatch.setattr("arat_fast.attacks.pgd.PGD.__call__", never)
    monkeypatch.setattr("pyautoattack.AutoAttack.run_standard_evaluation", never)
    assert evaluate(run, **options, out=tmp_path / "record.json")["accuracy"] == whole
    assert not (tmp_path / "record.partial").exists()
    # Other settings are another evaluation.
    with pytest.raises(AssertionError):
        evaluate(run, **options, batch_size=4, out=tmp_path / "record.json")


def test_attacks_are_added_to_a_record_and_none_is_lost(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options: dict[str, Any] = {"max_samples": 10, "eps": 0.1, "out": out}
    first = evaluate(run, **options, attacks=["pgd", "square"])
    both = evaluate(run, **options, attacks=["pgd", "apgd-ce"], num_steps=2)
    assert json.loads(out.read_text()) == both
    assert set(both["accuracy"]) == {*first["accuracy"], "pgd2", "apgd-ce"}
    assert both["accuracy"]["square"] == first["accuracy"]["square"]
    assert both["wall_seconds"]["eval"] > first["wall_seconds"]["eval"]
    with np.load(tmp_path / "record.npz") as arrays:
        assert {"square_correct", "apgd-ce_correct", "pgd1_margin", "pgd2_margin"} <= {*arrays}
    # Nothing is lost where the new record holds as much, or is of other weights.
    names = ["pgd", "square", "apgd-ce"]
    again = tmp_path / "small.json"
    evaluate(run, **{**options, "out": again}, attacks=["pgd"])
    larger = evaluate(run, **{**options, "out": again, "max_samples": 12}, attacks=names)
    assert json.loads(again.read_text()) == larger
    state = load_checkpoint(run / "checkpoint.pt")
    state["average"]["model"]["linear.bias"] += 1
    save_checkpoint(tmp_path / "other.pt", state)
    other = evaluate(tmp_path / "other.pt", **options)
    assert set(other["accuracy"]) == {"clean", "clean_branch", "pgd1"}


def test_a_damaged_record_is_moved_aside(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options: dict[str, Any] = {"max_samples": 10, "eps": 0.1, "out": out}
    record = evaluate(run, **options)["accuracy"]
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    console = Console(file=io.StringIO(), width=1000)
    for number, damage in enumerate((b"", b"[" * 100_000, whole["record.json"][:-9]), 1):
        out.write_bytes(damage)
        (tmp_path / "record.npz").write_bytes(whole["record.npz"][:-9])
        assert evaluate(run, **options, display=Display(console))["accuracy"] == record
        assert (tmp_path / f"record.json.damaged{number}").read_bytes() == damage
        assert json.loads(out.read_text())["accuracy"] == record
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert shown.count("warning: ") == 6 and str(tmp_path / "record.npz.damaged3") in shown


@pytest.mark.slow
def test_the_same_attack_in_another_way_is_no_replacement(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options: dict[str, Any] = {"max_samples": 10, "eps": 0.1, "num_restarts": 2, "out": out}
    evaluate(run, **options)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"record.json", "record.npz"}
    for changes, word in (
        ({"eps": 0.2}, "eps="),
        ({"norm": "L2", "eps": 0.1}, "norm="),
        ({"seed": 1}, "seed="),
        ({"num_restarts": 1}, "num_restarts="),
        ({"max_samples": 12, "alpha": 0.01}, "alpha="),
        ({"max_samples": 5}, "samples="),
        ({"alpha": 0.01}, "alpha="),
    ):
        with pytest.raises(ValueError, match=word):
            evaluate(run, **{**options, **changes})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    evaluate(run, **{**options, **changes, "out": tmp_path / "other.json"})


def during(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Let the next evaluation do something else between its attacks and its record."""
    real = module.evaluate_all

    def evaluate_all(*arguments: Any, **options: Any) -> Any:
        suite = real(*arguments, **options)
        monkeypatch.setattr(module, "evaluate_all", real)
        action()
        return suite

    monkeypatch.setattr(module, "evaluate_all", evaluate_all)


def test_two_evaluations_at_a_time_lose_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "record.json"
    options: dict[str, Any] = {"max_samples": 10, "eps": 0.1, "out": out}
    during(monkeypatch, lambda: evaluate(run, **options, attacks=["square"]))
    both = evaluate(run, **options, attacks=["pgd"])
    assert json.loads(out.read_text()) == both
    assert set(both["accuracy"]) == {"clean", "clean_branch", "pgd1", "square"}
    with np.load(tmp_path / "record.npz") as arrays:
        assert {"square_correct", "pgd1_correct"} <= {*arrays}
    assert {path.name for path in tmp_path.iterdir()} == {"record.json", "record.npz"}
    # What no longer fits is refused and kept in pieces, which serve under another name.
    late = {**options, "eps": 0.2, "out": tmp_path / "late.json"}
    during(monkeypatch, lambda: evaluate(run, **{**late, "eps": 0.3, "num_steps": 2}))
    with pytest.raises(ValueError, match=r"eps=0.3, got 0.2.*late.partial"):
        evaluate(run, **late)
    first = json.loads((tmp_path / "late.json").read_text())
    assert first["eps"] == 0.3 and "pgd2" in first["accuracy"]
    (tmp_path / "late.partial").rename(tmp_path / "other.partial")
    monkeypatch.setattr("arat_fast.attacks.pgd.PGD.__call__", lambda *_, **__: pytest.fail("again"))
    evaluate(run, **{**late, "out": tmp_path / "other.json"})


@pytest.mark.skipif(sys.platform == "win32", reason="nobody waits on Windows")
def test_one_writes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("0")

    def add(_: int) -> None:
        with alone(tmp_path / ".lock"):
            number = int(path.read_text())
            time.sleep(0.002)
            path.write_text(str(number + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(60)))
    assert path.read_text() == "60"
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_generated_images_and_an_interrupted_run(run: Path, tmp_path: Path) -> None:
    """Those are not read to evaluate, and this one is called one."""
    state = load_checkpoint(run / "checkpoint.pt")
    state["run"]["config"]["data"]["unsup"] = str(tmp_path / "nowhere")
    save_checkpoint(tmp_path / "mixed.pt", state)
    assert "interrupted" not in evaluate(tmp_path / "mixed.pt")
    total, state["progress"]["step"] = state["progress"]["step"], 1
    save_checkpoint(tmp_path / "cut.pt", state)
    assert evaluate(tmp_path / "cut.pt")["interrupted"] == {"steps": 1, "of": total}
