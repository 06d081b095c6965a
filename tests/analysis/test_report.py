"""arat-fast analyze from the command line, its files, and what the report makes of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from report.fake_run import rewrite
from tiny import tiny_config, tiny_trainer

from arat_fast.analysis.run import short_names
from arat_fast.cli import main
from arat_fast.config import AnalyzeConfig
from arat_fast.report import write_report
from arat_fast.report.analysis_words import analysis_sentences
from benchmarks import gradient_conflict

pytestmark = pytest.mark.slow

SMALL = "--num-images 20 --num-steps 2 --num-restarts 2 --num-queries 5 --device cpu"
PARTS = ("gradient-conflict", "mixture", "masking")


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs, ARAT and AT, analysed together."""
    folder = tmp_path_factory.mktemp("runs")
    config = dataclasses.replace(tiny_config(2), analyze=AnalyzeConfig(1, num_batches=2))
    for name in ("arat", "at"):
        tiny_trainer(folder / name, config.with_objective(name)).run()
    arguments = ["analyze", str(folder / "arat"), str(folder / "at"), *SMALL.split()]
    assert main([*arguments, "--num-batches", "2"]) == 0
    return folder / "arat", folder / "at"


def test_files(analysed: tuple[Path, Path]) -> None:
    run, at = analysed
    names = {path.name for path in (run / "analysis").iterdir()}
    assert names == {
        *(f"{part}.json" for part in PARTS),
        *(f"{part}.png" for part in PARTS),
        "gradient-conflict-layers.png",
        "mixture-layers.png",
        "compared-mixture.png",
        "compared-gradient-conflict.png",
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


def test_report(analysed: tuple[Path, Path]) -> None:
    text = write_report(analysed[0]).read_text()
    assert 'id="analyses"' in text and 'id="trust"' in text
    assert text.count('class="panel whole"') == 5
    assert text.count("✓ as it must be") + text.count("✗ warning") == 8
    assert write_report(analysed[0]).read_text() == text


def test_what_was_analysed_before_the_run_went_on_is_left_out(
    analysed: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(analysed[0], run)
    rewrite(run / "summary.json", "steps", 12)
    text = write_report(run).read_text()
    assert all(f"analysis/{part}.json is of step 8" in text for part in PARTS)
    assert 'id="analyses"' in text and 'id="trust"' not in text
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(x for x in lines if '"analysis"' not in x))
    assert 'id="analyses"' not in write_report(run).read_text()


def test_exported_weights(
    analysed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(analysed[0] / "model.safetensors", tmp_path)
    arguments = ["analyze", str(tmp_path / "model.safetensors"), *SMALL.split()]
    assert main([*arguments, "--parts", "gradient-conflict", "masking"]) == 0
    assert "gradient-conflict left out" in capsys.readouterr().out
    assert (tmp_path / "model.analysis" / "masking.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze"], "nothing"),
        (["analyze", "nowhere"], "nowhere"),
        (["analyze", "RUN", "--num-batches", "0"], "num_batches"),
        (["analyze", "RUN", "--batch-size", "0"], "batch_size"),
        (["analyze", "RUN", "--parts", "colour"], "colour"),
        (["analyze", "RUN", "--num-steps", "1", "--parts", "masking"], "num_steps"),
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
    names = ("a/run", "b/run", "a/run/model.safetensors", "b/x.pt")
    paths = [tmp_path / name for name in names]
    assert short_names(paths) == ["run", "run (2)", "run/model", "b/x"]


@pytest.mark.parametrize(
    ("share", "cosine", "std", "verdict"),
    [
        (0.30, 0.4, 0.01, "pull the same way"),
        (0.60, -0.3, 0.01, "gradient conflict"),
        (0.475, 0.1, 0.01, "neither"),
        (0.30, -0.1, 0.01, "neither"),
        (0.30, 0.001, 0.01, "neither"),
        (0.30, 0.4, 0.5, "neither"),
        # One batch gives no verdict.
        (0.30, 0.4, None, None),
    ],
)
def test_words_on_conflict_follow_the_numbers(
    share: float, cosine: float, std: float | None, verdict: str | None
) -> None:
    pair = {"share": share, "share_std": std, "cosine": cosine, "cosine_std": std}
    counts = {"unrelated": 0.48, "entries": 1000, "num_batches": 4}
    words = analysis_sentences({"gradient-conflict": {"pairs": {"classification": pair}, **counts}})
    assert words[1:] == [] if verdict is None else verdict in words[1]


def test_masking_is_said_with_every_check_that_failed() -> None:
    good = {"name": "steps", "passed": True, "text": "More steps break more."}
    bad = {"name": "black-box", "passed": False, "text": "Square is stronger."}
    assert (
        "No sign of masked gradients in 1" in analysis_sentences({"masking": {"checks": [good]}})[0]
    )
    words = analysis_sentences({"masking": {"checks": [good, bad]}})
    assert words[0].startswith("WARNING: 1 of 2") and words[1:] == [
        "black-box: Square is stronger."
    ]


def test_words_on_mixture_name_the_worst_layer() -> None:
    layers = {"bn1": {"w2_relative": 0.1}, "bn2": {"w2_relative": 0.4}}
    record = {"layers": layers, "mean": {"w2_relative": 0.25, "output_w2": 0.125}}
    sentence = analysis_sentences({"mixture": record})[1]
    assert "0.250" in sentence and "bn2 with 0.400" in sentence and "0.125" in sentence
    assert not analysis_sentences({})


def test_the_measurement_of_a_comparison(
    analysed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gradient_conflict, "RESULTS", tmp_path / "results")
    folder = analysed[0].parent
    for names in (["arat"], ["arat", "at"]):
        methods = [{"label": name, "title": name.upper()} for name in names]
        cells = [{"label": name, "run": name} for name in names]
        record = {"format": 1, "methods": methods, "cells": cells}
        (folder / "comparison.json").write_text(json.dumps(record))
        if "at" in names:
            with pytest.raises(ValueError, match="at has no gradient conflict"):
                gradient_conflict.main(folder)
        else:
            gradient_conflict.main(folder)
            assert "| ARAT |" in capsys.readouterr().out
            assert len(list((tmp_path / "results").glob("*.png"))) == 3
