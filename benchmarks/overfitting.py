"""The record and the figure of docs/fast-at.md, from the folders of runs that were watched for
catastrophic overfitting (``arat-fast train … --watch.act …``), and the network of one of them."""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from arat_fast.files import parse_json, read_json, write_atomic, write_json
from arat_fast.report import style
from arat_fast.report.curves import draw_series
from arat_fast.report.run import Run, Series, read_run
from benchmarks.harness import RESULTS, ROOT, unused

SUMMARY = ("accuracy", "evaluation", "wall_seconds", "device", "versions", "commit", "warnings")


def network(num_classes: int) -> nn.Module:
    """For 28×28 images of one channel: two convolutions with pooling, no BatchNorm."""
    features: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32)):
        features += [nn.Conv2d(before, after, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Linear(32 * 7 * 7, 256), nn.ReLU(), nn.Linear(256, num_classes)]
    return nn.Sequential(*features, nn.Flatten(), *head)


def figure_of(runs: list[Run]) -> Figure:
    """The runs beside each other: accuracy under the training's own attack, and under PGD."""
    with style.plot_style():
        figure = Figure(figsize=(3.9 * len(runs), 3.1), layout="constrained")
        for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
            looks = [(look.epoch, look.pgd) for look in run.looks if look.pgd is not None]
            own = run.metrics["accuracy_adv"]
            draw_series(axes, own, "own attack, training", style.ADVERSARIAL)
            pgd = Series(*np.array(looks).T)
            draw_series(axes, pgd, "PGD-10, watched", style.PURPLE, style.DASHES[1], ".")
            for look in run.looks:
                if look.fell or look.fell_at is not None:
                    axes.axvline(look.epoch, color=style.INK, linestyle=(0, (1, 2)), linewidth=1.2)
            style.as_percent(axes)
            style.epoch_axis(axes)
            style.legend_above(axes)
            axes.set_xlabel(f"epoch, --watch.act {run.config.watch.act}")
    return figure


def main(folders: list[Path]) -> None:
    """Write the record under ``benchmarks/results/``, and ``docs/fast-at.png``."""
    path = unused(RESULTS, f"overfitting-{date.today()}")
    records = []
    for folder in folders:
        summary = read_json(folder / "summary.json")
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records.append(
            {
                "config": read_json(folder / "config.json")["config"],
                **{name: summary[name] for name in SUMMARY if name in summary},
                "metrics": [parse_json(line) for line in lines],
            }
        )
    write_json(path, {"runs": records})
    figure = figure_of([read_run(folder) for folder in folders])
    write_atomic(ROOT / "docs" / "fast-at.png", lambda file: figure.savefig(file, dpi=110))
    print(f"record: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    main(parser.parse_args().runs)
