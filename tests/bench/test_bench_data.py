from __future__ import annotations

import json
from pathlib import Path

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
