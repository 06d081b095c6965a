"""The command line: a whole small run, and one line with exit code 2 for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from official import state_dict_to_official
from pictures import image_folder
from safetensors.torch import load_file
from tiny import OPTIONS
from torch import Tensor, nn

from arat_fast import __version__ as VERSION
from arat_fast.attacks.pgd import PGD
from arat_fast.cli import COMMANDS, main
from arat_fast.command_line import (
    UsageError,
    apply_overrides,
    number,
    overrides_of,
    shown,
    typed,
)
from arat_fast.config import Config
from arat_fast.datasets.decoding import FORMATS
from arat_fast.models import create_model
from arat_fast.objectives import ARAT
from arat_fast.objectives.base import ObjectiveOutput
from arat_fast.recipes import RECIPES, recipe
from arat_fast.saved import save_safetensors
from arat_fast.settings import meanings

TRAIN = ["train", "digits", *OPTIONS, "--train.epochs", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main([*TRAIN, "--out", str(out)]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which a refused command ends."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("arat-fast: error: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("arat-fast: error: ")
    return lines[-1].removeprefix("arat-fast: error: ")


def test_run_folder(run: Path) -> None:
    names = "config.json metrics.jsonl summary.json checkpoint.pt model.safetensors examples.npz"
    assert {*names.split(), "report.html"} <= {path.name for path in run.iterdir()}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 8
    assert summary["accuracy"]["clean"]["num_samples"] == 40
    assert set(summary["accuracy"]) == {"clean", "clean_branch", "pgd1"}
    assert summary["kernels"] == "reference"
    assert summary["command"].startswith("arat-fast train digits")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [3, 4, 7, 8]
    # The exported weights are those of a plain network.
    model = create_model("resnet8", 10, 1, norm="shared")
    model.load_state_dict(load_file(run / "model.safetensors"))
    assert main(["report", str(run), "--compare", str(run)]) == 0


def test_a_command_to_type_works_without_an_activated_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / ".venv" / "bin" / "arat-fast"
    script.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.setenv("PATH", "")
    assert typed("eval", "my run") == "arat-fast eval 'my run'"
    script.touch(mode=0o755)
    assert typed("eval", "my run") == ".venv/bin/arat-fast eval 'my run'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert typed("eval", "my run") == "arat-fast eval 'my run'"


def test_eval_of_every_kind_of_file_agrees(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = []
    for name in ("", "checkpoint.pt", "model.safetensors"):
        out = tmp_path / f"record{len(records)}.json"
        arguments = ["eval", str(run / name), "--attacks", "pgd", "--max-samples", "40"]
        if name.endswith("safetensors"):
            arguments += ["--num-steps", "1"]
        assert main([*arguments, "--out", str(out)]) == 0
        records.append(json.loads(out.read_text()))
    summary = json.loads((run / "summary.json").read_text())
    for record in records:
        for name in ("clean", "pgd1"):
            assert record["accuracy"][name]["correct"] == summary["accuracy"][name]["correct"]
    assert "clean" in capsys.readouterr().out


def test_eval_with_another_ball(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    arguments = f"eval {run} --attacks pgd --norm L2 --eps 0.5 --alpha 0.1 --num-steps 3"
    assert main([*arguments.split(), "--out", str(out)]) == 0
    attack = json.loads(out.read_text())["accuracy"]["pgd3"]
    assert (attack["norm"], attack["eps"], attack["num_samples"]) == ("L2", 0.5, 360)


def test_an_interrupted_eval_goes_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "record.json"
    arguments = ["eval", str(run), "--attacks", "pgd", "--max-samples", "40"]
    arguments += ["--batch-size", "20", "--out", str(out)]
    attack, calls = PGD.__call__, 0

    def interrupted(*args: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in (1, 3):
            raise KeyboardInterrupt
        return attack(*args, **options)

    monkeypatch.setattr(PGD, "__call__", interrupted)
    assert main(arguments) == 130
    assert capsys.readouterr().err.endswith("arat-fast: interrupted\n")
    assert main(arguments) == 130
    error = capsys.readouterr().err
    assert str(tmp_path / "record.partial") in error
    assert error.endswith(f"    {typed(*arguments)}\n")
    assert main(arguments) == 0 and calls == 4
    assert not (tmp_path / "record.partial").exists()


def test_eval_writes_beside_the_checkpoint_and_keeps_its_work_until_then(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(run / "model.safetensors", path)
    arguments = ["--attacks", "pgd", "--max-samples", "20", "--num-steps", "1"]
    assert main(["eval", str(path), *arguments]) == 0
    written = tmp_path / "model.evaluation.json"
    assert json.loads(written.read_text())["accuracy"]["clean"]["num_samples"] == 20
    assert f"record: {written}" in capsys.readouterr().out
    assert not (tmp_path / "evaluation.json").exists()

    def full(path: Path, value: object) -> None:
        raise OSError(f"cannot write {path}: No space left on device")

    def never(*arguments: object, **keywords: object) -> None:
        raise AssertionError("attacked again")

    with monkeypatch.context() as patch:
        patch.setattr("arat_fast.evaluation.checkpoint.write_json", full)
        assert f"cannot write {run / 'evaluation.json'}" in refused(
            capsys, ["eval", str(run), *arguments]
        )
    with monkeypatch.context() as patch:
        patch.setattr("arat_fast.attacks.pgd.PGD.__call__", never)
        assert main(["eval", str(run), *arguments]) == 0
    assert re.search(r"clean +\d+\.\d\d %   \d+/20", capsys.readouterr().out)
    assert not (run / "evaluation.partial").exists()
    for name in ("eps0.1", "record.npz"):
        message = refused(capsys, ["eval", str(run), *arguments, "--out", str(tmp_path / name)])
        assert message.startswith("--out expects the name of a JSON file, NAME.json, got ")


@pytest.mark.slow
def test_a_run_of_three_classes_has_no_autoattack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    autoattack = sys.modules["arat_fast.evaluation.autoattack"]
    monkeypatch.setattr(autoattack, "NUM_QUERIES", 20)
    image_folder(tmp_path / "data", per_class=4)
    out = tmp_path / "run"
    arguments = (
        f"train folder-resnet18 --data.root {tmp_path}/data --data.image-size 32 --out {out}"
    )
    arguments += " --data.batch-size 4 --data.num-workers 0 --train.epochs 1 --model.name resnet8"
    arguments += " --attack.num-steps 1 --eval.num-steps 1 --train.device cpu --train.eval-every 0"
    assert main(arguments.split()) == 0
    reason = "AutoAttack's targeted loss needs at least 4 classes, got 3"
    assert reason in capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished" and "autoattack" not in summary["accuracy"]
    assert summary["left_out"] == {"autoattack": reason}
    attacks = ["pgd", "autoattack", "apgd-ce", "square"]
    assert main(["eval", str(out), "--attacks", *attacks]) == 0
    record = json.loads((out / "evaluation.json").read_text())
    assert record["left_out"] == {"autoattack": reason}
    assert set(record["accuracy"]) == {"clean", "clean_branch", "pgd1", "apgd-ce", "square"}


def test_official_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An official ResNet-18 on CIFAR needs the data; what is missing is said in one line."""
    model = create_model("resnet18", 10)
    torch.save(state_dict_to_official(model.state_dict()), tmp_path / "last.pt")
    assert "--recipe" in refused(capsys, ["eval", str(tmp_path / "last.pt")])
    message = refused(
        capsys,
        ["eval", str(tmp_path / "last.pt"), "--recipe", "cifar10-resnet18"]
        + ["--data-root", str(tmp_path / "nowhere")],
    )
    assert str(tmp_path / "nowhere") in message and "--data.download" in message


