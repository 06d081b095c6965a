"""Evaluation of a saved network on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import tiny_config

from arat_fast import doctor
from arat_fast.display import Display
from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.run.loop import train
from arat_kernels.checks import Operation
from arat_kernels.implementation import is_replaced, replace_operations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_kernels_that_are_wrong_evaluate_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    display = Display(Console(quiet=True))
    train(tiny_config(epochs=1), tmp_path / "run", display=display)

    def examine(operations: dict[str, Operation], dtype: torch.dtype, *_: object, **__: object):  # type: ignore[no-untyped-def]
        assert dtype == torch.float32
        assert {name.partition("-")[0] for name in operations} == doctor.EVALUATED
        wrong = {"error": "rms error 1", "share": None}
        return {"operations": {n: wrong for n in operations if n.startswith("pgd_step")}}, None

    monkeypatch.setattr(doctor, "examine", examine)
    try:
        record = evaluate_checkpoint(
            tmp_path / "run", attacks=["pgd"], max_samples=30, device="cuda", display=display
        )
        assert list(record["replaced"]) == ["pgd_step"] and is_replaced("pgd_step")
    finally:
        replace_operations([])
