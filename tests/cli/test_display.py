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
        bar("PGD-20", 0, 330)
        bar("PGD-20", 300, 330)
        for done, note in ((0, "33 images standing"), (900, "30 images standing, 0:01:05 left")):
            bar("AutoAttack fab-t (3 of 4)", done, 3600, "passes", note)
    assert written.getvalue().splitlines() == [
        "PGD-20: 330 images",
        "PGD-20: 300 of 330 images",
        "AutoAttack fab-t (3 of 4): 33 images standing",
        "AutoAttack fab-t (3 of 4): 25 %, 30 images standing, 0:01:05 left",
    ]