def test_a_baseline_runs(tmp_path: Path) -> None:
    arguments = [*TRAIN, "--train.epochs", "1", "--objective.name", "at", "--out", str(tmp_path)]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "clean_branch" not in summary["accuracy"]
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_settings_between_arat_and_distillation_run(tmp_path: Path) -> None:
    """Those of docs/objectives.md, as they are printed there."""
    text = " ".join((Path(__file__).parents[2] / "docs" / "objectives.md").read_text().split())
    printed = re.findall(r"- `(--objective\.name [^`]+)`", text)
    assert [options.split()[1] for options in printed] == ["arat", "lbgat"]
    terms = []
    for options in printed:
        out = tmp_path / options.split()[1]
        assert main([*TRAIN, "--train.epochs", "1", *options.split(), "--out", str(out)]) == 0
        terms.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0]))
        assert "clean_branch" in json.loads((out / "summary.json").read_text())["accuracy"]
    assert terms[0]["invariance/avgpool"] > 0 and terms[0]["w_adv"] == terms[0]["w_clean"] == 1
    assert terms[1]["mse"] > 0 and terms[1]["ce_guide"] > 0


@pytest.mark.parametrize(("command", "said"), [("info", torch.__version__), ("--version", VERSION)])
def test_versions(capsys: pytest.CaptureFixture[str], command: str, said: str) -> None:
    assert main([command]) == 0
    assert said in capsys.readouterr().out


