"""The benchmark of AutoAttack's fast path: the record, and the exit status."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import changed, tiny_config, tiny_trainer

from arat_fast.display import Display
from arat_fast.evaluation import ImageSet, ThreatModel
from benchmarks import evaluation as module
from benchmarks.evaluation import Options
from benchmarks.harness import Bench

QUIET = Display(Console(quiet=True))


def network() -> tuple[torch.nn.Module, ImageSet]:
    """A linear network, right about most of twelve images."""
    source = torch.Generator().manual_seed(0)
    x = torch.rand(12, 1, 4, 4, generator=source)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(5, 16, generator=source))
        y = model(x).argmax(dim=1)
    y[0] = (y[0] + 1) % 5
    return model, ImageSet(x, y, tuple("abcde"))


def measured(tmp_path: Path, eps: float = 0.05, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The entry and the problems."""
    given = Options((tmp_path,), device="cpu", out=tmp_path / "record.json", **options)
    bench = Bench("eval", given, lambda record: "", QUIET)
    return module.measure(bench, *network(), ThreatModel(eps)), bench.record["problems"]


@pytest.fixture
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = importlib.import_module(module.run_autoattack.__module__)
    monkeypatch.setattr(attack, "NUM_QUERIES", 100)


@pytest.mark.slow
def test_record(tmp_path: Path, few_queries: None) -> None:
    tiny_trainer(tmp_path / "run", changed(tiny_config(1), "data", num_val=1200)).run()
    out = tmp_path / "record.json"
    options = Options((tmp_path / "run",), fast_only=True, max_samples=12, device="cpu", out=out)
    assert module.run(options, QUIET) == 0
    record = json.loads(out.read_text())
    (entry,) = record["results"]
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert entry["num_samples"] == entry["fast"]["num_samples"] == 12
    assert "speedup" not in entry and entry["fast_seconds"] > 0
    assert "| run | 12 |" in out.with_suffix(".md").read_text()


def test_every_round_has_its_own_seconds_by_attack(tmp_path: Path) -> None:
    entry, problems = measured(tmp_path, 0.2, fast_only=True, rounds=2)
    assert not problems and len(entry["fast_round_seconds"]) == 2
    rounds = zip(entry["fast_round_seconds"], entry["fast_round_seconds_by_attack"], strict=True)
    for seconds, by_attack in rounds:
        assert by_attack and 0 < sum(by_attack.values()) <= seconds


@pytest.mark.slow
@pytest.mark.parametrize("differs", [False, True])
def test_different_robust_sets_fail(
    tmp_path: Path, differs: bool, monkeypatch: pytest.MonkeyPatch, few_queries: None
) -> None:
    model, images = network()
    robust = module.run_autoattack(model, images, ThreatModel(0.05), batch_size=500).correct
    if differs:
        robust[3] = ~robust[3]
    monkeypatch.setattr(module, "reference_robust", lambda *_: robust)
    entry, problems = measured(tmp_path)
    assert entry["num_different"] == len(problems) == int(differs)
    if differs:
        assert "speedup" not in entry
    else:
        assert entry["speedup"] == entry["plain_seconds"] / entry["fast_seconds"]


@pytest.mark.slow
def test_the_reference_code_is_pyautoattack() -> None:
    model, images = network()
    threat = ThreatModel(0.05)
    robust = module.reference_robust(model, images, threat, 12, 0)
    plain = module.run_autoattack(model, images, threat, batch_size=12, fast=False).correct
    assert 0 < robust.sum() < 12 and torch.equal(robust, plain)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_run_is_expected() -> None:
    with pytest.raises(ValueError, match="checkpoint"):
        Options(())
