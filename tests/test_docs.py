"""The commands and links of README and docs."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from arat_fast import cli
from arat_fast.command_line import parse
from arat_fast.compare import command as compare

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (.+?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
NEEDS = ("a GPU", "several GPUs", "a dataset", "a dataset and a GPU", "a network", "minutes")
"""What the mark before a block may say that its commands need; the others run in a test."""


class Line(NamedTuple):
    """A command of a page and what it needs, where a mark stands before it."""

    words: list[str]
    needs: str


def lines(path: Path) -> Iterator[Line]:
    """The commands of the blocks of a page, in order."""
    for mark, kind, text in BLOCK.findall(path.read_text(encoding="utf-8")):
        if kind not in ("sh", "console"):
            continue
        needs = mark.removeprefix("needs ") if mark.startswith("needs ") else ""
        assert needs in ("", *NEEDS), f"{path.name}: {mark}"
        for line in text.replace("\\\n", " ").splitlines():
            if kind == "sh" or line.startswith("$ "):
                yield Line(shlex.split(line.removeprefix("$ "), comments=True), needs)


def inline(path: Path) -> Iterator[list[str]]:
    """The commands in the text of a page that have options, and are whole."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for command in re.findall(r"`arat-fast ([^`]+)`", text):
        if " --" in command and not re.search(r"…|RECIPE|NAME", command):
            yield shlex.split(command)


def arguments(words: list[str]) -> list[str] | None:
    """What follows ``arat-fast``; None for another program."""
    if words and words[0].removeprefix(".venv/bin/") == "arat-fast":
        return words[1:]
    return words[words.index("arat_fast") + 1 :] if "arat_fast" in words else None


def understand(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command without doing it."""
    if words[0] == "analyze":
        from arat_fast.analysis.run import AnalyzeOptions

        assert parse(AnalyzeOptions, words[1:], "arat-fast analyze").checkpoints
        return
    with monkeypatch.context() as patch:
        patch.setenv("ARAT_FAST_TRACEBACK", "1")
        patch.setattr(compare, "make_plan", lambda config, methods, *rest: None)
        patch.setattr(compare, "_run", lambda plan, out, jobs: 0)
        patch.setattr(compare, "read_record", lambda source: {})
        patch.setattr(compare, "plan_from_record", lambda record: None)
        patch.setattr(compare, "evaluate_record", lambda record: None)
        patch.setattr(compare, "to_markdown", lambda results: "")
        for kind in (*cli.COMMANDS.values(), cli.Inspect, cli.Prepare):
            if "__call__" in vars(kind):
                patch.setattr(kind, "__call__", lambda self, arguments: 0)
        assert cli.main(words) == 0


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_are_understood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests")
    targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known = {target for names in targets for target in names.split()}
    for words, _ in lines(path):
        typed = arguments(words)
        if typed is not None:
            understand(typed, monkeypatch)
        elif words and words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= known, words
        elif words[1:2] == ["-m"] and words[2].startswith("benchmarks."):
            assert importlib.util.find_spec(words[2]), words
    for typed in inline(path):
        understand(typed, monkeypatch)
