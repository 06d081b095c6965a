"""``arat-fast compare``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from arat_fast.command_line import UsageError, parse
from arat_fast.compare.methods import METHODS, choose_methods
from arat_fast.compare.plan import (
    RECORD,
    Budget,
    Plan,
    make_plan,
    merge_with_saved,
    plan_from_record,
    read_record,
)
from arat_fast.compare.plane import plane
from arat_fast.compare.results import Results, evaluate_record
from arat_fast.compare.runner import GridRunner
from arat_fast.compare.tables import comparison_page, to_latex, to_markdown
from arat_fast.config import Config
from arat_fast.files import write_atomic, write_text, written_here
from arat_fast.stop import InterruptedRun


@dataclass(frozen=True)
class CompareOptions:
    """Train and evaluate several methods over several seeds, and set them side by side."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    objectives: tuple[str, ...] = tuple(METHODS)
    """Rows of the table: objectives by name, arat+swa, names of variants."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every method."""
    variant: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """"NAME: overrides": another row, for example "gamma 10: --objective.gamma 10"; one that has
    the name of a method replaces it. May be given several times."""
    ablation: bool = False
    """Add the paper's ablation: naive invariance, and stop-gradient, predictor and split BatchNorm
    each added to it alone, beside ARAT."""
    budget: Budget = "epochs"
    """epochs: every method trains for the recipe's. work: every method that attacks makes as many
    forward passes as the recipe's own objective in its epochs."""
    out: Path | None = None
    """Folder of the comparison, one run's folder for each cell; default runs/compare-RECIPE."""
    jobs: int | None = None
    """Runs at a time; default one on a CPU, one on each GPU."""


@dataclass(frozen=True)
class FromOptions:
    """Write the tables of a saved comparison again, or run it again in another folder."""

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """Folder of a comparison, or its comparison.json alone."""
    out: Path | None = None
    """Run the same comparison again in this folder."""
    jobs: int | None = None
    """Runs at a time; default one on a CPU, one on each GPU."""


def compare_command(arguments: Sequence[str], base: Config | None) -> int:
    """Run ``arat-fast compare``.

    Args:
        arguments: what was typed after the recipe, or all of it where there is none.
        base: configuration of the recipe; None for a saved comparison.

    Returns:
        The exit code: 0; 1 where a run failed; 130 or 75 where a signal stopped it.

    Raises:
        ValueError: an option does not fit, or the folder holds another comparison.
        FileNotFoundError: there is no saved comparison.
    """
    if base is None:
        options = parse(FromOptions, arguments, "arat-fast compare")
        record, source = read_record(options.source), options.source
        if options.out is not None:
            return _run(plan_from_record(record), options.out, options.jobs)
        with written_here(source):
            folder = source.is_dir()
            results = write_comparison(source, record) if folder else evaluate_record(record)
        print(to_markdown(results), end="")
        return 0
    if any(argument.partition("=")[0] == "--seed" for argument in arguments):
        raise UsageError("--seeds is expected, one or more, got --seed")
    program = f"arat-fast compare {base.recipe}"
    chosen = parse(CompareOptions, arguments, program, CompareOptions(base))
    methods = choose_methods(chosen.objectives, chosen.variant, chosen.ablation)
    command = shlex.join(["arat-fast", "compare", base.recipe, *arguments])
    plan = make_plan(chosen.config, methods, chosen.seeds, chosen.budget, command)
    return _run(plan, chosen.out or Path("runs") / f"compare-{base.recipe}", chosen.jobs)


def write_comparison(out: Path, record: dict[str, Any]) -> Results:
    """Write tables, plane and page of a comparison into its folder, from its record alone."""
    results = evaluate_record(record)
    write_text(out / "comparison.md", to_markdown(results))
    write_text(out / "comparison.tex", to_latex(results))
    plot = plane(results)
    if plot is not None:
        write_atomic(out / "comparison.png", plot.write_png)
    write_text(out / "comparison.html", comparison_page(results))
    return results


def _run(plan: Plan, out: Path, jobs: int | None) -> int:
    try:
        record = GridRunner(merge_with_saved(plan, out / RECORD), out, jobs, _say).run()
    except InterruptedRun as stopped:
        print(f"arat-fast: {stopped}", file=sys.stderr)
        return stopped.exit_code
    print(to_markdown(write_comparison(out, record)), end="")
    others = sorted(path.name for path in out.glob("comparison.[!h]*"))
    _say(f"comparison: {out / 'comparison.html'}, {', '.join(others)}")
    return 1 if any(cell["status"] == "failed" for cell in record["cells"]) else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