def printed_help(capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    assert main(arguments.split()) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(name in printed_help(capsys, "--help") for name in COMMANDS)
    for command in ("train", "compare"):
        assert all(name in printed_help(capsys, f"{command} --help") for name in RECIPES)
    assert "prepare" in printed_help(capsys, "data --help")
    assert all(name in printed_help(capsys, "predict --help") for name in FORMATS)
    settings = printed_help(capsys, "train cifar10-resnet18 --help")
    assert "--attack.eps" in settings and "8/255" in settings and "``" not in settings


def test_help_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("", *COMMANDS, "train cifar10-resnet18"):
        lines = printed_help(capsys, f"{command} --help").splitlines()
        assert all(len(line) <= 80 for line in lines)
    # Filled, whatever the lines of the source.
    words = " ".join(" ".join(lines).replace("│", "").split())
    assert meanings(Config)["compat"] in words


@pytest.mark.parametrize(
    ("arguments", "libraries"),
    [
        (("--help", "--version", "eval --help"), {"torch", "matplotlib", "numpy"}),
        (
            ("train digits --help",),
            {"triton", "matplotlib", "scipy", "torchvision", "sklearn", "nvidia.dali"},
        ),
    ],
)
def test_help_waits_for_no_library(arguments: tuple[str, ...], libraries: set[str]) -> None:
    program = (
        "import sys; from arat_fast.cli import main\n"
        "for arguments in sys.argv[1:]: main(arguments.split())\n"
        f"sys.exit(', '.join({libraries} & set(sys.modules)) or None)"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_finished_run_is_not_evaluated_again(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    arguments = [*TRAIN, "--out", str(tmp_path / "run"), "--resume"]
    before = (tmp_path / "run" / "summary.json").read_text()
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "is finished already" in captured.err and "PGD-1" in captured.out
    assert (tmp_path / "run" / "summary.json").read_text() == before
    assert main([*arguments, "--eval.num-steps", "2"]) == 0
    captured = capsys.readouterr()
    assert "is finished already" not in captured.err and "PGD-2" in captured.out


def test_fractions() -> None:
    assert number("8/255") == 8 / 255 and number("1e-3") == 1e-3
    for value in (8 / 255, 0.2, 6.0, 0.12, 1 / 3):
        assert number(shown(value)) == value
    assert (shown(8 / 255), shown(0.2), shown(6.0)) == ("8/255", "0.2", "6.0")
    for word in ("runs/a", "1/0", "8/255/2"):
        with pytest.raises(ValueError):
            number(word)


def test_overrides_are_read_as_they_are_written() -> None:
    typed = "--attack.eps 4/255 --objective.gamma 3 --model.mean 1/2 0.25 --eval.alpha None"
    typed += " --average.every 7 --data.no-flip --seed 3"
    config = apply_overrides(recipe("digits"), typed.split())
    assert config.attack.eps == 4 / 255 and config.model.mean == (0.5, 0.25)
    assert config.eval.alpha is None and config.average.every == 7
    assert apply_overrides(recipe("digits"), overrides_of(config)) == config
    with pytest.raises(UsageError):
        apply_overrides(config, ["--help"])


def test_out_of_memory_proposes_the_largest_batch_that_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward = ARAT.forward

    def limited(self: ARAT, model: nn.Module, x: Tensor, *rest: Any) -> ObjectiveOutput:
        if len(x) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, model, x, *rest)

    monkeypatch.setattr(ARAT, "forward", limited)
    message = refused(capsys, [*TRAIN, "--out", str(tmp_path / "run")])
    assert "--data.batch-size 9" in message and "--train.accumulate 2" in message


def test_out_of_memory_elsewhere_names_the_switches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("arat_fast.run.finish.evaluate_all", full)
    arguments = [*TRAIN, "--train.epochs", "1", "--out", str(tmp_path / "run"), "--resume"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"nothing to resume in {tmp_path / 'run'}: a new run" in said
    assert "out of memory" in said and "--eval.batch-size" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "train, eval.*got nothing"),
        ("fly", "train, eval.*got fly$"),
        ("trian", "got trian; did you mean train"),
        ("train", "digits.*got nothing"),
        ("train digit", "got digit; did you mean digits"),
        ("data convert", "inspect, prepare, got convert"),
        ("train digits --optimizr.lr 1", "--optimizr.lr, 1; did you mean --optimizer.lr"),
        ("train digits --optimizer.lr x", "--optimizer.lr: a number.*got 'x'"),
        ("train digits --eval.alpha x", "--eval.alpha: a number.*got 'x'"),
        ("eval runs --num-steps x", "--num-steps: a whole number.*got 'x'"),
        ("eval", "PATH"),
        ("train digits --optimizer.lr 0", "^optimizer.lr must be > 0, got 0"),
        ("train digits --attack.eps 8", "eps must be in .0, 1. .*, got 8; did you mean 8/255"),
        ("train digits --attack.alpha 2", "alpha must be in .0, 1. .*did you mean 2/255"),
        ("train digits --eval.alpha 2", "eval.alpha must be in .0, 1. .*did you mean 2/255"),
        ("train digits --attack.norm L3", "L3.*Linf"),
        ("train digits --objective.name foo", "foo.*arat"),
        ("train digits --objective.direction symmetric", "neither stop-gradient nor predictor"),
        ("train digits --objective.layers layer9", "no layer 'layer9'"),
        ("train digits --compat strange", "compat must be .*got 'strange'"),
        ("train digits --train.device tpu", "expected auto, cpu, cuda"),
        ("train digits --train.device cuda:9", "no such GPU"),
        ("train digits --data.num-val 1437", "num_val"),
        ("train digits --model.name resnet50", "32×32 pixels, got 8×8"),
        ("train cifar10-resnet18 --data.root /nowhere", "/nowhere.*--data.download"),
        ("eval /nowhere.pt", "no checkpoint at /nowhere.pt"),
        ("report /nowhere", "/nowhere"),
        ("eval runs --norm L3", "L3.*L2"),
        ("eval RUN --eps 8", "got 8; did you mean 8/255"),
        ("eval RUN --alpha 8", "got 8; did you mean 8/255"),
        ("info now", "now"),
    ],
)
def test_bad_input(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: str, expected: str
) -> None:
    words = arguments.replace("RUN", str(run)).split()
    if words[:1] == ["train"] and len(words) > 1:
        words += ["--out", str(tmp_path / "run")]
    before = set(run.iterdir())
    assert re.search(expected, refused(capsys, words))
    assert not (tmp_path / "run").exists() and set(run.iterdir()) == before


