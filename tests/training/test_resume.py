"""A run that is interrupted and resumed ends with the very tensors of one that is not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_trainer
from torch import Tensor

import arat_fast.training.checkpoint as checkpoint_module
from arat_fast.config import Config
from arat_fast.data.batches import Batch
from arat_fast.run.loop import Trainer, check_same_run
from arat_fast.stop import InterruptedRun, StopRequest
from arat_fast.training.checkpoint import load_checkpoint
from arat_fast.training.metrics import NotFiniteError

STEPS_PER_EPOCH = 4


def interrupt_after(trainer: Trainer, steps: int, number: int = signal.SIGINT) -> None:
    """Send the signal to this process during the step with that 1-based count."""
    step = trainer.train_step.from_indices
    calls = 0

    def counting(index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == steps:
            os.kill(os.getpid(), number)
        return step(index, draws)

    trainer.train_step.from_indices = counting  # type: ignore[method-assign]


def tensors(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a nested state by its path, without wall times."""
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in tensors(item, f"{path}/{key}").items()
        }
    if isinstance(value, list):
        return {
            k: v for i, item in enumerate(value) for k, v in tensors(item, f"{path}/{i}").items()
        }
    return {path: value}


def metric_lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_end(left: Path, right: Path) -> None:
    states = [tensors(load_checkpoint(run / "checkpoint.pt")) for run in (left, right)]
    ignored = {"/train_seconds", "/metrics_bytes"}
    assert states[0].keys() == states[1].keys()
    compared = 0
    for path, value in states[0].items():
        other = states[1][path]
        if isinstance(value, Tensor):
            assert torch.equal(value, other), path
            compared += 1
        elif path not in ignored:
            assert value == other, path
    assert compared > 50
    exported = [exported_weights(run) for run in (left, right)]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())


def exported_weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    tiny_trainer(out).run()
    return out


@pytest.mark.parametrize(
    ("steps", "number", "exit_code"),
    [
        (2 * STEPS_PER_EPOCH, signal.SIGINT, 130),
        (STEPS_PER_EPOCH + 2, signal.SIGTERM, 75),
        (1, signal.SIGINT, 130),
    ],
)
def test_resumed_run_equals_uninterrupted(
    uninterrupted: Path, tmp_path: Path, steps: int, number: int, exit_code: int
) -> None:
    out = tmp_path / "run"
    trainer = tiny_trainer(out)
    interrupt_after(trainer, steps, number)
    with pytest.raises(InterruptedRun, match=f"step {steps} of 16") as stopped:
        trainer.run()
    assert stopped.value.exit_code == exit_code
    torch.rand(3)  # what else happens in the process must not matter
    resumed = tiny_trainer(out, resume=True)
    assert resumed.step == steps
    resumed.run()
    assert_same_end(uninterrupted, out)


def test_epoch_boundary_leaves_the_same_metrics(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = tiny_trainer(out)
    interrupt_after(trainer, 2 * STEPS_PER_EPOCH + 1)
    with pytest.raises(InterruptedRun):
        trainer.run()
    # Lines after the checkpoint, as a killed process leaves them.
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 999')
    tiny_trainer(out, resume=True).run()
    lines = metric_lines(out)
    assert all(line["step"] != 999 for line in lines)
    whole = [line for line in metric_lines(uninterrupted) if line["kind"] == "eval"]
    assert [line for line in lines if line["kind"] == "eval"] == whole


@pytest.mark.parametrize("kind", ["swa", "none"])
def test_resume_with_other_averages(tmp_path: Path, kind: str) -> None:
    config = tiny_config(epochs=3, kind=kind, start=0.3, every=2)
    tiny_trainer(tmp_path / "whole", config).run()
    trainer = tiny_trainer(tmp_path / "cut", config)
    interrupt_after(trainer, 9)
    with pytest.raises(InterruptedRun):
        trainer.run()
    tiny_trainer(tmp_path / "cut", config, resume=True).run()
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_resume_with_official_switches(tmp_path: Path) -> None:
    config = tiny_config(epochs=2)
    config = dataclasses.replace(
        config,
        attack=dataclasses.replace(config.attack, bn="batch_update"),
        objective=dataclasses.replace(config.objective, balance="probe"),
        step=dataclasses.replace(config.step, noisy_clean=True),
    )
    tiny_trainer(tmp_path / "whole", config).run()
    trainer = tiny_trainer(tmp_path / "cut", config)
    interrupt_after(trainer, 5)
    with pytest.raises(InterruptedRun):
        trainer.run()
    tiny_trainer(tmp_path / "cut", config, resume=True).run()
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_a_switch_without_effect_may_differ(tmp_path: Path) -> None:
    """Runs from before ``--compat official`` set ``separate_passes`` go on."""
    config = tiny_config(epochs=1)
    passes = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, separate_passes=True)
    )
    assert config.norm == "split"
    check_same_run(passes, config, tmp_path)
    check_same_run(config, passes, tmp_path)
    before, shared = (
        dataclasses.replace(c, model=dataclasses.replace(c.model, norm="shared"))
        for c in (config, passes)
    )
    message = "objective.separate_passes=False, got objective.separate_passes=True"
    with pytest.raises(ValueError, match=message):
        check_same_run(shared, before, tmp_path)
    at = [dataclasses.replace(c.objective, name="at") for c in (before, shared)]
    check_same_run(
        dataclasses.replace(shared, objective=at[1]),
        dataclasses.replace(before, objective=at[0]),
        tmp_path,
    )


