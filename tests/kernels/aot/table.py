"""``python tests/kernels/aot/table.py``: the table of all kernels, compiled for GPUs that need not
be there.

A cell under a GPU is registers per thread / bytes of shared memory per block / occupancy, as
registers, shared memory and warps limit it. As few launches as cover all are listed: a row does at
least what the launches it stands for do. float64, which is there for gradcheck, has one block shape
of each kernel.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kernels.aot.compiled import TARGETS, compiled  # noqa: E402
from kernels.aot.launches import Launch  # noqa: E402
from kernels.aot.operations import OPERATIONS, launches  # noqa: E402


def row(launch: Launch) -> str:
    reports = [compiled(launch, target) for target in TARGETS.values()]
    cells = [f"{r.registers} / {r.shared} / {r.occupancy:.0%}" for r in reports]
    return f"| `{launch.label}` | {' | '.join(cells)} |"


def main() -> None:
    for operation in OPERATIONS:
        print(f"\n## {operation}\n\n| launch | {' | '.join(TARGETS)} |")
        print("|---" * (len(TARGETS) + 1) + "|")
        for launch in sorted(launches(operation, whole=True), key=lambda found: found.label):
            print(row(launch), flush=True)


if __name__ == "__main__":
    main()
