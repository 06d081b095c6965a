"""Statistics, tables, plane and page of made-up comparisons."""

from __future__ import annotations

import copy
import html
import re
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text

from arat_fast.compare.command import write_comparison
from arat_fast.compare.methods import choose_methods
from arat_fast.compare.page import comparison_page
from arat_fast.compare.plan import Plan, PlannedMethod, plan_to_dict
from arat_fast.compare.plane import describe_plane, overlap, place_labels, plane
from arat_fast.compare.results import evaluate_record
from arat_fast.compare.tables import latex_text, to_latex, to_markdown
from arat_fast.config import config_to_dict
from arat_fast.recipes import recipe

# Clean, PGD-20 and AutoAttack counts of 360, by method and seed.
COUNTS = {
    "natural": [(358, 30, 4), (357, 25, 2), (359, 33, 6)],
    "at": [(354, 325, 320), (356, 320, 318), (355, 323, 321)],
    "trades": [(350, 326, 323), (351, 327, 324), (352, 325, 322)],
    "arat": [(357, 328, 325), (358, 326, 323), (357, 327, 324)],
    "arat+swa": [(356, 329, 326), (357, 328, 325), (357, 328, 325)],
    "naive": [(352, 318, 314), (353, 320, 316), (351, 316, 312)],
    "naive+stop-gradient": [(354, 321, 318), (353, 320, 317), (355, 322, 319)],
    "naive+predictor": [(352, 318, 315), (353, 319, 316), (352, 319, 315)],
    "naive+split-bn": [(356, 324, 321), (357, 325, 322), (356, 323, 320)],
}


def make_record(counts: dict[str, list[tuple[int, int, int]]]) -> dict[str, Any]:
    config = recipe("digits")
    methods = choose_methods([m for m in counts if not m.startswith("naive")], ablation=True)
    methods = [method for method in methods if method.label in counts]
    planned = tuple(PlannedMethod(method, 23, 26.0) for method in methods)
    seeds = tuple(range(len(next(iter(counts.values())))))
    plan = Plan(config, planned, seeds, "work", "arat-fast compare digits")
    cells = []
    for cell in plan.cells():
        clean, pgd, auto = counts[cell.label][cell.seed]
        found = {"clean": clean, "pgd20": pgd, "autoattack": auto}
        cells.append(
            {
                "label": cell.label,
                "seed": cell.seed,
                "run": cell.run,
                "status": "finished",
                "command": f"arat-fast train digits --seed {cell.seed}",
                "config": config_to_dict(cell.config),
                "shared_training": None,
                "accuracy": {
                    name: {"value": n / 360, "correct": n, "num_samples": 360}
                    for name, n in found.items()
                },
                "model": "last",
                "natural_model": None,
                "wall_seconds": {"train": 80.0, "eval": 60.0},
                "device": "cpu, 1 threads",
                "precision": "float32",
                "commit": "0123456789ab",
                "versions": {"torch": "2.11.0"},
            }
        )
    return {
        "format": 1,
        **plan_to_dict(plan),
        "jobs": 2,
        "threads": 1,
        "versions": {"torch": "2.11.0"},
        "commit": "0123456789ab",
        "cells": cells,
    }


@pytest.fixture
def record() -> dict[str, Any]:
    return make_record(COUNTS)


def test_mean_and_deviation_over_seeds(record: dict[str, Any]) -> None:
    results = evaluate_record(record)
    assert results.metrics == ("clean", "pgd20", "autoattack", "sum")
    rows = {row.planned.method.label: row for row in results.rows}
    for label, counts in COUNTS.items():
        for index, metric in enumerate(("clean", "pgd20", "autoattack")):
            values = [100 * seed[index] / 360 for seed in counts]
            spread = rows[label].spreads[metric]
            assert spread.values == pytest.approx(values)
            assert spread.mean == pytest.approx(statistics.mean(values))
            assert spread.std == pytest.approx(statistics.stdev(values))
        sums = [100 * (seed[0] + seed[2]) / 360 for seed in counts]
        assert rows[label].spreads["sum"].values == pytest.approx(sums)
        assert rows[label].spreads["sum"].std == pytest.approx(statistics.stdev(sums))


