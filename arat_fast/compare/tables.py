"""The table of a comparison as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arat_fast.compare.results import SUM, Results, Row, Spread

ALL_PARTS = "all (ARAT)"
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # After the end of a row, these two would belong to it.
    "[": "{[}",
    "*": "{*}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def column_name(metric: str) -> str:
    """Heading of a metric's column."""
    names = {"clean": "Clean", "autoattack": "AutoAttack", SUM: "Clean + AutoAttack"}
    return names.get(metric, metric.upper().replace("PGD", "PGD-"))


def method_rows(results: Results) -> list[Row]:
    """Rows of the methods themselves."""
    return [row for row in results.rows if not row.planned.method.ablation]


def ablation_rows(results: Results) -> list[tuple[str, Row]]:
    """Rows of the ablation with their titles, ARAT last; empty where none was run."""
    rows = [(row.title, row) for row in results.rows if row.planned.method.ablation]
    whole = [(ALL_PARTS, row) for row in results.rows if row.planned.method.label == "arat"]
    return [*rows, *whole] if rows else []


def conditions(results: Results) -> str:
    """What the numbers are, and with which settings they came about."""
    config = results.plan.config
    n = results.num_samples()
    first = "the first " if config.eval.max_samples else ""
    images = f"{first}{n:,} test images" if n else "the test images"
    number = len(results.plan.seeds)
    seeds = ", ".join(map(str, results.plan.seeds))
    spread = ", mean ± standard deviation" if number > 1 else ""
    return (
        f"Accuracy in percent on {images} of {config.data.name}, {config.model.name}, "
        f"{config.attack.norm.replace('inf', '∞')} radius {config.attack.eps:.4g}{spread} over "
        f"seed{'s' if number > 1 else ''} {seeds}. All methods run with the recipe's optimiser, "
        "schedule and augmentation, whatever their papers used, unless a note names others."
    )


def cost_note(results: Results) -> str:
    """What the columns of the cost mean."""
    equal = (
        "all that attack have about the same"
        if results.plan.budget == "work"
        else "the epochs are the same"
    )
    return (
        "Cost: epochs × forward passes of the network per image, counted from the convolutions and "
        f"matrix products of one step, and those of natural training before it; {equal}, unless a "
        "method sets its own."
    )


def to_markdown(results: Results) -> str:
    """The tables with what they need to be read, as Markdown."""
    parts = [conditions(results), cost_note(results)]
    methods = method_rows(results)
    if methods:
        parts.append(_markdown_table("Method", [(row.title, row) for row in methods], results))
    ablation = ablation_rows(results)
    if ablation:
        parts.append(_markdown_table("Ablation", ablation, results))
    parts += [f"Note: {note}" for note in notes(results)]
    return "\n\n".join(parts) + "\n"


def to_latex(results: Results) -> str:
    r"""The table as a ``tabular`` for ``\input``; needs the package booktabs."""
    # As narrow as a paper's column of text: the sum is explained and the cost listed above.
    columns = [
        "Sum" if metric == SUM else latex_text(column_name(metric)) for metric in results.metrics
    ]
    heading = " & ".join(["", *columns, "$n$"])
    groups = [[(row.title, row) for row in method_rows(results)], ablation_rows(results)]
    lines = [
        "% written by arat-fast compare; needs \\usepackage{booktabs}",
        f"% {conditions(results).replace('±', '+-').replace('∞', 'inf')}",
        *([f"% Sum: {column_name(SUM)}."] if SUM in results.metrics else []),
        f"% {cost_note(results).replace('×', 'x')}",
        *(
            f"% Cost of {title}: {row.planned.cost.replace('×', 'x')}"
            for group in groups
            for title, row in group
        ),
        *(f"% Note: {' '.join(note.split())}" for note in notes(results)),
        f"\\begin{{tabular}}{{l{'r' * (len(columns) + 1)}}}",
        "\\toprule",
        f"{heading} \\\\",
    ]
    for group in groups:
        if group:
            lines.append("\\midrule")
        for title, row in group:
            cells = [_latex_spread(row.spreads.get(metric)) for metric in results.metrics]
            line = " & ".join([latex_text(title), *cells, str(row.num_seeds)])
            lines.append(f"{line} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def latex_text(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def notes(results: Results) -> list[str]:
    """What a reader has to know beside the numbers: settings of single methods, how far ARREST is
    the published one, failed, missing and unequal runs."""
    cells = results.record["cells"]
    found = _notes_on_methods(results)
    for cell in cells:
        if cell["status"] == "failed":
            found.append(f"{cell['run']} failed: {cell['reason']}.")
    missing = sum(cell["status"] == "pending" for cell in cells)
    if missing:
        found.append(f"{missing} of {len(cells)} runs are not finished.")
    finished = [cell for cell in cells if cell["status"] == "finished"]
    for name in ("device", "precision", "commit"):
        values = {str(cell[name]) for cell in finished}
        if len(values) > 1:
            found.append(f"the runs differ in {name}: {'; '.join(sorted(values))}.")
    # What an older record does not name is no difference.
    named = [set(cell["versions"]) for cell in finished]
    shared = set.intersection(*named) if named else set()
    if len({str([cell["versions"][name] for name in sorted(shared)]) for cell in finished}) > 1:
        found.append("the runs differ in the versions of what computed them.")
    return found


def _notes_on_methods(results: Results) -> list[str]:
    found = []
    for row in results.rows:
        own = [c for c in results.record["cells"] if c["label"] == row.planned.method.label]
        config = next((cell["config"] for cell in own if "config" in cell), None)
        if config is None:
            continue
        settings = _own_settings(config, results.record["config"], row.planned.method.ablation)
        if settings:
            found.append(f"{row.title} has settings of its own: {', '.join(settings)}.")
        objective = config["objective"]
        if objective["name"] == "arrest":
            found.append(
                f"{row.title} follows the paper's abstract and later work; the paper's equations "
                f"were not at hand. Its weights, distillation {objective['distillation']:g} and "
                f"replay {objective['replay']:g}, are set here and not tuned."
            )
    return found


def _own_settings(
    config: Mapping[str, Any], shared: Mapping[str, Any], ablation: bool
) -> list[str]:
    """What a method sets beside what its title and the column of the cost say."""
    said = {("objective", "name"), ("train", "epochs")}
    if ablation:
        said |= {("objective", "stop_gradient"), ("objective", "predictor"), ("model", "norm")}
    return [
        f"{section}.{name}={value}"
        for section, values in config.items()
        if isinstance(values, Mapping)
        for name, value in values.items()
        if (section, name) not in said and value != shared.get(section, {}).get(name, value)
    ]


def _markdown_table(name: str, rows: Sequence[tuple[str, Row]], results: Results) -> str:
    columns = [column_name(metric) for metric in results.metrics]
    lines = [
        f"| {' | '.join([name, *columns, 'n', 'Cost'])} |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for title, row in rows:
        cells = [_spread(row.spreads.get(metric)) for metric in results.metrics]
        title = title.replace("|", "\\|")
        lines.append(f"| {' | '.join([title, *cells, str(row.num_seeds), row.planned.cost])} |")
    return "\n".join(lines)


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:.2f}" + ("" if spread.std is None else f" ± {spread.std:.2f}")


def _latex_spread(spread: Spread | None) -> str:
    text = _spread(spread)
    return "--" if text == "–" else text.replace("±", "$\\pm$")