def test_errors_can_be_raised_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARAT_FAST_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["report", "/nowhere"])


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_read_enough(unbuffered: str) -> None:
    """Whether the pipe is found broken at the end or at once."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-m", "arat_fast", "info"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_bad_checkpoints(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (run / "checkpoint.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(content[: len(content) // 2])
    assert "not a whole checkpoint" in refused(capsys, ["eval", str(cut)])

    wider = create_model("resnet18", 10, 1, norm="shared")
    save_safetensors(wider, tmp_path / "other.safetensors")
    message = refused(capsys, ["eval", str(tmp_path / "other.safetensors"), "--recipe", "digits"])
    assert "other.safetensors" in message and "expected" in message


def test_diverging_loss_names_step_term_and_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ARAT.forward
    calls = 0

    def poisoned(self: ARAT, *batch: Any) -> ObjectiveOutput:
        nonlocal calls
        calls += 1
        output = forward(self, *batch)
        if calls == 7:
            term = output.terms["invariance/layer3.0.bn1"]
            output.terms["invariance/layer3.0.bn1"] = term * float("nan")
        return output

    monkeypatch.setattr(ARAT, "forward", poisoned)
    message = refused(capsys, [*TRAIN, "--out", str(tmp_path / "run")])
    assert "at step 6: invariance/layer3.0.bn1 is nan" in message
    assert str(tmp_path / "run" / "checkpoint.pt") in message
    monkeypatch.undo()
    assert main([*TRAIN, "--out", str(tmp_path / "run"), "--resume"]) == 0
    message = refused(capsys, [*TRAIN, "--optimizer.lr", "1e30", "--out", str(tmp_path / "huge")])
    assert "stopped being finite at step" in message and "no checkpoint yet" in message


@pytest.mark.slow
def test_ctrl_c_saves_and_ends(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "arat_fast", *TRAIN, "--train.epochs", "500"]
    process = subprocess.Popen(
        [*command, "--out", str(out)], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    look, again = errors.strip().splitlines()[-2:]
    assert look == f"    {typed('report', str(out))}"
    assert again.startswith(f"    {typed('train', 'digits')}") and f"--out {out} --resume" in again
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    assert main(["report", str(out)]) == 0