def test_one_seed_has_no_deviation() -> None:
    results = evaluate_record(make_record({"at": [(354, 325, 320)]}))
    assert results.rows[0].spreads["clean"].std is None
    assert "| AT | 98.33 | 90.28 | 88.89 | 187.22 | 1 |" in to_markdown(results)
    assert plane(results) is not None


def test_markdown(record: dict[str, Any]) -> None:
    text = to_markdown(evaluate_record(record))
    assert "on 360 test images of digits" in text and "over seeds 0, 1, 2" in text
    lines = text.splitlines()
    assert "| Method | Clean | PGD-20 | AutoAttack | Clean + AutoAttack | n | Cost |" in lines
    values = [100 * seed[0] / 360 for seed in COUNTS["arat"]]
    clean = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    (row,) = (line for line in lines if line.startswith("| ARAT |"))
    (whole,) = (line for line in lines if line.startswith("| all (ARAT) |"))
    assert f"| {clean} |" in row and row.endswith("| 3 | 23 × 26 |")
    assert whole.removeprefix("| all (ARAT)") == row.removeprefix("| ARAT")
    ablation = [
        line.split(" | ")[0].strip("| ")
        for line in lines[
            lines.index(
                "| Ablation | " + ("Clean | PGD-20 | AutoAttack | Clean + AutoAttack | n | Cost |")
            )
            + 2 :
        ]
        if line.startswith("|")
    ]
    assert ablation == [
        "Naive invariance", "+ stop-gradient", "+ predictor", "+ split BN", "all (ARAT)"
    ]  # fmt: skip
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {8}


def test_what_is_missing_is_said(record: dict[str, Any]) -> None:
    record["cells"][0] = {**record["cells"][0], "status": "failed", "reason": "a reason"}
    record["cells"][1] = {**record["cells"][1], "status": "pending"}
    record["cells"][2]["device"] = "another"
    record["cells"][3]["versions"] = {"torch": "1.0"}
    results = evaluate_record(record)
    text = to_markdown(results)
    assert f"Note: {record['cells'][0]['run']} failed: a reason." in text
    assert "Note: 1 of 27 runs are not finished." in text
    assert "Note: the runs differ in device: another; cpu, 1 threads." in text
    assert "Note: the runs differ in the versions" in text
    assert results.rows[0].num_seeds == 2
    for note in ("a reason", "1 of 27 runs"):
        assert note in comparison_page(results)


def test_versions_that_an_older_record_does_not_name_are_no_difference(
    record: dict[str, Any],
) -> None:
    record["cells"][0]["versions"] = {"torch": "2.11.0", "numpy": "2.0"}
    assert "versions" not in to_markdown(evaluate_record(record))


def test_settings_of_single_methods_are_said() -> None:
    record = make_record({"at": [(354, 325, 320)], "arat+swa": [(356, 329, 326)]})
    note = "Note: ARAT + SWA has settings of its own: average.kind=swa."
    text = to_markdown(evaluate_record(record))
    assert note in text and text.count("Note: ") == 1
    # What the rows of the ablation switch is in their titles.
    assert to_markdown(evaluate_record(make_record(COUNTS))).count("Note: ") == 1
    record["cells"][0]["config"]["model"]["name"] = "resnet18"
    record["cells"][0]["config"]["objective"]["beta"] = 1.0
    record["cells"][0]["config"]["attack"]["eps"] = 0.2
    results = evaluate_record(record)
    own = "AT has settings of its own: model.name=resnet18, objective.beta=1.0, attack.eps=0.2."
    for content in (to_markdown(results), to_latex(results)):
        assert f"Note: {own}" in content
    assert own in comparison_page(results)


def test_how_far_arrest_is_the_published_one() -> None:
    results = evaluate_record(make_record({"at": [(1, 1, 1)], "arrest": [(354, 325, 320)]}))
    shared = "All methods run with the recipe's optimiser, schedule and augmentation"
    for text in (to_markdown(results), to_latex(results), html.unescape(comparison_page(results))):
        assert "ARREST follows the paper's abstract and later work" in text
        assert "distillation 10 and replay 0.1, are set here and not tuned" in text
        assert shared in text
    assert "ARREST" not in to_markdown(evaluate_record(make_record({"at": [(1, 1, 1)]})))


