"""Statistics, tables, plane and page of made-up comparisons."""

from __future__ import annotations

import copy
import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arat_fast.compare.command import write_comparison
from arat_fast.compare.methods import choose_methods
from arat_fast.compare.plan import Plan, PlannedMethod, plan_to_dict, read_record
from arat_fast.compare.plane import plane
from arat_fast.compare.results import evaluate_record, notes
from arat_fast.compare.tables import comparison_page, latex_text, to_latex, to_markdown
from arat_fast.config import config_to_dict
from arat_fast.objectives import ARREST
from arat_fast.recipes import recipe
from arat_fast.statistics import pack

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
    planned = tuple(
        PlannedMethod(**vars(method), epochs=23, passes_per_image=26.0) for method in methods
    )
    seeds = tuple(range(len(next(iter(counts.values())))))
    plan = Plan(config, planned, seeds, "work", ("arat-fast compare digits",))
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


def test_paired_differences() -> None:
    """Of two rows whose images are known: by the formula, over the seeds that both have."""
    record = make_record({"at": COUNTS["at"], "arat": COUNTS["arat"]})
    rng = np.random.default_rng(0)
    right = {}
    for cell in record["cells"]:
        bits = np.zeros(360, bool)
        bits[rng.permutation(360)[: cell["accuracy"]["clean"]["correct"]]] = True
        right[cell["label"], cell["seed"]] = bits
        if cell["run"] != "at-seed2":
            cell["right"] = {"clean": pack(bits)}
    results = evaluate_record(record)
    ((title, found),) = results.differences
    assert (results.reference.method.label, title, list(found)) == ("arat", "AT", ["clean"])
    each = [right["arat", s].astype(float) - right["at", s] for s in (0, 1)]
    mean = sum(each) / 2
    half = 196 * mean.std(ddof=1) / math.sqrt(360)
    expected = (100 * mean.mean(), 100 * mean.mean() - half, 100 * mean.mean() + half)
    assert (found["clean"].mean, found["clean"].low, found["clean"].high) == pytest.approx(expected)
    row = f"| AT | {found['clean']} | – | – |"
    assert row in to_markdown(results) and str(found["clean"]) in comparison_page(results)
    assert "less …" not in to_markdown(evaluate_record(make_record(COUNTS)))


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return make_record(COUNTS)


