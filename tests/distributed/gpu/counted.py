"""``arat-fast`` with deterministic algorithms, which counts what is captured and replayed.

As a program: ``python counted.py FILE ARGUMENT ...``; the counts go into FILE as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

# Before cuBLAS starts.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import torch
import torch.distributed as dist

import arat_fast.run.loop as loop_module
from arat_fast.cli import main as command_line
from arat_fast.run.hooks import Hook
from arat_fast.run.state import Run

COUNTS: Counter[str] = Counter()


def count(owner: Any, method: str, name: str, capturing: bool = False) -> None:
    """Count the calls, or those in a capture."""
    original = getattr(owner, method)

    def counted(*arguments: Any, **options: Any) -> Any:
        if not capturing or torch.cuda.is_current_stream_capturing():
            COUNTS[name] += 1
        return original(*arguments, **options)

    setattr(owner, method, counted)


class Deterministic(Hook):
    def begin(self, run: Run) -> None:
        # Timing chooses other algorithms from run to run.
        torch.backends.cudnn.benchmark = False


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    count(torch.cuda.CUDAGraph, "capture_end", "captures")
    count(torch.cuda.CUDAGraph, "replay", "replays")
    count(dist, "all_reduce", "captured sums", capturing=True)
    loop_module.train = partial(loop_module.train, hooks=[Deterministic()])
    code = command_line(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(COUNTS))
    sys.exit(code)
