"""The comparison as a page of its own, in the style of the runs' reports."""

from __future__ import annotations

import shlex

from arat_fast import __version__
from arat_fast.compare.plane import describe_plane, plane, robust_metric
from arat_fast.compare.results import (
    SUM,
    Results,
    column_name,
    conditions,
    cost_note,
    notes,
    percentages,
    train_seconds,
)
from arat_fast.report import style
from arat_fast.report.templates import render
from arat_fast.statistics import wilson_interval


def comparison_page(results: Results) -> str:
    """The whole HTML document; it needs nothing else, and links to the reports of its runs."""
    figure, metric = plane(results), robust_metric(results)
    number = sum(not row.method.ablation for row in results.rows)
    return render(
        "comparison.html.j2",
        title=f"{number} method{'' if number == 1 else 's'} on {results.plan.config.recipe}",
        closing=f"Comparison written by arat_fast {__version__}.",
        results=results,
        config=results.plan.config,
        titles={row.method.label: row.method.title for row in results.rows},
        headings=["Sum" if m == SUM else column_name(m) for m in results.metrics],
        conditions=conditions(results),
        cost_note=cost_note(results),
        notes=notes(results),
        plane=style.to_svg(figure) if figure is not None else None,
        plane_words=describe_plane(results),
        robust=column_name(metric) if metric is not None else None,
        half_width=_half_width(results),
        percentages=percentages,
        train_seconds=train_seconds,
        shell=shlex.join,
    )


def _half_width(results: Results) -> float | None:
    """Half of the widest interval of the rows' mean accuracies, in percent; None without any."""
    n = results.num_samples
    spreads = [s for row in results.rows for name, s in row.spreads.items() if name != SUM]
    if n is None or not spreads:
        return None
    intervals = [wilson_interval(round(spread.mean / 100 * n), n) for spread in spreads]
    return 100 * max((high - low) / 2 for low, high in intervals)
