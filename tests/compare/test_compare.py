"""A whole small comparison: its runs, its files, and what can be made from them again."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import OPTIONS, popen, tiny_config, tiny_trainer

from arat_fast.cli import main
from arat_fast.command_line import apply_overrides
from arat_fast.compare.methods import choose_methods
from arat_fast.compare.plan import RECORD, make_plan
from arat_fast.compare.runner import GridRunner, environments
from arat_fast.config import config_from_dict
from arat_fast.files import LOCK, Lock
from arat_fast.recipes import recipe
from arat_fast.statistics import unpack

SHORT = [
    *("--seeds", "3", "--train.epochs", "2", "--train.eval-every", "0", "--average.kind", "none"),
    *OPTIONS,
]
NATURAL = ["compare", "digits", "--objectives", "natural", *SHORT]


@pytest.fixture(scope="module", autouse=True)
def paths() -> Iterator[None]:
    """The children import what the tests import, with one thread each."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    patch.undo()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs need no process of their own; what they say is in their log all the same."""

    def logged(arguments: Any, **keywords: Any) -> Any:
        with redirect_stderr(io.StringIO()) as said:
            ended = popen(arguments, **keywords)
        if hasattr(keywords.get("stdout"), "write"):
            keywords["stdout"].write(said.getvalue().encode())
        return ended

    monkeypatch.setattr(subprocess, "Popen", logged)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    assert main([*NATURAL, "--out", str(out)]) == 0
    return out


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return content


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_cell_is_a_run(compared: Path) -> None:
    run = compared / "natural-seed3"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["seed"], summary["epochs"]) == ("finished", 3, 2)
    assert (run / "report.html").exists() and (compared / "logs" / f"{run.name}.log").read_text()
    files = {f"comparison.{ending}" for ending in ("json", "md", "tex", "png", "html")}
    assert files < {path.name for path in compared.iterdir()}


def test_the_record_holds_what_every_cell_did(compared: Path) -> None:
    content = record(compared)
    assert content["commands"] == [shlex.join(["arat-fast", *NATURAL, "--out", str(compared)])]
    assert (content["seeds"], content["jobs"], content["threads"]) == ([3], 1, 1)
    assert content["versions"]["torch"] == torch.__version__
    (cell,) = content["cells"]
    run = compared / cell["run"]
    summary = json.loads((run / "summary.json").read_text())
    assert cell["accuracy"] == summary["accuracy"]
    for name, entry in cell["accuracy"].items():
        assert unpack(cell["right"][name], entry["num_samples"]).sum() == entry["correct"]
    assert cell["accuracy"]["clean"]["num_samples"] == 40
    assert cell["config"] == json.loads((run / "config.json").read_text())["config"]
    assert summary["command"] == cell["command"]
    # The command line says the same as the configuration.
    program, train, recipe_name, *options = shlex.split(cell["command"])
    assert (program, train, recipe_name) == ("arat-fast", "train", "digits")
    assert options[-3:] == ["--out", str(run), "--resume"]
    assert apply_overrides(recipe("digits"), options[:-3]) == config_from_dict(cell["config"])


def test_the_same_command_again_trains_nothing(compared: Path) -> None:
    summary, content = compared / "natural-seed3" / "summary.json", record(compared)
    before = summary.stat().st_mtime_ns
    assert main([*NATURAL, "--out", str(compared)]) == 0
    assert summary.stat().st_mtime_ns == before
    assert record(compared)["cells"] == content["cells"]