@pytest.fixture
def record(made: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(made)


def test_mean_and_deviation_over_seeds(record: dict[str, Any]) -> None:
    results = evaluate_record(record)
    assert results.metrics == ("clean", "pgd20", "autoattack", "sum")
    rows = {row.method.label: row for row in results.rows}
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


def test_markdown(record: dict[str, Any]) -> None:
    lines = to_markdown(evaluate_record(record)).splitlines()
    tables = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    head = ["Clean", "PGD-20", "AutoAttack", "Clean + AutoAttack", "n", "Cost"]
    assert ["Method", *head] in tables and {len(row) for row in tables} == {7}
    found = {row[0]: row[1:] for row in tables}
    values = [100 * seed[0] / 360 for seed in COUNTS["arat"]]
    assert found["ARAT"][0] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert found["ARAT"][-2:] == ["3", "23 × 26"]
    assert found["all (ARAT)"] == found["ARAT"]
    assert list(found)[list(found).index("Ablation") + 1 :] == [
        "Naive invariance", "+ stop-gradient", "+ predictor", "+ split BN", "all (ARAT)"
    ]  # fmt: skip


def test_what_is_missing_is_said(record: dict[str, Any]) -> None:
    record["cells"][0] = {**record["cells"][0], "status": "failed", "reason": "a reason"}
    record["cells"][1] = {**record["cells"][1], "status": "pending"}
    record["cells"][2]["device"] = "another"
    record["cells"][3]["versions"] = {"torch": "1.0"}
    # What an older record does not name is no difference.
    record["cells"][4]["versions"] = {"torch": "2.11.0", "numpy": "2.0"}
    results = evaluate_record(record)
    found = notes(results)
    for keyword in ("a reason", "1 of 27 runs", "device: another", "versions"):
        assert sum(keyword in note for note in found) == 1
    assert results.rows[0].num_seeds == 2
    for text in (to_markdown(results), to_latex(results), comparison_page(results)):
        assert all(note in text for note in found)


def test_settings_of_single_methods_are_said() -> None:
    record = make_record({"trades": [(354, 325, 320)], "arat+swa": [(356, 329, 326)]})
    (note,) = notes(evaluate_record(record))
    assert "ARAT + SWA" in note and note.endswith(" average.kind=swa.")
    # What the rows of the ablation switch is in their titles.
    assert len(notes(evaluate_record(make_record(COUNTS)))) == 1
    config = record["cells"][0]["config"]
    config["model"]["name"], config["objective"]["beta"] = "resnet18", 1.0
    first, _ = notes(evaluate_record(record))
    assert first.endswith("model.name=resnet18, objective.beta=1.0.")


def test_the_reservation_of_an_objective_is_said() -> None:
    record = make_record({"at": [(1, 1, 1)], "arrest": [(354, 325, 320)]})
    assert notes(evaluate_record(record)) == [ARREST.note]
    # One's own, whose module is not at hand.
    record = make_record({"at": [(354, 325, 320)]})
    record["cells"][0]["config"]["objective"] = {"name": "no.such.module:Mine", "strength": 2.0}
    assert notes(evaluate_record(record)) == []
    assert evaluate_record(record).rows[0].spreads["clean"].std is None


def test_the_uncertainty_is_that_of_the_widest_row() -> None:
    # Wilson's interval of 180 of 360 is 44.86 to 55.14 %, that of 324 of 360 is 86.47 to 92.70 %.
    for counts, points in ({"at": [(324, 324, 324)]}, "3.1"), ({"at": [(324, 324, 180)]}, "5.1"):
        assert f"{points} points" in comparison_page(evaluate_record(make_record(counts)))


@pytest.mark.parametrize(("teacher", "seconds"), [(None, 85.0), ("natural", 80.0)])
def test_natural_training_counts_where_the_run_made_it(teacher: str | None, seconds: float) -> None:
    record = make_record({"arrest": [(354, 325, 320)]})
    (cell,) = record["cells"]
    cell["natural_model"] = {"source": "natural", "epochs": 3, "train_seconds": 5.0, "clean": 0.9}
    cell["config"]["objective"]["teacher"] = teacher
    assert evaluate_record(record).rows[0].train_seconds == seconds


def test_nothing_finished() -> None:
    record = make_record({"at": [(1, 1, 1)]})
    record["cells"][0] = {"label": "at", "seed": 0, "run": "at-seed0", "status": "pending"}
    results = evaluate_record(record)
    assert plane(results) is None
    assert "| AT | 0 | 23 × 26 |" in to_markdown(results)
    assert "\\begin{tabular}{lr}" in to_latex(results)
    assert "pending" in comparison_page(results)


def test_latex(record: dict[str, Any]) -> None:
    text = to_latex(evaluate_record(record))
    assert text.isascii()
    assert latex_text(r"[*] 50% & #1 a_b {x} $y$ ~^\ ") == (
        r"{[}{*}] 50\% \& \#1 a\_b \{x\} \$y\$ \textasciitilde{}\textasciicircum{}\textbackslash{} "
    )
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("\\")] == [
        "\\begin{tabular}{lrrrrr}", "\\toprule", "\\midrule", "\\midrule", "\\bottomrule",
        "\\end{tabular}",
    ]  # fmt: skip
    rows = [line for line in lines if line.endswith("\\\\")]
    assert len(rows) == 1 + len(COUNTS) + 1
    assert all(row.replace("\\&", "").count("&") == 5 for row in rows)
    # What has no column is said above.
    assert sum(line.startswith("% Cost of ") for line in lines) == len(COUNTS) + 1
    # Braces, dollars and environments in pairs.
    body = "\n".join(line for line in lines if not line.startswith("%"))
    assert body.count("{") == body.count("}")
    assert body.count("$") % 2 == 0


