"""The comparison as a page of its own, in the style of the runs' reports."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from urllib.parse import quote

from arat_fast import __version__
from arat_fast.compare.plane import describe_plane, plane, robust_metric
from arat_fast.compare.results import SUM, Results, Row, Spread, train_seconds
from arat_fast.compare.tables import (
    ablation_rows,
    column_name,
    conditions,
    cost_note,
    method_rows,
    notes,
)
from arat_fast.report import style
from arat_fast.report.html import Child, Html, image, join, table, tag
from arat_fast.report.page import Section, page
from arat_fast.report.words import DASH, duration, plain
from arat_fast.statistics import wilson_interval


def comparison_page(results: Results) -> str:
    """The whole HTML document; it needs nothing else, and links to the reports of its runs."""
    candidates: list[tuple[str, str, Html | None]] = [
        ("plane", "Robustness and accuracy", _plane(results)),
        ("methods", "Methods", _method_table(results)),
        ("ablation", "Ablation", _ablation(results)),
        ("meaning", "What this means", _meaning(results)),
        ("runs", "Runs", _runs(results)),
        ("options", "What each method sets", _options(results)),
        ("again", "Run it again", _again(results)),
    ]
    sections = [Section(anchor, title, body) for anchor, title, body in candidates if body]
    closing = f"Comparison written by arat_fast {__version__}."
    return page(_title(results), _opening(results), sections, closing)


def _title(results: Results) -> str:
    number = len(method_rows(results))
    return f"{number} method{'' if number == 1 else 's'} on {results.plan.config.recipe}"


def _opening(results: Results) -> Html:
    found = notes(results)
    notice = tag("div", [tag("p", note) for note in found], class_="notice") if found else None
    return join(
        [
            tag("p", f"recipe {results.plan.config.recipe}", class_="eyebrow"),
            tag("h1", _title(results)),
            tag("p", conditions(results), class_="lead"),
            notice,
        ]
    )


def _plane(results: Results) -> Html | None:
    figure, metric = plane(results), robust_metric(results)
    if figure is None or metric is None:
        return None
    svg = style.to_svg(figure)
    caption = (
        "Further up and further right is better; along a dashed line the sum of clean and "
        f"{column_name(metric)} accuracy stays the same. Large marks are means over the seeds with "
        "one standard deviation, small ones single seeds; hollow marks belong to the ablation."
    )
    return tag(
        "figure",
        image(svg, "image/svg+xml", describe_plane(results), class_="plot"),
        tag("figcaption", caption),
        class_="panel",
    )


def _method_table(results: Results) -> Html:
    rows = [(row.title, row) for row in method_rows(results)]
    return join([_table(rows, results), tag("p", cost_note(results), class_="small")])


def _ablation(results: Results) -> Html | None:
    rows = ablation_rows(results)
    if not rows:
        return None
    words = (
        "Naive invariance pulls the features of clean and adversarial images together from both "
        "sides, through one BatchNorm and without a predictor. Each further row adds one part to "
        "it, alone; the last has all of them."
    )
    return join([tag("p", words, class_="prose"), _table(rows, results)])


def _table(rows: Sequence[tuple[str, Row]], results: Results) -> Html:
    headings: list[Child] = ["Method", *map(_heading, results.metrics), "Cost", "Training"]
    body: list[list[Child]] = []
    for title, row in rows:
        cells: list[Child] = [tag("b", title)]
        cells += [_cell(row.spreads.get(metric)) for metric in results.metrics]
        cells.append([row.planned.cost, tag("span", "passes", class_="small")])
        cells.append(duration(row.train_seconds) if row.train_seconds is not None else DASH)
        body.append(cells)
    return table(headings, body, class_="runs")


def _heading(metric: str) -> str:
    return "Sum" if metric == SUM else column_name(metric)


def _cell(spread: Spread | None) -> Child:
    if spread is None:
        return DASH
    deviation = "" if spread.std is None else f" ± {spread.std:.2f}"
    values = ", ".join(f"{value:.1f}" for value in spread.values)
    return [
        tag("span", f"{spread.mean:.2f}{deviation}", class_="big"),
        tag("span", values, class_="small"),
    ]


def _meaning(results: Results) -> Html:
    points = [
        "The standard deviation (n − 1) is that between seeds. With few seeds it is a rough "
        "guess itself: two methods whose means lie closer than it are not told apart.",
        "Robust accuracy is what today’s attacks leave over: an upper bound, not a guarantee.",
    ]
    if SUM in results.metrics:
        points.append("Sum: clean plus AutoAttack accuracy of each seed, then the mean.")
    n = results.num_samples()
    if n:
        points.append(
            f"All runs are tested on the same {n:,} images. How an accuracy would come out on "
            f"others is uncertain by up to {100 * _half_width(results, n):.1f} points "
            "(95\u202f%, Wilson), whatever the number of seeds."
        )
    return tag("ul", [tag("li", point) for point in points], class_="prose")


def _half_width(results: Results, n: int) -> float:
    """Half of the widest interval of the rows' mean accuracies on ``n`` images."""
    names = [name for name in results.metrics if name != SUM]
    shown = [row.spreads[name] for row in results.rows for name in names if name in row.spreads]
    intervals = [wilson_interval(round(spread.mean / 100 * n), n) for spread in shown]
    return max((high - low) / 2 for low, high in intervals)