def test_the_tables_come_from_the_folder_or_the_file_alone(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {
        ending: (compared / f"comparison.{ending}").read_bytes()
        for ending in ("md", "tex", "png", "html")
    }
    shutil.copy(compared / RECORD, tmp_path)
    capsys.readouterr()
    assert main(["compare", "--from", str(tmp_path)]) == 0
    assert capsys.readouterr().out.encode() == written["md"]
    for ending, content in written.items():
        assert (tmp_path / f"comparison.{ending}").read_bytes() == content
    alone = tmp_path / "saved.json"
    shutil.move(tmp_path / RECORD, alone)
    assert main(["compare", "--from", str(alone)]) == 0
    assert capsys.readouterr().out.encode() == written["md"]
    # A row whose runs have another name.
    content = json.loads(alone.read_text())
    content["methods"][0]["label"] = "renamed"
    (tmp_path / RECORD).write_text(json.dumps(content))
    assert main(["compare", "--from", str(tmp_path)]) == 2
    assert "has not written" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--objective.name", "--model.name"])
def test_a_module_is_not_imported_on_a_saved_comparison_s_word(
    compared: Path,
    tmp_path: Path,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "planted.py").write_text("raise AssertionError('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    content = record(compared)
    content["methods"][0]["options"] = [option, "planted:Mine"]
    Path(RECORD).write_text(json.dumps(content))
    assert "planted:Mine" in refused(capsys, ["compare", "--from", RECORD])


@pytest.mark.slow
def test_a_saved_comparison_runs_again_in_another_folder(
    compared: Path, tmp_path: Path, in_process: None
) -> None:
    saved = compared / RECORD
    assert main(["compare", "--from", str(saved), "--out", str(tmp_path / "again")]) == 0
    assert_same(weights(compared / "natural-seed3"), weights(tmp_path / "again" / "natural-seed3"))
    (cell,), (before,) = (record(f)["cells"] for f in (tmp_path / "again", compared))
    assert cell["accuracy"] == before["accuracy"]


@pytest.mark.slow
def test_another_evaluation_is_made_without_training(
    compared: Path, tmp_path: Path, in_process: None
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared / "natural-seed3", out / "natural-seed3")
    before = (out / "natural-seed3" / "checkpoint.pt").read_bytes()
    assert main([*NATURAL, "--out", str(out), "--eval.max-samples", "30"]) == 0
    assert (out / "natural-seed3" / "checkpoint.pt").read_bytes() == before
    (cell,) = record(out)["cells"]
    assert cell["accuracy"]["clean"]["num_samples"] == 30


OWN = """
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from arat_fast.objectives import Objective, ObjectiveOutput, Settings


class Smoothed(Objective):
    label = "Label smoothing"
    note = "Only for this test."

    @dataclass(frozen=True)
    class Settings(Settings):
        amount: float = 0.1

    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def forward(self, model, x, x_adv, y, start):
        logits = model(x_adv)
        loss = F.cross_entropy(logits, y, label_smoothing=self.amount)
        return ObjectiveOutput(loss, {"smoothed": loss}, None, logits)
"""


@pytest.mark.slow
def test_an_objective_of_ones_own_is_a_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    in_process: None,
) -> None:
    (tmp_path / "mine_for_compare.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    name = "mine_for_compare:Smoothed"
    arguments = ["compare", "digits", "--objectives", name, *SHORT, "--out", "out"]
    variant = f"more: --objective.name {name} --objective.amount 0.3"
    assert main([*arguments, "--variant", variant, "--train.epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| Label smoothing |" in printed and "Only for this test." in printed
    assert "more has settings of its own: objective.amount=0.3." in printed
    cells = {cell["run"]: cell for cell in record(tmp_path / "out")["cells"]}
    assert {run: cell["config"]["objective"] for run, cell in cells.items()} == {
        "smoothed-seed3": {"name": name, "amount": 0.1},
        "more-seed3": {"name": name, "amount": 0.3},
    }


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_another_configuration_is_refused(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the folder's comparison, or of a finished run that lies in it."""
    before = (compared / RECORD).read_bytes()
    line = refused(capsys, [*NATURAL, "--data.batch-size", "32", "--out", str(compared)])
    assert "data.batch_size=16" in line and "--out" in line
    assert (compared / RECORD).read_bytes() == before
    out = tmp_path / "out"
    shutil.copytree(compared / "natural-seed3", out / "natural-seed3")
    line = refused(capsys, [*NATURAL, "--out", str(out), "--optimizer.lr", "0.2"])
    assert "natural-seed3" in line and "optimizer.lr=0.1" in line and "--out" in line
    assert not (out / RECORD).exists()


@pytest.mark.parametrize(
    ("arguments", "keyword"),
    [
        ([], "compare"),
        (["digits", "--seed", "1"], "--seeds"),
        (["digits", "--objectives", "aart"], "aart"),
        (["digits", "--objectives", "at", "--jobs", "0"], "--jobs"),
        (["--from", "none"], "none"),
        (["--from", "none", "--jobs", "two"], "--jobs"),
    ],
)
def test_bad_command_lines(
    arguments: list[str],
    keyword: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert keyword in refused(capsys, ["compare", *arguments])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_fails_does_not_lose_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: None
) -> None:
    arguments = [
        *("compare", "digits", "--objectives", "natural", "--seeds", "0", "--train.epochs", "1"),
        *("--variant", "too fast: --objective.name natural --optimizer.lr 1e30", *OPTIONS),
    ]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "| Natural |" in printed.out
    assert "Note: too-fast-seed0 failed: exit code 2, " in printed.out
    assert "too-fast-seed0: failed: " in printed.err
    cells = {cell["run"]: cell for cell in record(tmp_path / "out")["cells"]}
    assert cells["natural-seed0"]["status"] == "finished"
    assert cells["too-fast-seed0"]["status"] == "failed"
    assert "finite" in cells["too-fast-seed0"]["reason"]
    assert "too-fast-seed0" in (tmp_path / "out" / "comparison.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_comparison_stops_its_runs_and_the_same_command_goes_on(
    tmp_path: Path, one_thread: None, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "arat_fast", "compare", "digits", "--objectives", "at"),
        *("--seeds", "0", *OPTIONS, "--train.epochs", "16", "--out", str(out)),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    run = out / "at-seed0"
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert b"stopped with 1 of 1 runs left; go on with the same command" in errors
    # A run that nobody waits for holds the comparison's folder until its process has ended.
    deadline = time.monotonic() + 60
    while True:
        try:
            Lock(out / LOCK).release()
            break
        except BlockingIOError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted" and 0 < summary["steps"] < 64
    assert record(out)["cells"][0]["status"] == "pending"
    # Nobody works in the folder any more: it can be locked, and the run's state stays.
    assert main(command[3:]) == 0
    config = config_from_dict(record(out)["cells"][0]["config"])
    tiny_trainer(tmp_path / "alone", config).run()
    assert_same(weights(run), weights(tmp_path / "alone"))


def test_a_folder_at_work_is_refused(tmp_path: Path) -> None:
    plan = make_plan(tiny_config(), choose_methods(["natural"]), (0,))
    with Lock(tmp_path / LOCK), pytest.raises(BlockingIOError, match="at work in"):
        GridRunner(plan, tmp_path, 1, print).run()
    assert not (tmp_path / RECORD).exists()


def test_cores_are_divided_and_gpus_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environments("auto", None) == [{"OMP_NUM_THREADS": "8"}]
    assert environments("cpu", 3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert environments("cpu", 20) == [{"OMP_NUM_THREADS": "1"}] * 20
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environments("cpu", 2) == [{}, {}]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environments("auto", None) == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(3)]
    assert environments("cuda", 1) == [{"CUDA_VISIBLE_DEVICES": "0"}]
    assert environments("cuda:2", None) == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert environments("auto", 2) == [{"CUDA_VISIBLE_DEVICES": v} for v in ("4", "6")]
    for device, jobs in (("auto", 4), ("cuda:1", 2)):
        with pytest.raises(ValueError, match="one run on each"):
            environments(device, jobs)
    assert environments("cpu", 4) == [{"OMP_NUM_THREADS": "2"}] * 4
