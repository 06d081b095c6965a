"""The examples run as they are."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors.torch import load_file
from tiny import OPTIONS

from arat_fast.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_loop", "lightning_loop"])
def test_a_loop_ends_with_a_robust_network(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    printed = capsys.readouterr().out
    found = dict(re.findall(r"^(clean|PGD-20) +([\d.]+) %", printed, re.MULTILINE))
    assert float(found["clean"]) > 70 and float(found["PGD-20"]) > 30
    if name == "plain_loop":
        assert load_file("robust.safetensors")["1.weight"].shape == (32,)


def test_kernels_alone(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "kernels_alone.py"))
    assert "attack: 8.0/255" in capsys.readouterr().out
    assert names["features"][0].weight.grad.abs().sum() > 0


def test_an_objective_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    typed = ["--objective.name", "margin:Margin", "--objective.margin", "2", *OPTIONS]
    assert main(["train", "digits", *typed, "--train.epochs", "1", "--out", "run"]) == 0
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    assert any(line.get("margin_adv", 0) > 0 for line in lines)


@pytest.mark.slow
def test_the_notebook(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "digits.ipynb", as_version=4)
    # Encoded pictures are no source: they would change with every run.
    assert not any(cell.get("outputs") for cell in notebook.cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", timeout=250, resources=resources).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 5