def _runs(results: Results) -> Html:
    headings: list[Child] = ["Run", *map(_heading, results.metrics), "Training", "Weights"]
    titles = {row.planned.method.label: row.title for row in results.rows}
    body: list[list[Child]] = []
    for cell in results.record["cells"]:
        name: Child = tag("b", f"{titles[cell['label']]}, seed {cell['seed']}")
        if cell["status"] != "finished":
            body.append([name, cell["status"], *[DASH] * (len(headings) - 2)])
            continue
        link = tag("a", cell["run"], href=quote(f"{cell['run']}/report.html"))
        shared = cell["shared_training"]
        training: list[Child] = [duration(train_seconds(cell))]
        if shared:
            training.append(tag("span", f"that of {shared}", class_="small"))
        accuracy = cell["accuracy"]
        entries = [_counts(accuracy, metric) for metric in results.metrics]
        body.append([[name, tag("span", link, class_="small")], *entries, training, cell["model"]])
    return table(headings, body, class_="runs")


def _counts(accuracy: dict[str, dict[str, int]], metric: str) -> Child:
    if metric == SUM:
        if "clean" not in accuracy or "autoattack" not in accuracy:
            return DASH
        parts = [accuracy[name] for name in ("clean", "autoattack")]
        return f"{sum(100 * part['correct'] / part['num_samples'] for part in parts):.1f}"
    if metric not in accuracy:
        return DASH
    entry = accuracy[metric]
    return [
        f"{100 * entry['correct'] / entry['num_samples']:.1f}",
        tag("span", f"{entry['correct']} of {entry['num_samples']}", class_="small"),
    ]


def _options(results: Results) -> Html:
    rows = [
        [tag("b", row.title), tag("code", shlex.join(row.planned.method.options))]
        for row in results.rows
    ]
    shared = results.plan.config
    words = (
        f"Beside the recipe {shared.recipe}, trained with PGD-{shared.attack.num_steps} in the "
        f"{shared.attack.norm} ball of radius {plain(shared.attack.eps)}."
    )
    return join([tag("p", words), table(["Method", "Overrides"], rows, class_="options")])


def _again(results: Results) -> Html:
    versions = ", ".join(f"{k} {v}" for k, v in results.record["versions"].items())
    commit = results.record["commit"]
    at = f", commit {commit}" if commit else ""
    return join(
        [
            tag("pre", "\n".join(results.plan.commands)),
            tag("p", f"Computed with {versions}{at}.", class_="small"),
            tag(
                "p",
                "comparison.json beside this page holds the configuration, the command line and "
                "the counts of every run.",
                class_="small",
            ),
        ]
    )