def test_the_uncertainty_is_that_of_the_widest_row() -> None:
    # Wilson's interval of 180 of 360 is 44.86 to 55.14 %, that of 324 of 360 is 86.47 to 92.70 %.
    for counts, points in ({"at": [(324, 324, 324)]}, "3.1"), ({"at": [(324, 324, 180)]}, "5.1"):
        page = comparison_page(evaluate_record(make_record(counts)))
        assert f"uncertain by up to {points} points" in page


@pytest.mark.parametrize(("teacher", "seconds"), [(None, 85.0), ("natural", 80.0)])
def test_natural_training_counts_where_the_run_made_it(teacher: str | None, seconds: float) -> None:
    record = make_record({"arrest": [(354, 325, 320)]})
    (cell,) = record["cells"]
    cell["natural_model"] = {"source": "natural", "epochs": 3, "train_seconds": 5.0, "clean": 0.9}
    cell["config"]["objective"]["teacher"] = teacher
    assert evaluate_record(record).rows[0].train_seconds == seconds


def test_nothing_finished() -> None:
    record = make_record({"at": [(1, 1, 1)]})
    record["cells"][0] = {"label": "at", "seed": 0, "run": "at-seed0", "status": "pending",
                          "shared_training": None}  # fmt: skip
    results = evaluate_record(record)
    assert plane(results) is None
    assert "| AT | 0 | 23 × 26 |" in to_markdown(results)
    assert "\\begin{tabular}{lr}" in to_latex(results)
    assert "pending" in comparison_page(results)


def test_latex(record: dict[str, Any]) -> None:
    text = to_latex(evaluate_record(record))
    assert text.isascii()
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("\\")] == [
        "\\begin{tabular}{lrrrrr}", "\\toprule", "\\midrule", "\\midrule", "\\bottomrule",
        "\\end{tabular}",
    ]  # fmt: skip
    rows = [line for line in lines if line.endswith("\\\\")]
    assert len(rows) == 1 + len(COUNTS) + 1
    assert all(row.replace("\\&", "").count("&") == 5 for row in rows)
    # What has no column is said above.
    assert "% Sum: Clean + AutoAttack." in lines
    assert sum(line.startswith("% Cost of ") for line in lines) == len(COUNTS) + 1
    # Braces, dollars and environments in pairs.
    body = "\n".join(line for line in lines if not line.startswith("%"))
    assert body.count("{") == body.count("}")
    assert body.count("$") % 2 == 0


