"""A run that is interrupted and resumed ends with the very tensors of one that is not."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import (
    TinyRun,
    assert_same_end,
    changed,
    leaves,
    metric_lines,
    tiny_config,
    tiny_trainer,
    with_objective,
)

import arat_fast.training.checkpoint as checkpoint_module
from arat_fast.config import Config
from arat_fast.data.batches import Batch
from arat_fast.evaluation import suite
from arat_fast.evaluation.autoattack import autoattack
from arat_fast.evaluation.pieces import read_arrays
from arat_fast.evaluation.suite import evaluate_all
from arat_fast.models import create_model
from arat_fast.report import write_report
from arat_fast.run import finish
from arat_fast.stop import InterruptedRun
from arat_fast.training.checkpoint import load_checkpoint, save_checkpoint
from arat_fast.training.metrics import NotFiniteError
from arat_fast.training.schedule import learning_rate

STEPS_PER_EPOCH = 4


def official() -> Config:
    config = changed(tiny_config(epochs=2), "attack", bn="batch_update")
    return changed(changed(config, "objective", balance="probe"), "step", noisy_clean=True)


def second_network(kind: str, name: str, **settings: object) -> Config:
    return with_objective(tiny_config(2, kind=kind, start=0.0, every=2), name, **settings)


CONFIGS: dict[str, Config] = {
    "ema": tiny_config(3),
    "swa": tiny_config(3, kind="swa", start=0.3, every=2),
    "official": official(),
    "bf16": changed(tiny_config(2), "step", precision="bf16"),
    "lbgat": second_network("swa", "lbgat"),
    "lbgat 6": second_network("ema", "lbgat", alpha=6.0),
    "own clean branch": second_network("swa", "lbgat", guide="clean-branch"),
    "arrest": second_network("swa", "arrest", teacher_epochs=1),
}


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folder of a run that was not interrupted, by its configuration."""
    folders: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("whole") / "run"
            tiny_trainer(folders[name], CONFIGS[name]).run()
        return folders[name]

    return run


