"""arat-fast analyze from the command line, its files, and what the report makes of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config, tiny_trainer

from arat_fast.analysis.run import short_names
from arat_fast.cli import main
from arat_fast.config import AnalyzeConfig
from arat_fast.report import write_report
from arat_fast.report.analysis import read_analyses
from arat_fast.report.analysis_plots import surface_panels
from arat_fast.report.analysis_words import (
    analysis_sentences,
    attacker_words,
    conflict_words,
    masking_words,
    mixture_words,
    surface_words,
)

SMALL = "--num-images 20 --num-steps 2 --num-restarts 2 --num-queries 5 --num-surfaces 2 --points 5"
PARTS = ("gradient-conflict", "mixture", "surface", "masking", "attacker")


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs, ARAT and AT, analysed together."""
    folder = tmp_path_factory.mktemp("runs")
    config = dataclasses.replace(tiny_config(2), analyze=AnalyzeConfig(1, num_batches=2))
    tiny_trainer(folder / "arat", config).run()
    plain = dataclasses.replace(config.objective, name="at")
    tiny_trainer(folder / "at", dataclasses.replace(config, objective=plain)).run()
    arguments = ["analyze", str(folder / "arat"), str(folder / "at"), *SMALL.split()]
    assert main([*arguments, "--device", "cpu", "--num-batches", "2"]) == 0
    return folder / "arat", folder / "at"


def test_files(analysed: tuple[Path, Path]) -> None:
    run, at = analysed
    names = {path.name for path in (run / "analysis").iterdir()}
    assert names == {
        *(f"{part}.json" for part in PARTS),
        "surface.npz",
        "attacker.npz",
        "gradient-conflict.png",
        "gradient-conflict-layers.png",
        "mixture.png",
        "mixture-layers.png",
        "surface.png",
        "masking.png",
        "margins.png",
        "confusion.png",
        "compared-gradient-conflict.png",
        "compared-mixture.png",
        "compared-mixture-layers.png",
    }
    for path in (run / "analysis").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for part in PARTS:
        record = json.loads((run / "analysis" / f"{part}.json").read_text())
        assert record["checkpoint"] == str(run) and record["recipe"] == "digits"
    assert not (at / "analysis" / "gradient-conflict.json").exists()
    # Each is attacked with what was made for the other.
    for path, source in ((run, "at"), (at, "arat")):
        record = json.loads((path / "analysis" / "masking.json").read_text())
        (transfer,) = [a for a in record["attacks"] if a["kind"] == "transfer"]
        assert transfer["source"] == source
        assert "transfer" in {check["name"] for check in record["checks"]}