def test_latex_escapes() -> None:
    assert latex_text(r"[*] 50% & #1 a_b {x} $y$ ~^\ ") == (
        r"{[}{*}] 50\% \& \#1 a\_b \{x\} \$y\$ \textasciitilde{}\textasciicircum{}\textbackslash{} "
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(record: dict[str, Any], tmp_path: Path) -> None:
    record["methods"][0]["title"] = r"[*] 50% & #1 a_b {x} $y$ ~^\ "
    (tmp_path / "table.tex").write_text(to_latex(evaluate_record(record)))
    (tmp_path / "main.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{table}\\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "Output written on main.pdf (1 page" in done.stdout


def test_every_mark_of_the_plane_is_named(record: dict[str, Any]) -> None:
    figure = plane(evaluate_record(record))
    assert figure is not None
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    for name in ("AT", "TRADES", "ARAT", "ARAT + SWA", "Naive invariance", "naive + split BN"):
        assert name in texts
    # Far to the left of all others: named at the edge, and the axis stays with the others.
    assert "Natural" not in texts
    assert any(text.startswith("◁ Natural: clean 99.4, robust 1.1") for text in texts)
    assert axes.get_xlim()[0] > 80
    assert axes.get_ylim()[1] <= 101
    assert any(re.fullmatch(r"sum [\d.]+", text) for text in texts)
    described = describe_plane(evaluate_record(record))
    assert "AT clean 98.6, robust 88.8" in described and "Natural" in described


def boxes(texts: Sequence[Text]) -> list[tuple[float, float, float, float]]:
    extents = [text.get_window_extent() for text in texts]
    return [(e.x0, e.y0, e.x1, e.y1) for e in extents]


@pytest.mark.parametrize("crowd", [0, 1, 2])
def test_labels_of_the_plane_do_not_overlap(crowd: int, record: dict[str, Any]) -> None:
    rng = np.random.default_rng(crowd)
    counts = copy.deepcopy(COUNTS)
    for label in counts:
        # All within one percent of each other.
        center = rng.integers(0, 3, 3)
        counts[label] = [
            (355 + int(a), 326 + int(b), 321 + int(c))
            for a, b, c in (center + rng.integers(0, 2, 3) for _ in range(3))
        ]
    figure = plane(evaluate_record(make_record(counts)))
    assert figure is not None
    (axes,) = figure.axes
    figure.draw_without_rendering()
    names = [text for text in axes.texts if not re.match(r"sum |◁", text.get_text())]
    assert len(names) == len(counts)
    found = boxes(names)
    for index, box in enumerate(found):
        assert all(overlap(box, other) == 0 for other in found[:index])
    frame = axes.get_window_extent()
    for box in found:
        area = (box[2] - box[0]) * (box[3] - box[1])
        assert overlap(box, (frame.x0, frame.y0, frame.x1, frame.y1)) == pytest.approx(area)


points = st.tuples(st.floats(100, 500), st.floats(100, 400))


@settings(max_examples=30, deadline=None)
@given(st.lists(points, min_size=1, max_size=8))
def test_labels_find_room(anchors: list[tuple[float, float]]) -> None:
    sizes = [(60.0, 12.0)] * len(anchors)
    frame = (0.0, 0.0, 600.0, 500.0)
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]
    corners = place_labels(anchors, sizes, marks, frame)
    placed = [(x, y, x + 60, y + 12) for x, y in corners]
    assert len(placed) == len(anchors)
    for index, box in enumerate(placed):
        assert overlap(box, frame) == pytest.approx(60 * 12)
        assert all(overlap(box, other) < 1 for other in placed[:index])


def test_page(record: dict[str, Any]) -> None:
    record["methods"][1]["title"] = "<script>alert(1)</script>"
    record["commands"] = ["arat-fast compare digits --variant '<b>'", "arat-fast compare again"]
    text = comparison_page(evaluate_record(record))
    assert "&lt;b&gt;&#x27;\narat-fast compare again</pre>" in text
    assert "<script" not in text and "<b>'" not in text
    assert "&lt;script&gt;" in text
    links = re.findall(r'href="([^"]*)"', text)
    assert len(links) == 27
    assert "naive%2Bsplit-bn-seed2/report.html" in links
    assert all(re.fullmatch(r"[\w.%-]+/report\.html", link) for link in links)
    for anchor in ("plane", "methods", "ablation", "meaning", "runs", "options", "again"):
        assert f'<section id="{anchor}">' in text
    assert "325 of 360" in text


def test_without_autoattack_the_attack_that_was_run_is_named() -> None:
    record = make_record({"natural": [(358, 4, 0), (30, 1, 0)], "at": [(350, 300, 0)] * 2})
    for cell in record["cells"]:
        del cell["accuracy"]["autoattack"]
    results = evaluate_record(record)
    text = comparison_page(results)
    assert "Sum:" not in text and "AutoAttack" not in text
    assert "the sum of clean and PGD-20 accuracy stays the same" in text
    figure = plane(results)
    assert figure is not None
    for low, high in (figure.axes[0].get_xlim(), figure.axes[0].get_ylim()):
        assert -2 <= low < high <= 102


def test_files(record: dict[str, Any], tmp_path: Path) -> None:
    write_comparison(tmp_path, record)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {f"comparison.{ending}" for ending in ("md", "tex", "png", "html")}
    assert first["comparison.png"].startswith(b"\x89PNG")
    write_comparison(tmp_path, record)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_a_record_of_another_shape_is_refused(record: dict[str, Any]) -> None:
    for name in ("methods", "seeds", "config", "cells"):
        broken = {key: value for key, value in record.items() if key != name}
        with pytest.raises(ValueError, match="not a comparison of this version"):
            evaluate_record(broken)
