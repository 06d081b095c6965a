"""Every method and the ablation on the digits, three seeds, standard AutoAttack, two cores.

Runs ``arat-fast compare`` in ``--out``, goes on where it was stopped, and copies the results to
``benchmarks/results/compare-digits-DATE.*``.

The budget is 40 minutes on two cores for 36 runs, one thread and one core each. An epoch of ARAT
takes 4.0 s there with both cores at work, standard AutoAttack on 180 images of which 163 withstand
it 76 s, of 200 by the same rate 83 s, and a process 5 s to start and to write its report. EPOCHS
and SAMPLES make of that 30 × 48 s + 33 × 83 s + 36 × 5 s, 36 minutes on two cores:

- Every method that attacks makes the forward passes that ARAT makes in EPOCHS epochs (--budget
  work), the natural training that ARREST starts from counted in.
- ARAT and ARAT + SWA are one training, of which the former evaluates the last weights and the
  latter the average; two runs would give the same weights bit for bit.
- All methods deploy the weights of the last step, as the paper does, so that averaging is seen
  where it is named. SWA averages every SWA_EVERY steps over the last quarter: about the 20 weights
  that the published 500 steps give in 100 epochs of CIFAR.
- All are evaluated on the first SAMPLES of the 360 test images, which are the same for all:
  AutoAttack takes over two minutes of a core for all of them where nine tenths survive.
- No evaluation during training.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from datetime import date
from pathlib import Path

from arat_fast.cli import main as arat_fast
from benchmarks.records import RESULTS, unused

EPOCHS = 12
SWA_EVERY = 3
SAMPLES = 200


METHODS = ["natural", "at", "trades", "mart", "lbgat", "arrest", "arat", "arat+swa"]
ARGUMENTS = [
    *("compare", "digits", "--objectives", *METHODS, "--seeds", "0", "1", "2", "--ablation"),
    *(
        "--variant",
        f"arat+swa: --objective.name arat --average.kind swa --average.every {SWA_EVERY}",
    ),
    *("--budget", "work", "--train.epochs", str(EPOCHS), "--train.eval-every", "0"),
    *("--average.kind", "none", "--eval.max-samples", str(SAMPLES), "--jobs", "2"),
]


def main() -> int:
    """Compare, and copy the results over none that are there; further options go to ``compare``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs") / "compare-digits")
    options, overrides = parser.parse_known_args()
    code = arat_fast([*ARGUMENTS, "--out", str(options.out), *overrides])
    if code == 0:
        record = unused(RESULTS, f"compare-digits-{date.today()}")
        for ending in (".json", ".md", ".tex", ".png"):
            shutil.copyfile(options.out / f"comparison{ending}", record.with_suffix(ending))
        print("results:", record, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
