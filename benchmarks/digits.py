"""ARAT, plain adversarial training and ways of running ARAT's step on the digits, several seeds,
standard AutoAttack.

Trains what is missing under ``--runs``, then writes the record under ``benchmarks/results/`` and
prints the README's table. Both methods keep the published optimiser (SGD, 0.1, weight decay 5e-4);
schedule, averaging and augmentation were chosen on 287 validation images taken from the training
images. The README says how, and what was seen of the 360 held-out images before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, ROOT, unused
from benchmarks.table import grid

# A step of ARAT costs 26 forward passes of the batch, one of adversarial training 23: 26 epochs of
# the one are as much work as 23 of the other.
METHODS: dict[str, list[str]] = {
    "ARAT": [],
    "AT": ["--objective.name", "at", "--train.epochs", "26"],
    "ARAT-bf16": ["--step.precision", "bf16"],
    "ARAT-running": ["--attack.bn", "running", "--step.no-fold"],
    "ARAT-bf16-folded": ["--step.precision", "bf16", "--attack.bn", "running"],
}
METRICS = {"clean": "clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}


def train(method: str, seed: int, out: Path) -> dict[str, Any]:
    """Summary of one run, trained if it is not there yet."""
    summary = out / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "finished":
        command = [sys.executable, "-m", "arat_fast", "train", "digits", *METHODS[method]]
        command += ["--seed", str(seed), "--out", str(out), "--resume"]
        subprocess.run(command, check=True, cwd=ROOT)
    result: dict[str, Any] = json.loads(summary.read_text())
    # The folder is this machine's; METHODS holds what matters of the command.
    del result["command"]
    return {"options": METHODS[method], **result}


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Mean, standard deviation and range over the seeds, as Markdown."""
    rows = []
    for method, summaries in runs.items():
        columns = [
            [100 * summary["accuracy"][metric]["value"] for summary in summaries]
            for metric in METRICS
        ]
        columns.append([clean + auto for clean, auto in zip(columns[0], columns[-1], strict=True)])
        cells = [
            f"{statistics.mean(c):.2f} ± {statistics.stdev(c):.2f} ({min(c):.1f} to {max(c):.1f})"
            for c in columns
        ]
        rows.append([method, *cells])
    return "\n".join(grid(["", *METRICS.values(), "sum of clean and AutoAttack"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "digits-seeds")
    parser.add_argument("--num-seeds", type=int, default=5, help="seeds 0, 1, …; at least 2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["ARAT", "AT"])
    options = parser.parse_args()
    runs = {
        method: [
            train(method, seed, options.runs / f"{method.lower()}-seed{seed}")
            for seed in range(options.num_seeds)
        ]
        for method in options.methods
    }
    path = unused(RESULTS, f"digits-{date.today()}")
    path.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(runs))
    print(f"\nrecord: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
