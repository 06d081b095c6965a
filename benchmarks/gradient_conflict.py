"""Gradient conflict and mixture distribution on the digits: with and without stop-gradient, shared
and split BatchNorm, several seeds.

Trains what is missing under ``--runs`` with the digits recipe, analysed after every epoch, then
writes the record, the plots and a table under ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NO_STOP = ["--objective.no-stop-gradient"]
NAIVE = ["--objective.no-predictor", "--model.norm", "shared"]
METHODS: dict[str, list[str]] = {
    "naive": [*NAIVE, *NO_STOP],
    "naive-stop-gradient": NAIVE,
    "arat-no-stop-gradient": NO_STOP,
    "arat-shared": ["--model.norm", "shared"],
    "arat": [],
}
COMMON = ["--analyze.every", "1", "--eval.no-autoattack"]


def train(method: str, seed: int, out: Path) -> None:
    """One run, if it is not there yet."""
    summary = out / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "finished":
        command = [sys.executable, "-m", "arat_fast", "train", "digits"]
        command += [*METHODS[method], *COMMON, "--seed", str(seed)]
        subprocess.run([*command, "--out", str(out), "--resume"], check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gradient-conflict")
    parser.add_argument("--num-seeds", type=int, default=3, help="seeds 0, 1, …; at least 1")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    for seed in range(options.num_seeds):
        for method in options.methods:
            train(method, seed, options.runs / f"{method}-seed{seed}")


if __name__ == "__main__":
    main()
