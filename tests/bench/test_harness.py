"""Turns, records and the machine: what every benchmark does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from arat_fast.display import Display
from benchmarks import harness, machine
from benchmarks.harness import Bench, Options, alternate, command, spread, unused

CPU = torch.device("cpu")


def test_contestants_take_turns() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            if name == "b" and order.count("b") == 2:
                raise RuntimeError("broken")
            return float(len(order))

        return run

    values, failures = alternate({name: call(name) for name in "abc"}, 3)
    assert "".join(order) == "abcabcac"
    assert values == {"a": [1, 4, 7], "c": [3, 6, 8]}
    assert failures == {"b": {"status": "failed", "reason": "RuntimeError: broken"}}
    assert spread([1.0, 2.0, 4.0]) == 1.5


def test_a_record_grows_on_disk_and_an_error_is_a_problem(tmp_path: Path) -> None:
    options = Options(device="cpu", out=tmp_path / "new" / "record.json")
    bench = Bench("some", options, lambda r: f"{len(r['results'])}", Display(Console(quiet=True)))
    bench.save()
    assert bench.path.with_suffix(".md").read_text() == "0"
    with bench.guarded("a loader"):
        raise RuntimeError("no\nworkers")
    bench.record["results"].append({"status": "failed"})
    assert bench.finish() == 1
    record = json.loads(bench.path.read_text())
    assert "no workers" in record["problems"][0]
    assert {"device", "driver", "clocks", "versions", "commit"} <= set(record["machine"])
    assert bench.path.with_suffix(".md").read_text() == "1"


def test_the_gpu_that_is_named_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(harness, "resolve_device", torch.device)
    monkeypatch.setattr(harness, "describe_device", str)
    monkeypatch.setattr(harness, "describe_machine", lambda device: {})
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cpu", "cuda", "cuda:1"):
        Bench("some", Options(device=name, out=tmp_path / "some.json"), str)
    assert current == [torch.device("cuda:1")]


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for name in ("step.json", "step-2.json", "step-3.json"):
        path = unused(folder, "step")
        assert path == folder / name
        path.touch()


def test_rates_of_the_machine() -> None:
    assert machine.copy_bandwidth(CPU, 2**22) > 1e8
    assert machine.matmul_rate(CPU, torch.float32, 64) > 1e6


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["--rounds", "0"], "rounds"), (["--out", "/"], "--out"), (["--device", "gpu"], "gpu")],
)
def test_what_cannot_be_met_exits_with_2(
    arguments: list[str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["some", *arguments])

    def run(options: Options) -> int:
        return Bench("some", options, str).finish()

    with pytest.raises(SystemExit) as stop:
        raise SystemExit(command(Options, run, "some"))
    assert stop.value.code == 2 and name in capsys.readouterr().err
