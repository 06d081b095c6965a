"""A model that has learned nothing is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from report.fake_run import rewrite, write_fake_run
from torch import nn

from arat_fast.cli import main
from arat_fast.evaluation import ImageSet, ThreatModel
from arat_fast.evaluation.suite import collapse, evaluate_all
from arat_fast.report import write_report

NAMES = ("cat", "dog", "owl", "hen")


@pytest.mark.parametrize(
    ("answers", "labels", "correct", "word"),
    [
        ([960, 20, 10, 10], [250, 250, 250, 250], 270, "cat"),
        ([0, 0, 1000, 0], [300, 300, 200, 200], 200, "owl"),
        ([300, 300, 200, 200], [250, 250, 250, 250], 255, "chance, 25 %"),
        ([3, 3, 2, 2], [3, 2, 3, 2], 4, "chance"),
        ([700, 100, 100, 100], [600, 200, 100, 100], 610, "always answering cat, 60 %"),
        ([0, 1000, 0, 0], [20, 980, 0, 0], 980, "always answering dog"),
        ([250, 250, 250, 250], [250, 250, 250, 250], 700, ""),
        ([500, 500, 0, 0], [500, 500, 0, 0], 900, ""),
        ([0, 0, 10, 0], [0, 0, 10, 0], 10, ""),
    ],
)
def test_what_is_said(answers: list[int], labels: list[int], correct: int, word: str) -> None:
    said = collapse(torch.tensor(answers), torch.tensor(labels), correct, NAMES)
    assert word in said and bool(said) == bool(word)


def test_an_evaluation_says_so() -> None:
    head = nn.Linear(16, 4)
    nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([0.0, 1.0, 0.0, 0.0])
    model = nn.Sequential(nn.Flatten(), head)
    images = ImageSet(torch.rand(40, 1, 4, 4), torch.arange(40) % 4, NAMES)
    options = {"num_steps": 1, "alpha": 0.1, "attacks": ["pgd"], "batch_size": 40, "seed": 0}
    suite = evaluate_all(model, images, ThreatModel(0.1), **options)  # type: ignore[arg-type]
    assert suite.remarks() == {
        "collapsed": "100 % of the answers are dog: the model has collapsed",
        "per_class": {"images": [10] * 4, "clean": [0, 10, 0, 0], "pgd1": [0, 10, 0, 0]},
    }


@pytest.mark.slow
def test_summary_report_and_command_line_name_model_and_ball(
    ema_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An untrained network; three balls, each with a record of its own."""
    shutil.copytree(ema_run, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rewrite(tmp_path / "run" / "summary.json", "collapsed", "nothing was learned")
    clean = summary["accuracy"]["clean"]
    assert ("collapsed" in summary) == (clean["interval"][0] <= 0.2)
    balls = {"": [], "-L2-0.5": ["--norm", "L2", "--eps", "0.5"], "-0.0313725": ["--eps", "8/255"]}
    for name, options in balls.items():
        arguments = ["eval", str(tmp_path / "run"), "--attacks", "pgd", "--max-samples", "20"]
        assert main([*arguments, *options, "--device", "cpu"]) == 0
        record = json.loads((tmp_path / "run" / f"evaluation{name}.json").read_text())
        said = capsys.readouterr().out
        norm, eps = record["norm"], record["eps"]
        assert f"{norm} {'8/255' if eps == 8 / 255 else eps}" in said
        assert ("warning: " in said) == ("collapsed" in record)
    page = write_report(tmp_path / "run").read_text()
    assert "nothing was learned" in page
    assert page.count("evaluation-L2-0.5.json") and "is not shown" not in page


def test_a_report_of_a_run_that_learned_is_silent(tmp_path: Path) -> None:
    page = write_report(write_fake_run(tmp_path / "run", epochs=1)).read_text()
    assert "chance" not in page and "collapsed" not in page
