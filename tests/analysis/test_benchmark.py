"""The script of the measurement in docs/analysis.md."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tiny import OPTIONS

from arat_fast.cli import main
from arat_fast.command_line import apply_overrides
from arat_fast.recipes import recipe
from benchmarks import gradient_conflict

pytestmark = pytest.mark.slow


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which trains in this process, one epoch on a few images."""
    options = [*OPTIONS, "--train.epochs", "1", "--average.kind", "none"]
    here = SimpleNamespace(run=lambda command, cwd: SimpleNamespace(returncode=main(command[3:])))
    monkeypatch.setattr(gradient_conflict, "COMMON", [*gradient_conflict.COMMON, *options])
    monkeypatch.setattr(gradient_conflict, "subprocess", here)
    return gradient_conflict


def test_a_run_that_is_there_must_be_the_same(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = script.train("naive", 2, tmp_path / "run")
    options = script.record(run)["options"]
    assert {*script.METHODS["naive"], "--analyze.every"} <= set(options)
    assert apply_overrides(recipe("digits"), options) == run.config
    before = (tmp_path / "run" / "summary.json").read_bytes()
    script.train("naive", 2, tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").read_bytes() == before
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.train("ARAT", 2, tmp_path / "run")
    assert stop.value.code == 2
    assert "belongs to a run with model.norm=shared" in capsys.readouterr().err


def test_a_run_without_analyses_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script.COMMON[:2] == ["--analyze.every", "1"]
    monkeypatch.setattr(script, "COMMON", script.COMMON[2:])
    with pytest.raises(SystemExit, match="analyses are expected, got 0"):
        script.train("ARAT", 0, tmp_path / "run")
