"""The table of a comparison as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from arat_fast.compare.results import (
    SUM,
    Results,
    Row,
    column_name,
    conditions,
    cost_note,
    notes,
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


def to_markdown(results: Results) -> str:
    """The tables with what they need to be read, as Markdown."""
    parts = [conditions(results), cost_note(results)]
    parts += [_markdown_table(name, rows, results) for name, rows in results.groups.items()]
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