def test_every_mark_of_the_plane_is_named(record: dict[str, Any]) -> None:
    plot = plane(evaluate_record(record))
    assert plot is not None
    (axes,), (legend, key) = plot.figure.axes, plot.figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    # Far to the left of all others: numbers in the legend, and the axis stays with the others.
    assert names[0].startswith("Natural") and "99.4" in names[0] and "1.1" in names[0]
    assert names[1:5] == ["AT", "TRADES", "ARAT", "ARAT + SWA"] and len(names) == len(COUNTS)
    look = [text.get_text() for text in key.get_texts()]
    assert [text.split()[0] for text in look] == ["mean", "one", "same", "hollow:"]
    assert len(axes.containers) == len(COUNTS) - 1
    assert axes.get_xlim()[0] > 80 and axes.get_ylim()[1] <= 101
    assert any(re.fullmatch(r"sum [\d.]+", text.get_text()) for text in axes.texts)
    assert "AT clean 98.6, robust 88.8" in plot.alt and "Natural" in plot.alt


def test_without_autoattack_the_attack_that_was_run_is_named() -> None:
    record = make_record({"natural": [(358, 4, 0), (30, 1, 0)], "at": [(350, 300, 0)] * 2})
    for cell in record["cells"]:
        del cell["accuracy"]["autoattack"]
    results = evaluate_record(record)
    assert results.metrics == ("clean", "pgd20")
    text = comparison_page(results)
    assert "AutoAttack" not in text and "Clean over PGD-20 accuracy" in text
    plot = plane(results)
    assert plot is not None
    for low, high in (plot.figure.axes[0].get_xlim(), plot.figure.axes[0].get_ylim()):
        assert -2 <= low < high <= 102


def test_page(record: dict[str, Any]) -> None:
    record["methods"][1]["title"] = "<script>alert(1)</script>"
    record["commands"] = ["arat-fast compare digits --variant '<b>'", "arat-fast compare again"]
    text = comparison_page(evaluate_record(record))
    assert "<script" not in text and "<b>'" not in text
    assert "&lt;script&gt;" in text and "&lt;b&gt;" in text
    links = re.findall(r'href="([^#"]*)"', text)
    assert len(links) == 27
    assert "naive%2Bsplit-bn-seed2/report.html" in links
    assert all(re.fullmatch(r"[\w.%-]+/report\.html", link) for link in links)
    for anchor in ("plane", "methods", "ablation", "meaning", "runs", "options", "again"):
        assert f'<section id="{anchor}">' in text
    assert "325 of 360" in text


def test_files(record: dict[str, Any], tmp_path: Path) -> None:
    write_comparison(tmp_path, record)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {f"comparison.{ending}" for ending in ("md", "tex", "png", "html")}
    assert first["comparison.png"].startswith(b"\x89PNG")
    write_comparison(tmp_path, record)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


@pytest.mark.parametrize("name", ["methods", "seeds", "config"])
def test_a_record_of_another_shape_is_refused(name: str, record: dict[str, Any]) -> None:
    del record[name]
    with pytest.raises(ValueError, match=name):
        evaluate_record(record)


def test_a_committed_record_is_read() -> None:
    """Of an earlier version, whose objectives had the fields of all methods."""
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    results = evaluate_record(read_record(folder / "compare-digits-2026-11-22.json"))
    tables = [line for line in to_markdown(results).splitlines() if line.startswith("|")]
    before = (folder / "compare-digits-2026-11-22.md").read_text().splitlines()
    assert tables == [line for line in before if line.startswith("|")]
    assert len(comparison_page(results)) > 10_000