@pytest.mark.parametrize(
    ("name", "step", "number", "exit_code"),
    [
        slow("ema", 1, signal.SIGINT, 130),
        ("ema", STEPS_PER_EPOCH + 2, signal.SIGTERM, 75),
        slow("ema", 2 * STEPS_PER_EPOCH, signal.SIGINT, 130),
        ("swa", 9, signal.SIGINT, 130),
        slow("official", 5, signal.SIGINT, 130),
        slow("bf16", 6, signal.SIGINT, 130),
        ("lbgat", 6, signal.SIGINT, 130),
        slow("lbgat 6", 6, signal.SIGINT, 130),
        slow("own clean branch", 6, signal.SIGINT, 130),
        slow("arrest", 6, signal.SIGINT, 130),
    ],
)
def test_resumed_run_equals_uninterrupted(
    whole: Whole, tmp_path: Path, name: str, step: int, number: int, exit_code: int
) -> None:
    config = CONFIGS[name]
    run = tiny_trainer(tmp_path, config)
    run.interrupt_at(step, number)
    with pytest.raises(InterruptedRun, match=f"step {step} of") as stopped:
        run.run()
    assert stopped.value.exit_code == exit_code
    # Neither what else happens in the process matters, nor a line that a killed one has begun.
    torch.rand(3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 999')
    resumed = tiny_trainer(tmp_path, config, resume=True)
    assert resumed.progress.step == step
    resumed.run()
    assert_same_end(whole(name), tmp_path)
    assert metric_lines(tmp_path, "eval") == metric_lines(whole(name), "eval")
    assert all(line["step"] < 999 for line in metric_lines(tmp_path, "train"))
    # The deployed network alone, under its own names.
    expected = create_model("resnet8", 10, 1, norm="shared").state_dict()
    exported = load_file(tmp_path / "model.safetensors")
    assert {n: t.shape for n, t in exported.items()} == {n: t.shape for n, t in expected.items()}


def test_speed_is_that_of_the_steps(tmp_path: Path) -> None:
    """An epoch's line has its own; a step that was broken off counts neither as images nor time."""
    config = tiny_config(2)
    run = tiny_trainer(tmp_path, config)
    step = run.step.from_indices

    def slow(*inputs: Any, **keywords: Any) -> Any:
        if run.progress.step < STEPS_PER_EPOCH + 2:
            return step(*inputs, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)
        return None

    run.step.from_indices = slow  # type: ignore[method-assign,assignment]
    with pytest.raises(InterruptedRun, match="step 6 of"):
        run.run()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["wall_seconds"]["train"] < 3
    images = 59 + 2 * 16
    assert summary["images_per_second"] * summary["wall_seconds"]["train"] == pytest.approx(images)
    console = Console(file=io.StringIO(), width=1000)
    resumed = tiny_trainer(tmp_path, config, resume=True, console=console)
    resumed.progress.seconds += 1e6
    assert resumed.run()["images_per_second"] < 1
    printed = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    (said,) = re.findall(r"epoch 2/2  ([\d,]+) images/s", printed)
    assert int(said.replace(",", "")) > 10


def test_every_part_restores_exactly(whole: Whole, tmp_path: Path) -> None:
    """Each part named in ``Run.parts``, by itself, in a run that was built anew."""
    source = whole("lbgat")
    saved = load_checkpoint(source / "checkpoint.pt")
    run = tiny_trainer(tmp_path, dataclasses.replace(CONFIGS["lbgat"], seed=1))
    assert saved.keys() - {"format"} == run.parts.keys()
    for hook in run.hooks:
        hook.begin(run)
    for name, part in run.parts.items():
        before = copy.deepcopy(leaves(part.state_dict()))
        part.load_state_dict(saved[name])
        expected, got = leaves(saved[name]), leaves(part.state_dict())
        if name == "run":
            assert got["/dataset/sha256"] == expected["/dataset/sha256"]
            continue
        assert expected.keys() == got.keys()
        different = [path for path in got if not same(got[path], expected[path])]
        assert different in ([], ["/metrics.jsonl/bytes"]), (name, different)
        moved = [p for p, value in got.items() if p not in before or not same(before[p], value)]
        # Hooks have their own test: this run evaluates nothing between its epochs.
        assert moved or name == "hooks", name
    for hook in run.hooks:
        hook.close()


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def test_what_does_not_belong_to_the_run_is_refused(whole: Whole, tmp_path: Path) -> None:
    folder, config = whole("ema"), CONFIGS["ema"]
    content = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        tiny_trainer(folder, config)
    other = changed(config, "optimizer", lr=0.3)
    with pytest.raises(ValueError, match=r"optimizer\.lr=0\.1, got optimizer\.lr=0\.3"):
        tiny_trainer(folder, other, resume=True)
    with pytest.raises(ValueError, match=r"objective\.name=arat, got objective\.name=at"):
        tiny_trainer(folder, with_objective(config, "at"), resume=True)
    free = changed(changed(config, "train", log_every=50), "eval", num_steps=2)
    resumed = tiny_trainer(folder, free, resume=True)
    resumed.precision = torch.bfloat16
    with pytest.raises(ValueError, match="float32 on cpu, got bfloat16 on cpu"):
        resumed.parts["run"].load_state_dict(load_checkpoint(folder / "checkpoint.pt")["run"])
    assert (folder / "checkpoint.pt").read_bytes() == content
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        tiny_trainer(tmp_path, resume=True)
    assert (tmp_path / "checkpoint.pt").stat().st_size == len(content) // 2


def test_a_finished_run_makes_again_what_it_lacks(whole: Whole, tmp_path: Path) -> None:
    out, config = tmp_path / "run", CONFIGS["ema"]
    shutil.copytree(whole("ema"), out)
    weights, examples = out / "model.safetensors", out / "examples.npz"
    content, summary = weights.read_bytes(), (out / "summary.json").read_bytes()

    def again() -> str:
        console = Console(file=io.StringIO(), width=1000)
        tiny_trainer(out, config, resume=True, console=console).run()
        assert weights.read_bytes() == content
        return str(console.file.getvalue())  # type: ignore[attr-defined]  # a StringIO

    for damage in (b"", content[:-1] + b"x"):
        weights.write_bytes(damage)
        assert "model.safetensors was written again" in again()
    assert (out / "summary.json").read_bytes() == summary
    arrays = read_arrays(examples)
    for damage in (b"", examples.read_bytes()[:-100]):
        examples.write_bytes(damage)
        again()
        made = read_arrays(examples)
        assert arrays is not None and made is not None
        assert all(np.array_equal(made[name], array) for name, array in arrays.items())
    (out / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing" in again()


def test_a_run_with_other_steps_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """Step 8, the end of the first epoch of a run with smaller batches, is step 4 of this one; its
    metrics go on with the ninth that is made."""
    config = tiny_config(epochs=2)
    tiny_trainer(tmp_path, config).run()
    newest = tmp_path / "checkpoint.pt"
    state = load_checkpoint(newest)
    state["progress"] = {**state["progress"], "step": 8, "steps_per_epoch": 8}
    save_checkpoint(newest, state)
    (tmp_path / "checkpoint-00000001.pt").unlink()
    tiny_trainer(tmp_path, config, resume=True).run()
    assert load_checkpoint(newest)["progress"]["step"] == 8
    before = load_checkpoint(tmp_path / "checkpoint-00000001.pt")["progress"]
    assert (before["step"], before["steps_per_epoch"]) == (8, 8)
    steps = [line["step"] for line in metric_lines(tmp_path, "train")]
    assert steps == [3, 4, 7, 8, 11, 12]


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("model", "conv1.weight", torch.zeros(1).expand(10**6, 10**6)),
        ("random", "attack", torch.zeros(1, dtype=torch.uint8).expand(10**12)),
        ("metrics", None, {}),
    ],
)
def test_a_checkpoint_that_was_edited_is_refused(
    whole: Whole, tmp_path: Path, part: str, key: str | None, value: Any
) -> None:
    """Views of one element are 4 TB for whoever copies them."""
    state = load_checkpoint(whole("swa") / "checkpoint.pt")
    changed = {**state, part: value if key is None else {**state[part], key: value}}
    torch.save(changed, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=f"checkpoint.pt holds another {part}"):
        tiny_trainer(tmp_path, CONFIGS["swa"], resume=True)


