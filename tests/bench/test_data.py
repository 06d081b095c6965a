"""Loaders: right before fast, and what the step waits for."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from arat_fast.data.dali import has_dali
from arat_fast.display import Display
from benchmarks import data
from benchmarks.data import Loader, Options, waited
from benchmarks.harness import Bench


def tiny(tmp_path: Path, **options: Any) -> Options:
    common = {"batch_size": 2, "steps": 1, "model": "resnet8", "attack_steps": 0}
    return Options(**{**common, **options}, device="cpu", out=tmp_path / "data.json")


@pytest.mark.slow
def test_every_loader_is_measured_and_the_step_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"num_arrays": 16, "num_files": 8, "workers": (0, 1), "rounds": 2}
    assert data.run(tiny(tmp_path, batch_size=4, beside_step=True, **options)) == 0
    record = json.loads((tmp_path / "data.json").read_text())
    found = {(entry["size"], entry["contestant"]) for entry in record["results"]}
    dali = {(32, "dali"), (224, "dali")} if has_dali() else set()
    assert found == dali | {
        (32, "resident"), (32, "dataloader"), (32, "torchvision"),
        (224, "dataloader"), (224, "torchvision"),
    }  # fmt: skip
    for entry in record["results"]:
        assert len(entry["round_images_per_second"]) == 2 and entry["images_per_second"] > 0
        assert 0 <= entry["waited"] < 1 and entry["trained_images_per_second"] > 0
    table = (tmp_path / "data.md").read_text()
    assert table in capsys.readouterr().out
    assert "step waits" in table and record["problems"] == []


def test_a_slow_loader_is_waited_for() -> None:
    ready = (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))

    def slow(epoch: int):  # type: ignore[no-untyped-def]
        for _ in range(3):
            time.sleep(0.06)
            yield ready

    def step(batches: list[object]) -> None:
        time.sleep(0.02)

    loader = Loader(slow, lambda: None)
    share, rate = waited(step, loader, ready, 5, torch.device("cpu"))  # type: ignore[arg-type]
    assert 0.6 < share < 0.85 and 10 < rate < 30
    fast = Loader(lambda epoch: [ready] * 3, lambda: None)
    assert waited(step, fast, ready, 5, torch.device("cpu"))[0] < 0.3  # type: ignore[arg-type]


Batch = tuple[torch.Tensor, torch.Tensor]


class Fake:
    """Loaders that deliver one batch; which of them were stopped."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = torch.rand(2, 3, 4, 4, generator=generator), torch.tensor([0, 1])
        self.stopped: list[str] = []

    def loaders(self, **batches: Batch) -> dict[str, Any]:
        def loader(name: str, batch: Batch, workers: int) -> Loader:
            return Loader(lambda epoch: [batch], lambda: self.stopped.append(name))

        return {name: partial(loader, name, batch) for name, batch in batches.items()}


def measured(
    tmp_path: Path, loaders: dict[str, Any], beside: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Results and problems."""
    options = tiny(tmp_path, num_arrays=2, num_files=2, workers=(0,), rounds=1)
    bench = Bench("data", options, lambda record: "", Display(Console(quiet=True)))
    data.measure(bench, 32, loaders, beside)
    return bench.record["results"], bench.record["problems"]


def timed(results: list[dict[str, Any]]) -> list[str]:
    return [entry["contestant"] for entry in results if "images_per_second" in entry]


def test_a_loader_with_other_batches_is_not_timed(tmp_path: Path) -> None:
    fake = Fake()
    x, y = fake.batch
    loaders = fake.loaders(resident=(x + 0.01, y), dali=(x, y.flip(0)), dataloader=(x, y))
    results, problems = measured(tmp_path, loaders)
    assert fake.stopped == ["resident", "dali", "dataloader"] and timed(results) == ["dataloader"]
    assert "resident" in problems[0] and "2.55" in problems[0] and "dali" in problems[1]


def test_without_the_reference_nothing_of_ours_is_timed(tmp_path: Path) -> None:
    fake = Fake()

    def broken(workers: int) -> Loader:
        raise RuntimeError("no workers")

    loaders = {**fake.loaders(resident=fake.batch, torchvision=fake.batch), "dataloader": broken}
    results, problems = measured(tmp_path, loaders)
    assert timed(results) == ["torchvision"] and len(problems) == 2
    assert fake.stopped == ["resident", "torchvision"]


def test_a_loader_that_breaks_later_is_left_out(tmp_path: Path) -> None:
    fake = Fake()

    def breaks(workers: int) -> Loader:
        def epoch(number: int) -> list[Batch]:
            epochs.append(number)
            if len(epochs) > 2:
                raise RuntimeError("the pipeline broke")
            return [fake.batch]

        epochs: list[int] = []
        return Loader(epoch, lambda: fake.stopped.append("dali"))

    loaders = {**fake.loaders(dataloader=fake.batch), "dali": breaks}
    results, problems = measured(tmp_path, loaders)
    assert timed(results) == ["dataloader"] and fake.stopped == ["dali", "dataloader"]
    assert "dali" in problems[0] and "the pipeline broke" in problems[0]


@pytest.mark.parametrize("fails", ["step", "loader"])
def test_a_step_that_fails_leaves_the_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    fake = Fake()
    loaders = fake.loaders(resident=fake.batch, dataloader=fake.batch)

    def too_large(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(data, {"step": "warm", "loader": "waited"}[fails], too_large)
    results, problems = measured(tmp_path, loaders, beside=True)
    assert timed(results) == ["resident", "dataloader"] == fake.stopped
    assert not any("waited" in entry for entry in results)
    assert len(problems) == {"step": 1, "loader": 2}[fails]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"batch_size": 1}, "batch-size"),
        ({"rounds": 0}, "rounds"),
        ({"num_files": 3}, "num-files"),
        ({"workers": (-1,)}, "workers"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Options(**options)
