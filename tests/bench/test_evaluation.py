"""The benchmark of AutoAttack's fast path: the record, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import tiny_config, tiny_trainer

from arat_fast.bench import evaluation as module
from arat_fast.bench.evaluation import EvalBenchOptions, bench_eval
from arat_fast.display import Display


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has seen 237 digits once."""
    out = tmp_path_factory.mktemp("bench") / "run"
    tiny_trainer(out, tiny_config(epochs=1)).run()
    return out


def bench(run: Path, out: Path, **options: object) -> int:
    options = {"max_samples": 12, "device": "cpu", "out": out, **options}
    return bench_eval(
        EvalBenchOptions((run,), **options),  # type: ignore[arg-type]
        Display(Console(quiet=True)),
    )


def test_record(run: Path, tmp_path: Path) -> None:
    out, threads = tmp_path / "record.json", torch.get_num_threads()
    assert bench(run, out, fast_only=True, threads=1) == 0
    assert torch.get_num_threads() == threads
    record = json.loads(out.read_text())
    (entry,) = record["results"]
    assert record["machine"]["threads"] == 1
    assert entry["num_samples"] == entry["fast"]["num_samples"] == 12
    assert "speedup" not in entry and entry["fast_seconds"] > 0
    assert len(entry["fast_round_seconds"]) == 2
    assert sum(entry["fast_seconds_by_attack"].values()) <= entry["fast_seconds"]


@pytest.mark.parametrize("differs", [False, True])
def test_different_robust_sets_fail(
    run: Path, tmp_path: Path, differs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.run_autoattack
    monkeypatch.setattr(
        module, "run_autoattack", lambda *a, **k: real(*a, **k, attacks=("apgd-ce",))
    )
    robust = real(*_network(run), batch_size=500, attacks=("apgd-ce",)).correct
    if differs:
        robust[3] = ~robust[3]
    monkeypatch.setattr(module, "reference_robust", lambda *_: robust)
    out = tmp_path / "record.json"
    assert bench(run, out) == int(differs)
    (entry,) = json.loads(out.read_text())["results"]
    assert entry["num_different"] == int(differs)
    if differs:
        assert "speedup" not in entry
    else:
        assert entry["speedup"] == entry["plain_seconds"] / entry["fast_seconds"]


def _network(run: Path):  # type: ignore[no-untyped-def]
    saved = module.read_saved(run, recipe=None, with_config=True)
    config = saved.config
    assert config is not None
    device = torch.device("cpu")
    data = module.load_data(config.data, device=device, seed=0, eval_batch_size=500)
    images = module.ImageSet.from_batches(data.test, 12)
    model = module.place_network(saved, config, data, device)
    return model, images, module.ThreatModel(config.attack.eps)


def test_the_reference_code_is_pyautoattack(run: Path) -> None:
    model, images, threat = _network(run)
    robust = module.reference_robust(model, images, module.ThreatModel(0.6), 12, 0)
    plain = module.run_autoattack(
        model, images, module.ThreatModel(0.6), batch_size=12, fast=False
    ).correct
    assert torch.equal(robust, plain)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_options() -> None:
    with pytest.raises(ValueError, match="after bench eval, got nothing"):
        EvalBenchOptions(())
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        EvalBenchOptions((Path("run"),), rounds=0)
    with pytest.raises(ValueError, match="threads >= 0"):
        EvalBenchOptions((Path("run"),), threads=-1)
