"""A comparison as a page of its own, as Markdown and as LaTeX."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from arat_fast import __version__
from arat_fast.compare.plane import plane
from arat_fast.compare.results import (
    SUM,
    Results,
    Row,
    column_name,
    conditions,
    cost_note,
    notes,
    percentages,
    train_seconds,
)
from arat_fast.report.templates import render
from arat_fast.statistics import wilson_interval

PAIRED = (
    "Differences in points, means over the seeds that both rows have, with the paired 95 % "
    "interval over the images: what other test images would change, not what other seeds would."
)

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # After the end of a row, these two would belong to it.
    "[": "{[}",
    "*": "{*}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def comparison_page(results: Results) -> str:
    """The whole HTML document; it needs nothing else, and links to the reports of its runs."""
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
        plane=plane(results),
        half_width=_half_width(results),
        differences=_differences(results),
        paired=PAIRED,
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


def to_markdown(results: Results) -> str:
    """The tables with what they need to be read, as Markdown."""
    parts = [conditions(results), cost_note(results)]
    parts += [_markdown_table(name, rows, results) for name, rows in results.groups.items()]
    if table := _differences(results):
        rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
        rows.insert(1, ["---"] * len(table[0]))
        parts += [PAIRED, "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    parts += [f"Note: {note}" for note in notes(results)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(name: str, rows: Sequence[tuple[str, Row]], results: Results) -> str:
    columns = [column_name(metric) for metric in results.metrics]
    lines = [
        f"| {' | '.join([name, *columns, 'n', 'Cost'])} |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for title, row in rows:
        cells = [str(row.spreads.get(metric, "–")) for metric in results.metrics]
        title = title.replace("|", "\\|")
        lines.append(f"| {' | '.join([title, *cells, str(row.num_seeds), row.method.cost])} |")
    return "\n".join(lines)


def _differences(results: Results) -> list[list[str]]:
    """Heading and rows of the differences; [] where no record says which images were right."""
    metrics = [metric for metric in results.metrics if metric != SUM]
    rows = [
        [title, *(str(pairs.get(metric, "–")) for metric in metrics)]
        for title, pairs in results.differences
    ]
    heading = [f"{results.reference.method.title} less …", *map(column_name, metrics)]
    return [heading, *rows] if rows else []


def to_latex(results: Results) -> str:
    r"""The table as a ``tabular`` for ``\input``; needs the package booktabs."""
    groups = results.groups.values()
    # As narrow as a paper's column of text: the sum is explained and the cost listed above.
    comments = [
        "written by arat-fast compare; needs \\usepackage{booktabs}",
        conditions(results),
        *([f"Sum: {column_name(SUM)}."] if SUM in results.metrics else []),
        cost_note(results),
        *(f"Cost of {title}: {row.method.cost}" for group in groups for title, row in group),
        *(f"Note: {note}" for note in notes(results)),
    ]
    ascii_signs = str.maketrans({"±": "+-", "∞": "inf", "×": "x", "\n": " "})
    lines = [f"% {comment}".translate(ascii_signs) for comment in comments]
    columns = ["Sum" if metric == SUM else column_name(metric) for metric in results.metrics]
    lines += [
        f"\\begin{{tabular}}{{l{'r' * (len(columns) + 1)}}}",
        "\\toprule",
        _latex_row(["", *map(latex_text, columns), "$n$"]),
    ]
    for group in groups:
        lines.append("\\midrule")
        for title, row in group:
            cells = [str(row.spreads.get(metric, "--")) for metric in results.metrics]
            cells = [cell.replace("±", "$\\pm$") for cell in cells]
            lines.append(_latex_row([latex_text(title), *cells, str(row.num_seeds)]))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def latex_text(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)
