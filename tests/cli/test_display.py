"""What is printed while an evaluation runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from arat_fast import display as module
from arat_fast.display import Display


def test_what_is_counted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    written = io.StringIO()
    with Display(Console(file=written)).evaluating() as bar:
        for name, done, total, unit in (
            ("PGD-20", 300, 330, "images"),
            ("Of AutoAttack: square", 713, 330, "passes"),
        ):
            bar(name, 0, total, unit)
            bar(name, done, total, unit)
    assert written.getvalue().splitlines() == [
        "PGD-20: 330 images",
        "PGD-20: 300 of 330 images",
        "Of AutoAttack: square: 330 images",
        "Of AutoAttack: square: 330 images standing, 713 forward passes",
    ]
