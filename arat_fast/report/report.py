"""The report of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from arat_fast import __version__
from arat_fast.files import write_text
from arat_fast.report.analysis import (
    ATTACKER_PAGE,
    Analyses,
    attacker_opening,
    attacker_sections,
    draw_analyses,
    read_analyses,
    training_html,
    trust_html,
)
from arat_fast.report.analysis_plots import Drawing
from arat_fast.report.comparison import comparison_html
from arat_fast.report.curves import run_plots
from arat_fast.report.examples import examples_html
from arat_fast.report.headline import headline_html, meaning_html, title_of
from arat_fast.report.html import Html, tag
from arat_fast.report.page import Section, page
from arat_fast.report.run import Run, count, read_run
from arat_fast.report.settings import (
    again_html,
    configuration_html,
    environment_html,
    evaluated_html,
    measurements_html,
    recipe_defaults,
)


def write_report(run: Path, compare: Sequence[Path] = ()) -> Path:
    """Write ``report.html`` into a run's folder: one file that needs nothing else.

    Where the run was analysed, ``attacker.html``, what an attacker sees, is written beside it. A
    run that was interrupted is reported as far as it got. The dataset is not needed; the weights
    are read only where ``arat-fast eval`` left a record in the folder.

    Args:
        run: folder of the run.
        compare: folders of other runs; the report then begins with what sets this run apart.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError: a folder is not there or is not a run's.
        ValueError: the configuration of a run is unreadable.
        OSError: the report cannot be written; an older one stays.
    """
    this = read_run(run)
    others = [read_run(path) for path in compare]
    analyses = read_analyses(run / "analysis", count(this.summary.get("steps")))
    drawings = draw_analyses(analyses, this.analyses)
    path = run / "report.html"
    sections = _sections(this, others, analyses, drawings)
    write_text(path, page(title_of(this), headline_html(this), sections, _closing()))
    attacker = attacker_sections(this, analyses, drawings)
    if attacker:
        title = f"What an attacker sees: {title_of(this)}"
        opening = attacker_opening(this, analyses)
        write_text(run / ATTACKER_PAGE, page(title, opening, attacker, _closing()))
    else:
        # One from before would go on showing what this report leaves out.
        (run / ATTACKER_PAGE).unlink(missing_ok=True)
    return path


def _sections(
    run: Run, others: Sequence[Run], analyses: Analyses, drawings: Mapping[str, Drawing]
) -> list[Section]:
    plots = run_plots(run)
    curves = tag("div", [plot.to_html() for plot in plots], class_="panels") if plots else None
    candidates: list[tuple[str, str, Html | None]] = [
        ("comparison", "Beside other runs", comparison_html(run, others) if others else None),
        ("meaning", "What this means", meaning_html(run)),
        ("examples", "Examples", examples_html(run)),
        ("trust", "Can the robustness be trusted?", trust_html(analyses, drawings)),
        ("training", "Training", curves),
        (
            "analyses",
            "Gradient conflict and mixture distribution",
            training_html(run, analyses, drawings),
        ),
        ("measurements", "Measurements in full", measurements_html(run)),
        ("evaluated", "Evaluated afterwards", evaluated_html(run)),
        ("configuration", "Configuration", configuration_html(run, recipe_defaults(run))),
        ("environment", "Environment", environment_html(run)),
        ("again", "Run it again", again_html(run)),
    ]
    return [Section(anchor, title, body) for anchor, title, body in candidates if body]


def _closing() -> str:
    return f"Report written by arat_fast {__version__}."
