"""The record, plots and table of docs/results.md, from the folder of a comparison whose runs were
analysed along training (``arat-fast compare … --analyze.every 1``)."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from arat_fast.compare.plan import read_record
from arat_fast.files import write_atomic, write_json
from arat_fast.report.analysis_plots import conflict_between, mixture_by_layer, mixture_over_time
from arat_fast.report.run import Run, read_run
from arat_fast.report.words import metric_name
from benchmarks.harness import RESULTS, unused
from benchmarks.table import grid


def runs_of(comparison: Path) -> dict[str, list[Run]]:
    """The runs of a comparison by the title of their method.

    Raises:
        ValueError: a run was not analysed, or its loss has no invariance part.
    """
    record = read_record(comparison)
    titles = {method["label"]: method["title"] for method in record["methods"]}
    groups: dict[str, list[Run]] = {}
    for cell in record["cells"]:
        run = read_run(comparison / cell["run"])
        if not run.training_analyses or run.training_analyses[-1].gradient_conflict is None:
            raise ValueError(f"{run.path} has no gradient conflict: train with --analyze.every 1")
        groups.setdefault(titles[cell["label"]], []).append(run)
    return groups


def table(groups: Mapping[str, Sequence[Run]]) -> str:
    """The methods beside each other, as Markdown: mean and standard deviation over the seeds."""

    def conflict(key: str) -> Callable[[Run], float]:
        # The first analysis is of the untrained network.
        return lambda run: statistics.fmean(
            line.gradient_conflict["pairs"]["classification"][key]
            for line in run.training_analyses[1:]
            if line.gradient_conflict is not None
        )

    def distance(key: str) -> Callable[[Run], float]:
        return lambda run: (run.training_analyses[-1].mixture or {})["mean"][key]

    def accuracy(name: str) -> Callable[[Run], float]:
        return lambda run: run.summary.accuracy[name].value

    metrics = next(iter(groups.values()))[0].summary.accuracy
    columns: dict[str, tuple[Callable[[Run], float], float, int]] = {
        "opposite signs, %": (conflict("share"), 100, 1),
        "cosine": (conflict("cosine"), 1, 3),
        "before BatchNorm": (distance("w2_relative"), 1, 3),
        "after BatchNorm": (distance("output_w2"), 1, 3),
        **{f"{metric_name(name)}, %": (accuracy(name), 100, 1) for name in metrics},
    }

    def cell(runs: Sequence[Run], read: Callable[[Run], float], scale: float, digits: int) -> str:
        values = [scale * read(run) for run in runs]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{spread}"

    rows = [
        [method, *(cell(runs, *column) for column in columns.values())]
        for method, runs in groups.items()
    ]
    return "\n".join(grid(["", *columns], rows))


def main(comparison: Path) -> None:
    """Write the record and the plots under ``benchmarks/results/``, and print the table."""
    groups = runs_of(comparison)
    lines = {method: [run.training_analyses for run in runs] for method, runs in groups.items()}
    last: dict[str, list[Mapping[str, Any]]] = {
        method: [each[-1].mixture for each in analyses if each[-1].mixture is not None]
        for method, analyses in lines.items()
    }
    path = unused(RESULTS, f"gradient-conflict-{date.today()}")
    analyses = {m: [[asdict(line) for line in run] for run in runs] for m, runs in lines.items()}
    write_json(path, {"comparison": read_record(comparison), "analyses": analyses})
    plots = {
        "": conflict_between(lines),
        "-mixture": mixture_over_time(lines),
        "-mixture-layers": mixture_by_layer(last),
    }
    for suffix, plot in plots.items():
        if plot is not None:
            write_atomic(path.with_name(f"{path.stem}{suffix}.png"), plot.write_png)
    print(table(groups))
    print(f"\nrecord: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path, help="folder of the comparison")
    main(parser.parse_args().comparison)