def test_finished_run_is_not_overwritten(uninterrupted: Path) -> None:
    before = (uninterrupted / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        tiny_trainer(uninterrupted)
    assert (uninterrupted / "checkpoint.pt").read_bytes() == before


def other_rate(config: Config) -> Config:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=0.3))


def test_resume_refuses_another_configuration(uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.lr=0\.1, got optimizer\.lr=0\.3"):
        tiny_trainer(uninterrupted, other_rate(tiny_config()), resume=True)


def test_resume_of_a_cut_checkpoint_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    content = (uninterrupted / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        tiny_trainer(tmp_path, resume=True)
    assert (tmp_path / "checkpoint.pt").stat().st_size == len(content) // 2


def test_signal_during_the_refresh_of_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(epochs=2, kind="swa", start=0.3, every=2)
    tiny_trainer(tmp_path / "whole", config).run()
    trainer = tiny_trainer(tmp_path / "cut", config)
    batches = trainer._refresh_batches

    def interrupted(stop: StopRequest) -> Iterator[Batch]:
        for index, batch in enumerate(batches(stop)):
            if index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(trainer, "_refresh_batches", interrupted)
    with pytest.raises(InterruptedRun):
        trainer.run()
    assert not load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["average"]["statistics_fresh"]
    tiny_trainer(tmp_path / "cut", config, resume=True).run()
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_a_stop_is_not_confirmed_without_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(epochs=1, kind="swa", start=0.3, every=2)
    trainer = tiny_trainer(tmp_path / "run", config)

    def fail(path: Path, state: dict[str, Any]) -> None:
        raise MemoryError("no memory left")

    def interrupted(stop: StopRequest) -> Iterator[Batch]:
        stop.signal = signal.SIGTERM
        return batches(stop)

    batches = trainer._refresh_batches
    monkeypatch.setattr(checkpoint_module, "save_checkpoint", fail)
    monkeypatch.setattr(trainer, "_refresh_batches", interrupted)
    with pytest.raises(OSError, match="cannot write .*MemoryError: no memory left"):
        trainer.run()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "no memory left" in summary["reason"]


def test_weights_that_are_not_finite_never_overwrite_a_checkpoint(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", tiny_config(epochs=3))
    step = trainer.train_step.from_indices
    calls = 0

    def poisoning(index: Tensor, draws: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        metrics = step(index, draws)
        if calls == 2 * STEPS_PER_EPOCH:
            trainer.model.linear.bias.data[0] = float("nan")
        return metrics

    trainer.train_step.from_indices = poisoning  # type: ignore[method-assign]
    with pytest.raises(NotFiniteError, match=r"step 8: linear\.bias; the last good checkpoint is"):
        trainer.run()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == STEPS_PER_EPOCH
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "linear.bias" in summary["reason"]


def test_resume_on_other_arithmetic_is_refused(uninterrupted: Path) -> None:
    config = tiny_config()
    config = dataclasses.replace(config, step=dataclasses.replace(config.step, precision="bf16"))
    state = load_checkpoint(uninterrupted / "checkpoint.pt")
    trainer = Trainer.__new__(Trainer)
    trainer.checkpoint_path = uninterrupted / "checkpoint.pt"
    trainer.precision, trainer.device = torch.bfloat16, torch.device("cpu")
    with pytest.raises(ValueError, match="trained in float32 on cpu, got bfloat16 on cpu"):
        trainer._restore(state)
    with pytest.raises(ValueError, match=r"step\.precision=float32, got step\.precision=bf16"):
        tiny_trainer(uninterrupted, config, resume=True)


def test_averaging_always_starts(tmp_path: Path) -> None:
    for epochs in (1, 2):
        config = tiny_config(epochs=epochs, kind="swa", start=0.75, every=2)
        summary = tiny_trainer(tmp_path / str(epochs), config).run()
        assert summary["model"] == "swa"


def test_seeds_differ_and_repeat(uninterrupted: Path, tmp_path: Path) -> None:
    config = tiny_config(epochs=1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny_trainer(tmp_path / name, dataclasses.replace(config, seed=seed)).run()
    assert_same_end(tmp_path / "a", tmp_path / "b")
    first, other = (exported_weights(tmp_path / name) for name in "ac")
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
