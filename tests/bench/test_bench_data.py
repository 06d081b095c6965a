from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from arat_fast.bench.data import DataOptions, Loader, bench_data, waited
from arat_fast.data.dali import has_dali


def test_every_loader_is_measured_and_the_step_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = DataOptions(
        batch_size=4,
        num_arrays=16,
        num_files=8,
        workers=(0, 1),
        rounds=2,
        beside_step=True,
        steps=1,
        model="resnet8",
        attack_steps=0,
        device="cpu",
        out=tmp_path / "data.json",
    )
    assert bench_data(options) == 0
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
    import time

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


def run_fake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaders: dict[str, Any], beside_step: bool
) -> tuple[int, dict[str, Any], str]:
    """Exit code, record and table of the loaders in the place of those of arrays."""
    monkeypatch.setattr("arat_fast.bench.data.array_loaders", lambda *_: loaders)
    monkeypatch.setattr("arat_fast.bench.data.file_loaders", lambda *_: {})
    code = bench_data(
        DataOptions(
            batch_size=2,
            num_arrays=2,
            num_files=2,
            workers=(0,),
            rounds=1,
            beside_step=beside_step,
            steps=1,
            model="resnet8",
            device="cpu",
            out=tmp_path / "data.json",
        )
    )
    record = json.loads((tmp_path / "data.json").read_text())
    return code, record, (tmp_path / "data.md").read_text()


def test_a_loader_with_other_batches_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    x, y = fake.batch
    waits: list[torch.device] = []
    monkeypatch.setattr("arat_fast.bench.data.synchronize", waits.append)
    loaders = fake.loaders(resident=(x + 0.01, y), dali=(x, y.flip(0)), dataloader=(x, y))
    code, record, table = run_fake(tmp_path, monkeypatch, loaders, beside_step=False)
    assert code == 1 and fake.stopped == ["resident", "dali", "dataloader"]
    timed = [e["contestant"] for e in record["results"] if "images_per_second" in e]
    assert timed == ["dataloader"] and "| resident |" not in table
    assert [problem.partition(":")[0] for problem in record["problems"]] == [
        "resident at 32 pixels",
        "dali at 32 pixels",
    ]
    assert "the mean difference is 2.55 levels of 255" in record["problems"][0]
    # Two epochs of each with its number of workers, one round of what is timed.
    assert len(waits) == 7


def test_without_the_reference_nothing_of_ours_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()

    def broken(workers: int) -> Loader:
        raise RuntimeError("no workers")

    loaders = fake.loaders(resident=fake.batch, torchvision=fake.batch)
    loaders["dataloader"] = broken
    code, record, _ = run_fake(tmp_path, monkeypatch, loaders, beside_step=False)
    assert code == 1 and fake.stopped == ["resident", "torchvision"]
    timed = [e["contestant"] for e in record["results"] if "images_per_second" in e]
    assert timed == ["torchvision"]
    assert record["problems"] == [
        "dataloader at 32 pixels: RuntimeError: no workers",
        "resident at 32 pixels: there is no batch of dataloader to compare its own with; it was "
        "not timed",
    ]


def test_a_comparison_that_fails_costs_one_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    epochs = 0

    def fails(workers: int) -> Loader:
        def epoch(number: int) -> list[Batch]:
            nonlocal epochs
            epochs += 1
            if epochs == 3:
                raise RuntimeError("the pipeline broke")
            return [fake.batch]

        return Loader(epoch, lambda: fake.stopped.append("dali"))

    loaders = {**fake.loaders(resident=fake.batch, dataloader=fake.batch), "dali": fails}
    code, record, _ = run_fake(tmp_path, monkeypatch, loaders, beside_step=False)
    assert code == 1 and fake.stopped == ["dali", "resident", "dataloader"]
    timed = [e["contestant"] for e in record["results"] if "images_per_second" in e]
    assert timed == ["resident", "dataloader"]
    assert record["problems"] == [
        "dali at 32 pixels, its first batch: RuntimeError: the pipeline broke",
        "dali at 32 pixels: its first batch cannot be compared; it was not timed",
    ]


def test_a_step_that_fails_leaves_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()

    def fail(run: Any, loader: Loader, *_: Any) -> tuple[float, float]:
        if not fake.stopped and not failed:
            failed.append(loader)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.25, 8.0

    failed: list[Loader] = []
    monkeypatch.setattr("arat_fast.bench.data.waited", fail)
    monkeypatch.setattr("arat_fast.bench.data.warm", lambda *_: None)
    loaders = fake.loaders(resident=fake.batch, dataloader=fake.batch)
    code, record, table = run_fake(tmp_path, monkeypatch, loaders, beside_step=True)
    assert code == 1 and fake.stopped == ["resident", "dataloader"]
    assert ["waited" in entry for entry in record["results"]] == [False, True]
    assert record["problems"] == [
        "resident at 32 pixels, beside the step: OutOfMemoryError: CUDA out of memory"
    ]
    assert "| 32 | resident |" in table and "25.0 %" in table

    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("arat_fast.bench.data.warm", too_large)
    code, record, table = run_fake(tmp_path, monkeypatch, loaders, beside_step=True)
    assert code == 1 and "| 32 | dataloader |" in table
    assert record["problems"][0].startswith("the step at 32 pixels: OutOfMemoryError")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "--batch_size must be >= 2, got 1"),
        ({"rounds": 0}, "--rounds must be >= 1"),
        ({"num_files": 3}, "--num_files must be at least one batch of 128, got 3"),
        ({"workers": (-1,)}, "--workers must be >= 0, got -1"),
    ],
)
def test_bad_options_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_data(DataOptions(**options))  # type: ignore[arg-type]
