"""Gradient conflict and mixture distribution on the digits: with and without stop-gradient, shared
and split BatchNorm, several seeds.

Trains what is missing under ``--runs`` with the digits recipe, analysed before the first epoch and
after each, then writes the record and the plots under ``benchmarks/results/`` and prints the table
of ``docs/analysis.md``.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from arat_fast.command_line import overrides_of
from arat_fast.files import write_atomic, write_json
from arat_fast.report.analysis_plots import conflict_between, mixture_by_layer, mixture_over_time
from arat_fast.report.run import Run, TrainingAnalysis, read_run
from benchmarks.records import RESULTS, ROOT, unused
from benchmarks.table import grid

NO_STOP = ["--objective.no-stop-gradient"]
NAIVE = ["--objective.no-predictor", "--model.norm", "shared"]
METHODS: dict[str, list[str]] = {
    "naive": [*NAIVE, *NO_STOP],
    "naive + stop-gradient": NAIVE,
    "ARAT without stop-gradient": NO_STOP,
    "ARAT, shared BatchNorm": ["--model.norm", "shared"],
    "ARAT": [],
}
STOP_GRADIENT = ("naive", "naive + stop-gradient", "ARAT without stop-gradient", "ARAT")
BATCH_NORM = ("ARAT, shared BatchNorm", "ARAT")
COMMON = ["--analyze.every", "1", "--eval.no-autoattack"]


def train(method: str, seed: int, out: Path) -> Run:
    """One run, trained as far as it is not there yet; a folder of another configuration is refused.

    Raises:
        SystemExit: the run was refused or failed, or was not analysed after every epoch.
    """
    command = [sys.executable, "-m", "arat_fast", "train", "digits"]
    command += [*METHODS[method], *COMMON, "--seed", str(seed), "--out", str(out), "--resume"]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        raise SystemExit(code)
    run = read_run(out)
    expected, found = run.config.train.epochs + 1, len(run.training_analyses)
    if found != expected:
        raise SystemExit(f"{out}: {expected} analyses are expected, got {found}: train it again")
    return run


def folder_name(method: str, seed: int) -> str:
    """Name of a run's folder."""
    return f"{re.sub(r'[ +,]+', '-', method.lower())}-seed{seed}"


def record(run: Run) -> dict[str, Any]:
    """What a run found, epoch by epoch, without its layers but for those of the last epoch."""
    epochs = []
    for line in run.training_analyses:
        conflict, mixture = found(line)
        epochs.append(
            {
                "epoch": line.epoch,
                "pairs": conflict["pairs"],
                "unrelated": conflict["unrelated"],
                "norms": conflict["norms"],
                "mixture": mixture["mean"],
            }
        )
    conflict, mixture = found(run.training_analyses[-1])
    keys = "versions", "device", "precision", "commit", "wall_seconds"
    return {
        "options": overrides_of(run.config),
        "seed": run.config.seed,
        "accuracy": {
            name: {
                "value": a.value,
                "correct": a.correct,
                "num_samples": a.num_samples,
                **a.details,
            }
            for name, a in run.summary.accuracy.items()
        },
        **{key: getattr(run.summary, key) for key in keys},
        "epochs": epochs,
        "layers": {"gradient_conflict": conflict["layers"], "mixture": mixture["layers"]},
    }


def found(line: TrainingAnalysis) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Gradient conflict and mixture distribution of a run that has both."""
    assert line.gradient_conflict is not None and line.mixture is not None
    return line.gradient_conflict, line.mixture


def over_training(run: Run, key: str) -> float:
    """Mean of the total "share" or "cosine" after the first analysis, of the untrained network."""
    lines = run.training_analyses[1:]
    return statistics.fmean(found(line)[0]["pairs"]["classification"][key] for line in lines)


def cell(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """Mean and standard deviation over the seeds."""
    values = [scale * value for value in values]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def table(groups: Mapping[str, Sequence[Run]]) -> str:
    """The methods beside each other, as Markdown."""
    columns: dict[str, Callable[[Run], float]] = {
        "opposite signs, %": lambda r: over_training(r, "share"),
        "cosine": lambda r: over_training(r, "cosine"),
        "before BatchNorm": lambda r: found(r.training_analyses[-1])[1]["mean"]["w2_relative"],
        "after BatchNorm": lambda r: found(r.training_analyses[-1])[1]["mean"]["output_w2"],
        "clean, %": lambda r: r.summary.accuracy["clean"].value,
        "PGD-20, %": lambda r: r.summary.accuracy["pgd20"].value,
    }
    rows = []
    for method, runs in groups.items():
        cells = []
        for title, read in columns.items():
            percent = title.endswith("%")
            cells.append(
                cell([read(run) for run in runs], 100 if percent else 1, 1 if percent else 3)
            )
        rows.append([method, *cells])
    return "\n".join(grid(["", *columns], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gradient-conflict")
    parser.add_argument("--num-seeds", type=int, default=3, help="seeds 0, 1, …; at least 1")
    options = parser.parse_args()
    groups = {
        method: [
            train(method, seed, options.runs / folder_name(method, seed))
            for seed in range(options.num_seeds)
        ]
        for method in METHODS
    }
    path = unused(RESULTS, f"gradient-conflict-{date.today()}")
    write_json(
        path,
        {method: [record(run) for run in runs] for method, runs in groups.items()},
    )
    lines = {method: [run.training_analyses for run in runs] for method, runs in groups.items()}
    last = {
        method: [found(run.training_analyses[-1])[1] for run in groups[method]]
        for method in BATCH_NORM
    }
    plots = {
        "": conflict_between({method: lines[method] for method in STOP_GRADIENT}),
        "-mixture": mixture_over_time({method: lines[method] for method in BATCH_NORM}),
        "-mixture-layers": mixture_by_layer(last),
    }
    for suffix, plot in plots.items():
        assert plot is not None
        write_atomic(path.with_name(f"{path.stem}{suffix}.png"), plot.write_png)
    print(table(groups))
    print(f"\nrecord: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
