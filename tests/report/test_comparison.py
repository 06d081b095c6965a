"""A run beside others: differences, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report.fake_run import rewrite, write_fake_run

from arat_fast.report import write_report
from arat_fast.report.comparison import Comparison, compare_runs
from arat_fast.report.run import read_run


def compare(*folders: Path) -> Comparison:
    return compare_runs([read_run(folder) for folder in folders])


def test_the_comparison_shows_what_the_method_buys(tmp_path: Path) -> None:
    ours = write_fake_run(tmp_path / "arat", epochs=4)
    other = write_fake_run(tmp_path / "at", objective="at", epochs=4, correct=(320, 270, 262))
    # Twice as fast but for a while, whatever the clock says.
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for number, line in enumerate(line for line in lines if line["kind"] == "train"):
        line["images_per_second"] = 20 if number < 4 else 1120
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare(ours, other)
    assert found.headings == ["Clean", "PGD-20", "AutoAttack", "Sum", "Training"]
    row = found.rows[1]
    # (349 - 320) / 360 = 8.1 points and so on; the sum is of clean and AutoAttack.
    assert [cell.change for cell in row.cells] == ["+8.1", "+5.6", "+1.7", "+9.7", "×2"]
    # Newcombe's interval of 349 and 320 of 360 and of 268 and 262 of 360.
    assert row.cells[0].change_interval == "(+4.4 to +12.0)"
    assert row.cells[2].change_interval == "(−4.8 to +8.1)"
    assert row.clear == ["Clean"] and not row.mismatches
    trade_off, over_epochs = found.plots
    assert "A · ARAT, seed 0" in trade_off.alt and "B PGD-20 ends at" in over_epochs.alt


@pytest.mark.parametrize(
    ("section", "values", "comparable"),
    [
        ("attack", {"eps": 8 / 255}, True),
        pytest.param("train", {"epochs": 2}, True, marks=pytest.mark.slow),
        ("data", {"name": "cifar10"}, False),
        pytest.param("data", {"name": "folder", "root": "b"}, False, marks=pytest.mark.slow),
    ],
)
def test_a_comparison_of_different_tests_says_so(
    tmp_path: Path, section: str, values: dict[str, Any], comparable: bool
) -> None:
    ours = write_fake_run(tmp_path / "ours", epochs=1)
    other = write_fake_run(tmp_path / "other", epochs=1, correct=(100, 90, 80))
    if "root" in values:
        for key, value in {**values, "root": "a"}.items():
            rewrite(ours / "config.json", "config", section, key, value)
    for key, value in values.items():
        rewrite(other / "config.json", "config", section, key, value)
    row = compare(ours, other).rows[1]
    assert len(row.mismatches) == 1
    assert all(bool(cell.change) == comparable for cell in row.cells)
    write_report(ours, [other])


def test_a_comparison_without_autoattack_has_no_sum(tmp_path: Path) -> None:
    ours = write_fake_run(tmp_path / "ours", epochs=1, correct=(357, 4, 3))
    other = write_fake_run(tmp_path / "other", epochs=1, correct=(6, 4, 1))
    for folder in (ours, other):
        final = json.loads((folder / "summary.json").read_text())["accuracy"]
        final = {name: final[name] for name in ("clean", "pgd20")}
        rewrite(folder / "summary.json", "accuracy", final)
    found = compare(ours, other)
    assert found.headings == ["Clean", "PGD-20", "Training"]
    axes = found.plots[0].figure.axes[0]
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert -2 <= low < 1 and high <= 102


def test_single_points_are_marked_inside_the_frame(tmp_path: Path) -> None:
    runs = [write_fake_run(tmp_path / name, epochs=1) for name in ("ours", "other")]
    for run in runs:
        metrics = run / "metrics.jsonl"
        metrics.write_text(metrics.read_text().splitlines(keepends=True)[-1])
    axes = compare(*runs).plots[1].figure.axes[0]
    for line in axes.get_lines():
        assert len(line.get_xdata()) == 1 and line.get_marker() in ("o", "s")
        assert line.get_xdata()[0] < 0.97 * axes.get_xlim()[1]
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["A clean", "A attacked", "B clean", "B attacked"]
    looks = {(x.get_color(), x.get_marker(), x.get_markerfacecolor()) for x in axes.get_lines()}
    assert len(looks) == 4


def test_a_run_without_results_has_empty_cells(tmp_path: Path) -> None:
    ours, other = (write_fake_run(tmp_path / name, epochs=1) for name in ("ours", "other"))
    for name in ("summary.json", "metrics.jsonl"):
        (other / name).unlink()
    assert {cell.value for cell in compare(ours, other).rows[1].cells} == {"–"}


def test_the_longest_evaluation_is_compared(tmp_path: Path) -> None:
    ours = write_fake_run(tmp_path / "ours", epochs=12)
    assert "ema weights" in compare(ours, ours).plots[1].caption
    metrics = ours / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    early = [n for n, line in enumerate(lines) if '"ema"' in line][:2]
    metrics.write_text("".join(line for n, line in enumerate(lines) if n not in early))
    assert "last weights" in compare(ours, ours).plots[1].caption


def test_training_and_test_attacks_never_share_an_axis(tmp_path: Path) -> None:
    ours, other = (write_fake_run(tmp_path / name, epochs=8) for name in ("ours", "other"))
    plot = compare(ours, other).plots[1]
    assert "B PGD-20 ends" in plot.alt and "val images" in plot.caption
    metrics = other / "metrics.jsonl"
    before = metrics.read_text()
    # One was evaluated with other steps, or not at all: then both by their training batches.
    for text in (before.replace('"num_steps": 20', '"num_steps": 10'), before.replace("eval", "x")):
        metrics.write_text(text)
        plot = compare(ours, other).plots[1]
        assert "PGD" not in plot.alt and "A attacked ends" in plot.alt
        assert "val" not in plot.caption
