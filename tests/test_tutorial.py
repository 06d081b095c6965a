"""The tutorial on one's own images: its code and its commands, in order, print what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from arat_fast.cli import main

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial-your-images.md"


def shape(line: str) -> str:
    """A line without its numbers, its classes and its widths."""
    line = re.sub(r"circle|cross|square", "class", line)
    return " ".join(re.sub(r"[\d.]+", "#", line).split())


@pytest.mark.slow
def test_the_tutorial_from_its_beginning_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|console)\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python"] * 2 + ["console"] * 5 + ["python"]
    names: dict[str, Any] = {}
    for kind, text in blocks:
        if kind == "python":
            exec(text, names)
            continue
        command, *expected = text.replace("\\\n", " ").splitlines()
        program, *arguments = shlex.split(command.removeprefix("$ "))
        assert program == "arat-fast" and expected
        assert main(arguments) == 0
        printed = [shape(line) for line in capsys.readouterr().out.splitlines()]
        missing = [line for line in expected if shape(line) not in printed]
        assert not missing, (command, printed)
    assert names["label"] in ("circle", "cross", "square") and 1 / 3 <= names["confidence"] <= 1
    written = {path.name for path in tmp_path.iterdir()}
    assert {"photos-sheet.png", "photos-radii.png", "run", "robust-shapes"} <= written
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "torchvision:resnet18" in report