def interrupted_refresh(run: TinyRun, interrupt: Callable[[], object]) -> None:
    """Call ``interrupt`` while the statistics of the average are re-estimated."""
    batches = run.more_batches

    def more() -> Iterator[Batch]:
        for index, batch in enumerate(batches()):
            if index == 1:
                interrupt()
            yield batch

    run.more_batches = more  # type: ignore[method-assign]


def test_signal_during_the_refresh_of_statistics(whole: Whole, tmp_path: Path) -> None:
    config = CONFIGS["swa"]
    run = tiny_trainer(tmp_path, config)
    interrupted_refresh(run, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedRun):
        run.run()
    assert not load_checkpoint(tmp_path / "checkpoint.pt")["average"]["statistics_fresh"]
    tiny_trainer(tmp_path, config, resume=True).run()
    assert_same_end(whole("swa"), tmp_path)


def test_signal_during_the_final_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message and the report say that the training is complete, and where its weights are."""

    def interrupted(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_all(*args, **options)

    monkeypatch.setattr(finish, "evaluate_all", interrupted)
    weights = tmp_path / "model.safetensors"
    with pytest.raises(InterruptedRun, match=f"after the training, .*weights are in {weights};"):
        tiny_trainer(tmp_path, tiny_config(epochs=1)).run()
    assert weights.is_file()
    page = write_report(tmp_path).read_text()
    assert "The training is complete; the final evaluation was interrupted." in page
    assert "examples.npz" not in page


def test_what_an_interrupted_evaluation_has_found_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = [signal.SIGTERM]

    def interrupted(*args: Any, **options: Any) -> Any:
        if signals:
            os.kill(os.getpid(), signals.pop())
        return autoattack(*args, **options, attacks=("apgd-ce",))

    monkeypatch.setattr(suite, "autoattack", interrupted)
    config = changed(tiny_config(epochs=1), "eval", autoattack=True)
    with pytest.raises(InterruptedRun, match="after the training"):
        tiny_trainer(tmp_path, config).run()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["split"] == "test"
    assert list(summary["accuracy"]) == ["clean", "clean_branch", "pgd1"]
    page = write_report(tmp_path).read_text()
    assert "the final evaluation was interrupted: below is what it had found by then." in page
    for name in ("clean", "pgd1"):
        assert f"<p>{summary['accuracy'][name]['correct']} of 40 right</p>" in page
    assert page.count("not measured: the evaluation did not come to its end") == 1
    tiny_trainer(tmp_path, config, resume=True).run()
    finished = json.loads((tmp_path / "summary.json").read_text())
    assert finished["accuracy"].items() > summary["accuracy"].items()


def test_a_stop_is_not_confirmed_without_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_trainer(tmp_path, tiny_config(epochs=1, kind="swa", start=0.3, every=2))

    def fail(path: Path, state: dict[str, Any]) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr(checkpoint_module, "save_checkpoint", fail)
    interrupted_refresh(run, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(OSError, match="MemoryError: no memory left"):
        run.run()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed" and "no memory left" in summary["reason"]


def test_weights_that_are_not_finite_never_overwrite_a_checkpoint(tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path, tiny_config(epochs=3))
    run.at_step(2 * STEPS_PER_EPOCH, lambda: run.model.linear.bias.data.fill_(float("nan")))
    with pytest.raises(NotFiniteError, match=r"step 8: linear\.bias; the last good checkpoint is"):
        run.run()
    progress = load_checkpoint(tmp_path / "checkpoint.pt")["progress"]
    assert progress["step"] == STEPS_PER_EPOCH
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed" and "linear.bias" in summary["reason"]


def test_rollback_goes_on_from_the_checkpoint_with_a_lower_rate(tmp_path: Path) -> None:
    config = changed(tiny_config(epochs=2), "train", rollbacks=1, rollback_factor=0.25)
    run = tiny_trainer(tmp_path, config)
    run.at_step(6, lambda: run.model.linear.bias.data.fill_(float("nan")))
    run.run()
    assert run.progress.num_rollbacks == 1 and run.progress.rate_factor == 0.25
    rate = learning_rate(config.schedule, config.peak_lr, 7, STEPS_PER_EPOCH, 2)
    assert run.progress.step == 8 and run.rate == 0.25 * rate
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())
    assert [line["step"] for line in metric_lines(tmp_path, "train")] == [3, 4, 7, 8]


@pytest.mark.parametrize(("epochs", "step"), [(1, 0), (2, 4)])
def test_averaging_always_starts(tmp_path: Path, epochs: int, step: int) -> None:
    config = tiny_config(epochs=epochs, kind="swa", start=0.75, every=2)
    assert tiny_trainer(tmp_path, config).average.start_step == step