def test_report_and_page(analysed: tuple[Path, Path]) -> None:
    run, _ = analysed
    text = write_report(run).read_text()
    for heading in ("Gradient conflict and mixture distribution", "Can the robustness be trusted?"):
        assert f"<h2>{heading}</h2>" in text
    assert 'href="attacker.html"' in text
    page = (run / "attacker.html").read_text()
    for heading in (
        "What the attack does",
        "Images, as the attack sees them",
        "Around the images",
        "Can it be trusted?",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert page.count('class="triple four"') == 12
    assert page.count("<img") == 12 * 4 + 4
    assert "://" not in page


def test_the_same_run_gives_the_same_report(analysed: tuple[Path, Path]) -> None:
    run, _ = analysed
    written = []
    for _ in range(2):
        report = write_report(run)
        written.append((report.read_bytes(), (run / "attacker.html").read_bytes()))
    assert written[0] == written[1]


def test_what_was_analysed_before_the_run_went_on_is_left_out(
    analysed: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(analysed[0], run)
    write_report(run)
    assert (run / "attacker.html").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 8
    (run / "summary.json").write_text(json.dumps({**summary, "steps": 12}))
    text = write_report(run).read_text()
    for part in PARTS:
        record = json.loads((run / "analysis" / f"{part}.json").read_text())
        assert record["steps"] == 8
        assert f"analysis/{part}.json is of step 8, the run has trained 12 steps" in text
    assert "No sign of masked gradients" not in text
    assert not (run / "attacker.html").exists()
    # A file of a version that did not write the step is shown.
    file = run / "analysis" / "masking.json"
    record = json.loads(file.read_text())
    del record["steps"]
    file.write_text(json.dumps(record))
    assert set(read_analyses(run / "analysis", 12).records) == {"masking"}


@pytest.mark.parametrize(
    ("norm", "words"),
    [("Linf", "a random sign for each pixel"), ("L2", "a random direction at right angles to it")],
)
def test_the_random_direction_is_that_of_the_norm(norm: str, words: str) -> None:
    arrays = {
        "axis": np.linspace(-2, 2, 3),
        "margin": np.linspace(-1, 1, 9).reshape(1, 3, 3),
        "labels": np.array(["a"]),
    }
    assert words in surface_panels(arrays, {"norm": norm}).caption


def test_report_without_analyses_is_as_before(analysed: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(analysed[0], run, ignore=shutil.ignore_patterns("analysis", "attacker.html"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(x for x in lines if '"analysis"' not in x))
    text = write_report(run).read_text()
    assert "Gradient conflict" not in text and "trusted" not in text
    assert not (run / "attacker.html").exists()


def test_damaged_files_are_left_out(analysed: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(analysed[0], run)
    folder = run / "analysis"
    (folder / "masking.json").write_text('{"checks": [{')
    (folder / "attacker.npz").write_bytes(b"PK")
    (folder / "surface.json").write_text("{}")
    (folder / "mixture.json").write_text('{"layers": {"a": 3}, "mean": 4}')
    found = read_analyses(folder)
    assert len(found.notes) == 2
    text = write_report(run).read_text()
    assert "analysis/masking.json cannot be read" in text
    np.savez(folder / "attacker.npz", y=np.zeros(3))
    write_report(run)


@pytest.mark.parametrize("weights", ["model.safetensors"])
def test_exported_weights(
    analysed: tuple[Path, Path],
    tmp_path: Path,
    weights: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(analysed[0] / weights, tmp_path / weights)
    arguments = ["analyze", str(tmp_path / weights), *SMALL.split(), "--device", "cpu"]
    assert main([*arguments, "--parts", "gradient-conflict", "surface"]) == 0
    out = capsys.readouterr().out
    assert "gradient-conflict left out: the file holds no predictors" in out
    assert (tmp_path / "model.analysis" / "surface.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze"], "a run or a checkpoint is expected after analyze, got nothing"),
        (["analyze", "nowhere"], "nowhere"),
        (["analyze", "RUN", "--num-batches", "0"], "num_batches must be >= 1, got 0"),
        (["analyze", "RUN", "--batch-size", "0"], "batch_size must be >= 1, got 0"),
        (["analyze", "RUN", "--parts", "colour"], "colour"),
        (["analyze", "RUN", "--points", "4", "--parts", "surface"], "points must be odd"),
        (["analyze", "RUN", "--num-steps", "1", "--parts", "masking"], "num_steps >= 2"),
    ],
)
def test_errors_are_one_line(
    analysed: tuple[Path, Path],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(analysed[0])
    assert main([run if argument == "RUN" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_names_are_short_and_different(tmp_path: Path) -> None:
    for folder in ("a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True)
    files = [tmp_path / "a" / "run" / "model.safetensors", tmp_path / "b" / "x.pt"]
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", *files]
    assert short_names(paths) == ["run", "run (2)", "run/model", "b/x"]


def conflict(share: float, cosine: float, std: float = 0.01) -> dict[str, object]:
    pair = {"share": share, "share_std": std, "cosine": cosine}
    return {
        "pairs": {"classification": pair},
        "unrelated": 0.48,
        "entries": 1000,
        "num_batches": 4,
    }


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        (conflict(0.30, 0.4), "pull the same way"),
        (conflict(0.60, -0.3), "gradient conflict"),
        (conflict(0.475, 0.1), "neither clearly"),
        (conflict(0.30, -0.1), "neither clearly"),
        (conflict(0.30, 0.4, 0.5), "neither clearly"),
    ],
)
def test_words_on_conflict_follow_the_numbers(record: dict[str, object], verdict: str) -> None:
    assert verdict in " ".join(conflict_words(record))


def test_one_batch_gives_no_verdict() -> None:
    record = conflict(0.3, 0.4)
    record["pairs"]["classification"]["share_std"] = None  # type: ignore[index]
    assert len(conflict_words(record)) == 1


def test_words_of_nothing() -> None:
    assert analysis_sentences({}) == []
    for words in (conflict_words, mixture_words, surface_words, masking_words, attacker_words):
        assert words({}) == []


def test_words_on_masking() -> None:
    good = {"name": "steps", "passed": True, "text": "More steps break more."}
    bad = {"name": "black-box", "passed": False, "text": "Square is stronger."}
    assert "No sign of masked gradients in 1 check" in masking_words({"checks": [good]})[0]
    words = masking_words({"checks": [good, bad]})
    assert words[0].startswith("WARNING: 1 of 2 checks")
    assert words[1] == "black-box: Square is stronger."


def test_words_on_mixture_name_the_worst_layer() -> None:
    layers = {"bn1": {"w2_relative": 0.1}, "bn2": {"w2_relative": 0.4}}
    record = {"layers": layers, "mean": {"w2_relative": 0.25, "output_w2": 0.125}}
    (sentence,) = mixture_words(record)
    assert "0.250" in sentence and "bn2 with 0.400" in sentence and "0.125" in sentence


def test_words_on_surfaces_count_inside_the_ball() -> None:
    record = {"reach": 2.0, "boundary": {"adversarial": [0.5, 1.5, None], "random": [None] * 3}}
    (sentence,) = surface_words(record)
    assert "2 of 3 images lose their class along the adversarial direction (1 of them" in sentence
