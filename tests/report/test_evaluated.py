"""What was evaluated after the training, in the report of the run."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from report.fake_run import accuracy, rewrite

from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.report import write_report
from arat_fast.report.radii import by_radius
from arat_fast.report.run import Accuracy
from arat_fast.report.words import interval


@pytest.fixture(scope="module")
def run(ema_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an epoch, of which 30 images were evaluated later."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(ema_run, folder)
    evaluate_checkpoint(
        folder,
        attacks=["pgd"],
        max_samples=30,
        num_steps=2,
        device="cpu",
        out=folder / "evaluation.json",
    )
    return folder


def section(folder: Path) -> str:
    """The text of the section."""
    page = write_report(folder).read_text(encoding="utf-8")
    found = re.search(r'<section id="measurements".*?</section>', page, re.DOTALL)
    assert found is not None
    return html.unescape(re.sub(r"<[^>]*>", "", found[0]))


def test_every_accuracy_is_shown(run: Path) -> None:
    text = section(run)
    record = json.loads((run / "evaluation.json").read_text())
    assert list(record["accuracy"]) == ["clean", "clean_branch", "pgd2"]
    for entry in record["accuracy"].values():
        assert interval(*entry["interval"], 30) in text
        assert f"{entry['correct']:,} of {entry['num_samples']:,}" in text
    assert (
        "PGD-2" in text
        and "; steps 2" in text
        and "num_" not in text
        and "is not shown" not in text
    )


@pytest.mark.slow
def test_accuracy_by_radius(run: Path) -> None:
    """A row a radius, among them that of the summary; of two evaluations that of more images."""
    path = run / "evaluation-0.05.json"
    assert 'id="radii"' not in write_report(run).read_text(encoding="utf-8")
    options: dict[str, Any] = {"attacks": ["pgd"], "max_samples": 20, "num_steps": 1}
    record = evaluate_checkpoint(run, eps=0.05, device="cpu", out=path, **options)
    page = html.unescape(write_report(run).read_text(encoding="utf-8"))
    path.unlink()
    path.with_suffix(".npz").unlink()
    table = page[page.index('id="radii"') : page.index('id="classes"')]
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', table, re.DOTALL)
    assert [radius for radius, _ in rows] == ["0 (clean)", "0.05", "0.12"]
    share = 100 * record["accuracy"]["pgd1"]["value"]
    cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td>.*?</td>", rows[1][1])]
    assert cells[0].startswith(f"{share:.1f}") and cells[1] == "–"
    assert re.findall(r"of (\d+)", rows[2][1]) == ["40", "30"]
    (found,) = by_radius(
        [
            {"pgd2": Accuracy(right, number, {"norm": "L2", "eps": eps})}
            for eps, right, number in ((0.5, 6, 10), (0.25, 8, 10), (0.5, 30, 60))
        ]
    )
    assert [(eps, a.correct) for eps, (a,) in found.rows.items() if a] == [(0.25, 8), (0.5, 30)]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"weights_sha256": "0"}, False),
        pytest.param({"dataset": "svhn"}, False, marks=pytest.mark.slow),
        pytest.param({"left_out": {"autoattack": "a reason"}}, True, marks=pytest.mark.slow),
    ],
)
def test_a_record_of_something_else_is_named_and_not_shown(
    run: Path, changes: dict[str, object], shown: bool
) -> None:
    path, other = run / "evaluation.json", run / "model.evaluation.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **changes}))
    other.write_text(before)
    text = section(run)
    path.write_text(before)
    other.unlink()
    assert ("\nevaluation.json is not shown" in text) != shown
    assert "model.evaluation.json is not shown" in text
    assert ("PGD-2" in text) == shown
    assert ("AutoAttack was left out: a reason" in text) == shown


@pytest.mark.parametrize(
    ("num_samples", "eps", "shown"), [(40, 0.12, True), (40, 0.06, False), (39, 0.12, False)]
)
def test_autoattack_after_the_training_stands_at_the_top(
    run: Path, num_samples: int, eps: float, shown: bool
) -> None:
    path = run / "evaluation.json"
    before = path.read_text()
    found = accuracy(7, num_samples, norm="Linf", eps=eps)
    rewrite(path, "accuracy", "autoattack", found)
    page = write_report(run).read_text(encoding="utf-8")
    path.write_text(before)
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    top, rest = text.split("What this means", 1)
    assert ("not measured" not in top) == ("; of evaluation.json, later" in top) == shown
    assert (f"7 of {num_samples} right" in top) == shown
    assert ("this is the number to compare" in rest) == shown
    assert ("AutoAttack, to compare" not in rest) == shown
    assert f"7 of {num_samples}" in rest


def test_without_a_record_or_weights(run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "summary.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert "evaluation.json" not in section(tmp_path)
    (tmp_path / "evaluation.json").write_bytes((run / "evaluation.json").read_bytes())
    assert "cannot be read" in section(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK")
    assert "cannot be read" in section(tmp_path)
