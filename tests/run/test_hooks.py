"""What hooks are told, what of them is in a checkpoint, and when a run is evaluated."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import assert_same_end, changed, metric_lines, tiny_config, tiny_trainer

from arat_fast.distributed import Ranks
from arat_fast.evaluation.evaluate import AttackResult, ImageSet
from arat_fast.run import hooks
from arat_fast.run.hooks import Hook, MetricsLog, Remarks
from arat_fast.run.loop import train
from arat_fast.run.state import Run
from arat_fast.stop import InterruptedRun
from arat_fast.training.checkpoint import load_checkpoint


class Diary(Hook):
    """Writes down what it is told."""

    name = "diary"

    def __init__(self, stop_at: int | None = None) -> None:
        self.told: list[str] = []
        self.stop_at = stop_at

    def begin(self, run: Run) -> None:
        self.told.append(f"begin {run.progress.step}")

    def before_epoch(self, run: Run, epoch: int) -> None:
        self.told.append(f"epoch {epoch}")

    def log(self, run: Run, line: dict[str, Any]) -> None:
        self.told.append(f"{line['kind']} {line['step']}")
        if line["step"] == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def end(self, run: Run) -> None:
        self.told.append("end")

    def close(self) -> None:
        self.told.append("close")

    def state_dict(self) -> dict[str, Any]:
        return {"told": list(self.told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.told = [*state["told"], "resumed"]


def test_a_hook_of_ones_own(tmp_path: Path) -> None:
    config = changed(tiny_config(epochs=2), "train", log_every=4, eval_every=1)
    diary = Diary()
    train(config, tmp_path / "whole", hooks=[diary])
    course = ["begin 0", "epoch 0", "train 4", "eval 4", "eval 4", "epoch 1", "train 8", "end"]
    # Its own turn comes after that of the built-in ones.
    assert diary.told == [*course, "close"]
    first, second = Diary(stop_at=4), Diary()
    with pytest.raises(InterruptedRun):
        train(config, tmp_path / "cut", hooks=[first])
    state = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["hooks"]
    assert state["diary"]["told"] == course[:3] and first.told == [*course[:3], "close"]
    train(config, tmp_path / "cut", resume=True, hooks=[second])
    assert second.told == [*course[:3], "resumed", "begin 4", *course[3:], "close"]
    # Without it the run goes on all the same.
    tiny_trainer(tmp_path / "cut", config, resume=True).run()


@pytest.mark.parametrize("keep", [0, 12, 17, 1000])
def test_metrics_are_cut_but_never_padded(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    before = path.read_bytes()
    log = MetricsLog(path)
    log.load_state_dict({"bytes": keep})
    run: Any = None
    log.begin(run)
    assert path.read_bytes() == before
    log.log(run, {"step": 3})
    log.close()
    assert path.read_bytes() == before[: 12 if keep == 17 else keep] + b'{"step": 3}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_disk_under_the_metrics(tmp_path: Path) -> None:
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    run: Any = None
    log.begin(run)
    log.keep = None
    with pytest.raises(OSError, match="No space left"):
        log.log(run, {"step": 3})


def test_remarks_on_folding_and_a_young_average(tmp_path: Path) -> None:
    # The last run ends before its average begins.
    for start, decay, said in ((0.0, 0.9, True), (0.0, 0.2, False), (0.5, 0.9, False)):
        config = tiny_config(epochs=2, kind="ema", start=start, decay=decay, every=1)
        config = changed(config, "train", max_steps=4)
        config = changed(config, "attack", bn="running")
        console = Console(file=io.StringIO(), width=200)
        summary = tiny_trainer(tmp_path / f"{start}-{decay}", config, console=console).run()
        shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
        # Three of four steps came after the first one.
        assert ("73 %" in shown) == ("young average" in shown) == said
        warned = summary.get("warnings", [])
        assert any("young average" in warning for warning in warned) == said
        assert "9 BatchNorm layers folded" in shown and summary["folded_batch_norms"] == 9


def test_best_by_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([20, 20, 60, 60, 50, 50, 40, 40])

    def scored(model: object, images: ImageSet, *rest: object, **options: object) -> AttackResult:
        return AttackResult(torch.arange(100) < next(scores), images.x, {})

    monkeypatch.setattr(hooks, "pgd_accuracy", scored)
    config = changed(tiny_config(epochs=5), "train", eval_every=1, keep_best=True)
    tiny_trainer(tmp_path, config).run()
    best = load_checkpoint(tmp_path / "checkpoint-best.pt")
    # Weights and their average are scored; the average counts, which begins with the second epoch.
    assert best["progress"]["step"] == 8 and best["hooks"]["evaluation"]["best"] == 0.6
    assert load_checkpoint(tmp_path / "checkpoint.pt")["progress"]["step"] == 20


@pytest.mark.parametrize(
    ("eps", "grows", "whole"), [(8 / 255, "2.7/255", "8/255"), (0.03, "0.01", "0.03")]
)
def test_an_evaluation_says_its_radius_while_that_of_the_training_grows(
    tmp_path: Path, eps: float, grows: str, whole: str
) -> None:
    console = Console(file=io.StringIO(), width=200)
    config = changed(tiny_config(epochs=2, kind="none"), "train", eval_every=1)
    config = changed(config, "attack", eps=eps, eps_warmup=2)
    tiny_trainer(tmp_path, config, console=console).run()
    said = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert f"robust at eps {grows} " in said
    assert re.search(rf"epoch 1  40 val images: clean \S+  PGD-1 at eps {whole} [\d.]+%\n", said)


class Killed(Hook):
    def before_epoch(self, run: Run, epoch: int) -> None:
        if epoch == 1:
            raise RuntimeError("killed")


@pytest.mark.slow
def test_an_evaluation_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best checkpoint is written after it; a run that is killed then goes on behind it."""
    config = changed(tiny_config(epochs=3), "train", eval_every=1, keep_best=True)
    tiny_trainer(tmp_path / "whole", config).run()
    with pytest.raises(RuntimeError, match="killed"):
        tiny_trainer(tmp_path / "cut", config, hooks=[Killed()]).run()
    assert len(metric_lines(tmp_path / "cut", "eval")) == 2
    pgd, calls = hooks.pgd_accuracy, []

    def counting(*args: Any, **options: Any) -> AttackResult:
        calls.append(1)
        return pgd(*args, **options)

    monkeypatch.setattr(hooks, "pgd_accuracy", counting)
    tiny_trainer(tmp_path / "cut", config, resume=True).run()
    assert len(calls) == 2
    assert metric_lines(tmp_path / "cut", "eval") == metric_lines(tmp_path / "whole", "eval")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    tiny_trainer(out, tiny_config(epochs=3)).run()
    return out


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2])
def test_signal_during_an_evaluation(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The evaluation, of the weights or of their average, is made again when the run goes on."""
    config = tiny_config(epochs=3)
    pgd, calls = hooks.pgd_accuracy, []

    def interrupted(*args: Any, **options: Any) -> AttackResult:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return pgd(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hooks, "pgd_accuracy", interrupted)
        with pytest.raises(InterruptedRun, match="step 8 of 12") as stopped:
            tiny_trainer(tmp_path / "cut", config).run()
    assert stopped.value.exit_code == 75
    tiny_trainer(tmp_path / "cut", config, resume=True).run()
    lines = metric_lines(whole, "eval")
    assert len(lines) == 2 and metric_lines(tmp_path / "cut", "eval") == lines
    assert_same_end(whole, tmp_path / "cut")


def test_best_needs_validation_images(tmp_path: Path) -> None:
    """Held out, or of a dataset of one's own, as is known when it is read."""
    config = changed(tiny_config(), "train", eval_every=1)
    with pytest.raises(ValueError, match=r"data\.num_val"):
        tiny_trainer(
            tmp_path / "digits",
            changed(changed(config, "data", num_val=0), "train", keep_best=True),
        )
    with pytest.raises(ValueError, match=r"train\.eval_every"):
        changed(config, "train", eval_every=0, keep_best=True)
    for split in ("train", "val", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        np.save(tmp_path / "set" / split / "images.npy", np.zeros((64, 8, 8, 3), np.uint8))
        np.save(tmp_path / "set" / split / "labels.npy", np.arange(64) % 10)
    config = changed(config, "data", name="arrays", root=tmp_path / "set", num_val=0, batch_size=32)
    config = changed(config, "train", keep_best=True)
    assert tiny_trainer(tmp_path / "run", config).data.val is not None
    shutil.rmtree(tmp_path / "set" / "val")
    with pytest.raises(ValueError, match=r"data\.num_val"):
        tiny_trainer(tmp_path / "other", config)


@pytest.mark.parametrize(("sync", "batch", "few"), [(False, 32, 1), (True, 32, 0), (False, 64, 0)])
def test_few_images_of_a_process_are_said(sync: bool, batch: int, few: int, tmp_path: Path) -> None:
    config = changed(tiny_config(), "distributed", sync_bn=sync)
    config = changed(config, "data", batch_size=batch, num_val=1200)
    run = tiny_trainer(tmp_path, config)
    # As if a second process had the other half of batches twice as large.
    run.ranks = Ranks(0, 2)
    Remarks().begin(run)
    assert len(run.warnings) == few
    assert all("--distributed.sync-bn" in warning for warning in run.warnings)


@pytest.mark.parametrize(
    ("speeds", "threads", "said"),
    [
        ([800, 100, 100, 100], 2, True),
        ([800, 100, 100, 300, 100], 2, False),
        ([800, 100, 100, 100], 1, False),
    ],
)
def test_a_slowdown_is_said(
    speeds: list[int], threads: int, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    console = Console(file=io.StringIO(), width=300)
    run, hook = tiny_trainer(tmp_path, tiny_config(), console=console), Remarks()
    for speed in speeds:
        hook.log(run, {"images_per_second": speed})
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert ("OMP_NUM_THREADS=1 is faster" in shown) == said
