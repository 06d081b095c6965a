"""The training step's contestants: turns, memory, correctness, records and tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from arat_fast.display import Display
from benchmarks import correctness, harness, step
from benchmarks.contestants import Contestant, choose
from benchmarks.harness import Bench, Options
from benchmarks.table import step_tables
from benchmarks.turns import best_baselines, take_turns
from benchmarks.workload import Workload, forward_flops

CPU = torch.device("cpu")
RATES = {
    "copy_bytes_per_second": 1e10,
    "matmul_flops_per_second": 1e12,
    "matmul_dtype": "float32",
    "peak_flops_per_second": 2e12,
}


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "rates", lambda device: dict(RATES))


def tiny(out: Path, **options: Any) -> step.Options:
    common = {"model": "resnet8", "image_sizes": (8,), "num_steps": (1,), "batch_sizes": (4,)}
    return step.Options(**{**common, "device": "cpu", "out": out, **options})


Build = Callable[[Workload, torch.device], Any]


def measured(tmp_path: Path, **builds: Build) -> tuple[list[dict[str, Any]], Bench[Any]]:
    """The entries of contestants of this package that are built so."""
    options = Options(device="cpu", out=tmp_path / "record.json", rounds=2)
    bench = Bench("step", options, str, Display(Console(quiet=True)))
    contestants = {n: Contestant(n, n, build, "batch", ours=True) for n, build in builds.items()}
    workload = Workload("resnet8", batch_size=2, image_size=8)
    return take_turns(bench, contestants, workload, steps=1), bench


@pytest.mark.slow
def test_who_does_not_fit_beside_the_others_runs_alone(tmp_path: Path) -> None:
    alive: set[str] = set()

    class Greedy:
        def __init__(self, name: str, most_others: int) -> None:
            if len(alive) > most_others:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            self.name = name
            alive.add(name)

        def __call__(self, batches: object) -> None: ...

        def __del__(self) -> None:
            alive.discard(getattr(self, "name", ""))

    found, bench = measured(
        tmp_path,
        small=lambda *_: Greedy("small", 9),
        large=lambda *_: Greedy("large", 0),
        huge=lambda *_: Greedy("huge", -1),
    )
    assert {e["contestant"]: (e["status"], e.get("group")) for e in found} == {
        "small": ("measured", 0),
        "large": ("measured", 1),
        "huge": ("out of memory", None),
    }
    assert not bench.record["problems"] and not alive


def test_a_failing_contestant_costs_the_others_nothing(tmp_path: Path) -> None:
    def broken(workload: Workload, device: torch.device) -> Any:
        raise TypeError("no such kernel\nhere")

    found, bench = measured(tmp_path, slow=broken, fast=lambda *_: lambda batches: None)
    assert [entry["status"] for entry in found] == ["failed", "measured"]
    (problem,) = bench.record["problems"]
    assert problem.startswith("slow") and "no such kernel" in problem


@pytest.mark.slow
def test_record_and_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches of four images: bfloat16 is coarse for their statistics.
    monkeypatch.setattr(correctness, "ROUNDING", 0.2)
    out = tmp_path / "step.json"
    names = ("naive", "fast", "fast-folded")
    sizes = {"batch_sizes": (4, 2), "num_steps": (1, 0)}
    assert step.run(tiny(out, contestants=names, rounds=2, **sizes)) == 0
    record = json.loads(out.read_text())
    base = {axis: record["settings"][axis] for axis in ("batch_size", "num_steps")}
    assert base == {"batch_size": 4, "num_steps": 1}
    departures = [
        {axis: entry[axis] for axis in base if entry[axis] != base[axis]}
        for entry in record["results"]
        if entry["contestant"] == "naive"
    ]
    assert departures == [{}, {"batch_size": 2}, {"num_steps": 0}]
    for entry in record["results"]:
        assert entry["status"] == "measured" and len(entry["round_seconds_per_step"]) == 2
        rate = entry["batch_size"] / entry["seconds_per_step"]
        assert entry["images_per_second"] == pytest.approx(rate)
        share = rate * entry["flops_per_image"] / RATES["matmul_flops_per_second"]
        assert entry["share_of_matmul"] == pytest.approx(share) == 2 * entry["mfu"]
        assert set(entry["speed_up"]) == {"naive"} and entry["processor_seconds_per_step"] > 0
    naive, fast = record["results"][:2]
    for ratio, time in (
        ("speed_up", "seconds_per_step"),
        ("speed_up_in_processor_time", "processor_seconds_per_step"),
    ):
        assert naive[ratio]["naive"] == 1
        assert fast[ratio]["naive"] == pytest.approx(naive[time] / fast[time])
    assert [entry["contestant"] for entry in record["correctness"]] == ["fast", "fast-folded"]
    assert all(len(e["losses"]) == 3 and e["within"] for e in record["correctness"])
    assert {entry["contestant"] for entry in record["profile"]} == {"fast", "fast-folded"}
    assert not record["problems"]
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out and "| 4 | 1 | fast-folded |" in text


@pytest.mark.slow
def test_losses_over_budget_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = correctness.Reference([1.0, 2.0], [1.1, 2.0])
    assert far.budget == pytest.approx(2 * 0.05 + 0.01)
    monkeypatch.setattr(step, "reference_losses", lambda *_: far)
    out = tmp_path / "step.json"
    assert step.run(tiny(out, contestants=("fast",), rounds=1, profile=())) == 1
    assert "budget 0.11" in json.loads(out.read_text())["problems"][0]
    assert "**over budget**" in out.with_suffix(".md").read_text()


def test_a_device_that_computes_nothing_follows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "_losses", lambda *_: [0.0, 0.0])
    workload = Workload("resnet8", batch_size=4, image_size=8, num_steps=1)
    nothing = correctness.Reference([0.0, 0.0], [0.0, 0.0])
    fast = choose(("fast",), CPU, None)["fast"]
    entry = correctness.compare_losses(fast, workload, CPU, nothing)
    assert not entry["within"] and entry["losses"] == entry["reference"] == [0.0, 0.0]


def test_the_float32_step_follows_itself() -> None:
    workload = Workload("resnet8", batch_size=4, image_size=8, num_steps=1)
    reference = correctness.reference_losses("batch", workload, CPU, 2)
    again = correctness.reference_losses("batch", workload, CPU, 2)
    assert reference == again
    assert reference.rounded != reference.losses and reference.budget < 0.1


def test_who_had_no_room_is_in_the_table() -> None:
    sizes = {"batch_size": 128, "image_size": 32, "num_steps": 10}
    measured = {
        **sizes, "contestant": "fast", "ours": True, "status": "measured", "mfu": 0.36,
        "images_per_second": 12345.6, "spread": 0.01, "share_of_matmul": 0.45,
        "peak_memory_bytes": 3 * 2**30, "speed_up": {"naive": 4.2}, "seconds_per_step": 0.01,
    }  # fmt: skip
    gone = {**sizes, "contestant": "naive", "ours": False, "status": "out of memory"}
    record = {
        "date": "2026-01-01", "problems": ["x: y"], "correctness": [], "profile": [],
        "rates": RATES,
        "machine": {"device": "Card", "type": "cuda", "driver": "580", "clocks": "c",
                    "versions": {"torch": "2.11"}, "commit": "0123456789ab-dirty"},
        "settings": {**sizes, "model": "resnet18", "rounds": 3, "steps": 20, "contestants": {}},
        "results": [measured, gone | {"batch_size": 1024}],
    }  # fmt: skip
    text = step_tables(record)
    assert "| 128 | fast | 12,346 | 1.0% | 36.0% | 45.0% | 3.00 GiB | 4.20 | not compared |" in text
    assert "| 1024 | naive | out of memory | – | – | – | – | – | – |" in text
    assert "commit 0123456789ab-dirty" in text and "- x: y" in text


def test_the_fastest_compiled_baseline_counts() -> None:
    def entry(name: str, seconds: float, status: str = "measured") -> dict[str, Any]:
        return {"contestant": name, "ours": name == "fast", "status": status,
                "seconds_per_step": seconds}  # fmt: skip

    found = [entry("compiled", 3.0), entry("compiled-graphs", 2.0), entry("naive", 9.0),
             entry("official", 1.0, "failed"), entry("fast", 1.0)]  # fmt: skip
    assert best_baselines(found) == {"compiled": 2.0, "naive": 9.0}


@pytest.mark.parametrize(("model", "gmac"), [("resnet18", 0.555), ("wrn34-10", 6.66)])
def test_flops_are_counted_from_the_network(model: str, gmac: float) -> None:
    flops = forward_flops(Workload(model))
    assert flops == pytest.approx(2e9 * gmac, rel=0.01)
    assert Workload(model).forward_equivalents == 26
    assert forward_flops(Workload(model, image_size=64)) == pytest.approx(4 * flops, rel=0.01)


def test_default_contestants_of_the_cpu() -> None:
    assert list(choose((), CPU, None)) == ["naive", "tuned", "fast", "fast-folded"]
    assert list(choose(("fast", "compiled"), CPU, None)) == ["compiled", "fast"]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: choose(("nave",), CPU, None), "naive"),
        (lambda: choose(("official",), CPU, None), "--official"),
        (lambda: choose(("fast-eager",), CPU, None), "GPU"),
        (lambda: step.Options(profile=("nave",)), "nave"),
        (lambda: step.Options(steps=0), "steps"),
        (lambda: Workload("resnet50"), "resnet50"),
        (lambda: Workload(batch_size=1), "batch_size"),
    ],
)
def test_what_cannot_be_met_is_named(make: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make()
