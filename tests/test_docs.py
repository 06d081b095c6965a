"""The commands of README and docs: all are understood, and those without a mark run.

``python tests/test_docs.py`` lists those with a mark.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import OPTIONS

from arat_fast import cli
from arat_fast.command_line import parse
from arat_fast.compare import command as compare

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (.+?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
NEEDS = ("a GPU", "several GPUs", "a dataset", "a dataset and a GPU", "the internet", "minutes")
"""What the mark before a block may say that its commands need; the others run in a test."""


SHORT = {
    "train": [*OPTIONS, "--train.epochs", "1"],
    "compare": [*OPTIONS, "--train.epochs", "1", "--seeds", "0", "--objectives", "at", "arat"],
    "eval": shlex.split("--attacks pgd --num-steps 1 --max-samples 40 --device cpu"),
    "analyze": shlex.split("--num-images 40 --num-steps 2 --num-batches 1 --device cpu"),
}
"""What a test adds to a command, so that it takes a second or two."""


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


def write_modules(path: Path) -> None:
    """The file of a page that its commands name, in the current folder."""
    for mark, _, text in BLOCK.findall(path.read_text(encoding="utf-8")):
        if mark.startswith("pairing.py"):
            Path("pairing.py").write_text(text)


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
def test_commands_are_understood(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_modules(path)
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "path",
    # tests/test_tutorial.py runs it as it is, with its output.
    [path for path in PAGES if path.stem != "tutorial-your-images"],
    ids=lambda path: path.name,
)
def test_commands_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema_run: Path
) -> None:
    """In order, in a folder that holds a finished run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARAT_FAST_TRACEBACK", "1")
    write_modules(path)
    shutil.copytree(ema_run, "runs/digits-seed0")
    if path.stem == "choosing-eps":
        (_, _, code), *_ = BLOCK.findall(path.read_text(encoding="utf-8"))
        exec(code, {})
    number = 0
    for words, needs in lines(path):
        typed = arguments(words)
        if typed is None or needs:
            continue
        number += 1
        name = typed[0]
        if "--from" not in typed:
            typed += SHORT.get(name, [])
        if name in ("train", "compare") and "--out" not in typed and "--from" not in typed:
            typed += ["--out", f"runs/{number}"]
        assert cli.main(typed) == 0, typed


if __name__ == "__main__":
    for page in PAGES:
        for words, needs in lines(page):
            if needs and words:
                print(f"{page.name}, needs {needs}: {shlex.join(words)}")
