"""``arat-fast bench``: turns, memory, records, tables, plots and what it refuses."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from arat_fast.bench import correctness, machine, scaling, step
from arat_fast.bench.contestants import Contestant, best_baselines, choose
from arat_fast.bench.measure import PeakMemory, alternate, cudnn_settings, spread
from arat_fast.bench.table import step_tables
from arat_fast.bench.workload import Workload
from arat_fast.cli import main
from arat_fast.display import Display

CPU = torch.device("cpu")
TINY = ["--model", "resnet8", "--image-size", "8", "--num-steps", "1", "--batch-sizes", "4"]
RATES = {
    "copy_bytes_per_second": 1e10,
    "matmul_flops_per_second": 1e12,
    "matmul_dtype": "float32",
    "peak_flops_per_second": 2e12,
}
PNG = b"\x89PNG\r\n"


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "rates", lambda device: dict(RATES))


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


def test_settings_of_cudnn_are_put_back() -> None:
    backend = torch.backends.cudnn
    before = backend.benchmark, backend.deterministic
    with cudnn_settings(benchmark=True, deterministic=True):
        assert backend.benchmark and backend.deterministic
    assert (backend.benchmark, backend.deterministic) == before


def test_peak_memory_sees_what_was_freed() -> None:
    memory = PeakMemory(CPU)
    torch.ones(64 * 2**20, dtype=torch.uint8).sum()
    peak = memory.read()
    assert peak is None or 60 * 2**20 < peak < 2**30


def plan_of(contestants: Sequence[Contestant]) -> step.Plan:
    return step.Plan(
        device=CPU,
        workloads=(Workload("resnet8", batch_size=2, image_size=8),),
        contestants={contestant.name: contestant for contestant in contestants},
        rounds=2,
        steps=1,
        graph="off",
        compile_last_only=False,
        check_batch=2,
        check_steps=1,
    )


def record_of() -> dict[str, Any]:
    return {
        "rates": dict(RATES),
        "flops": {"step_per_image": 1e6},
        "results": [],
        "problems": [],
    }


def test_who_does_not_fit_beside_the_others_runs_alone() -> None:
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

    def contestant(name: str, most_others: int) -> Contestant:
        return Contestant(name, name, lambda *_: Greedy(name, most_others), "batch", ours=True)

    plan = plan_of([contestant("small", 9), contestant("large", 0), contestant("huge", -1)])
    record = record_of()
    step.measure_workload(plan, plan.workloads[0], record, Display())
    status = {e["contestant"]: (e["status"], e.get("group")) for e in record["results"]}
    assert status == {
        "small": ("measured", 0),
        "large": ("measured", 1),
        "huge": ("out of memory", None),
    }
    assert not record["problems"] and not alive


def test_a_failing_contestant_costs_the_others_nothing() -> None:
    def broken(workload: Workload, device: torch.device) -> Any:
        raise TypeError("no such kernel\nhere")

    plan = plan_of(
        [
            Contestant("naive", "", broken, "batch"),
            Contestant("fast", "", lambda *_: lambda batches: None, "batch", ours=True),
        ]
    )
    record = record_of()
    step.measure_workload(plan, plan.workloads[0], record, Display())
    assert [entry["status"] for entry in record["results"]] == ["failed", "measured"]
    assert record["problems"] == ["naive at batch 2: TypeError: no such kernel here"]


def test_record_table_and_plot_of_a_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches of four images: bfloat16 is coarse for their statistics.
    monkeypatch.setattr(correctness, "ROUNDING", 0.2)
    out = tmp_path / "new" / "step.json"
    names = ["naive", "tuned", "fast", "fast-folded"]
    assert main(["bench", "step", *TINY, "--contestants", *names, "--rounds", "2",
                 "--out", str(out), "--device", "cpu"]) == 0  # fmt: skip
    printed = capsys.readouterr()
    assert "turn 2/2" in printed.err
    record = json.loads(out.read_text())
    assert set(record) == {
        "kind", "date", "seconds", "machine", "rates", "settings", "flops", "results",
        "correctness", "profile", "roofline", "problems",
    }  # fmt: skip
    assert {"device", "driver", "clocks", "versions", "commit", "dirty"} <= set(record["machine"])
    assert record["flops"]["step_per_image"] == 8 * record["flops"]["forward_per_image"]
    results = {entry["contestant"]: entry for entry in record["results"]}
    assert list(results) == names
    for entry in results.values():
        assert entry["status"] == "measured" and len(entry["round_seconds_per_step"]) == 2
        assert entry["images_per_second"] == pytest.approx(4 / entry["seconds_per_step"])
        assert entry["mfu"] == pytest.approx(entry["share_of_matmul"] / 2)
        assert set(entry["speed_up"]) == {"naive", "tuned"}
        assert entry["processor_seconds_per_step"] > 0
    assert results["naive"]["speed_up"]["naive"] == 1
    assert results["fast"]["speed_up_in_processor_time"]["naive"] == pytest.approx(
        results["naive"]["processor_seconds_per_step"]
        / results["fast"]["processor_seconds_per_step"]
    )
    assert results["fast"]["speed_up"]["naive"] == pytest.approx(
        results["naive"]["seconds_per_step"] / results["fast"]["seconds_per_step"]
    )
    assert [entry["contestant"] for entry in record["correctness"]] == ["fast", "fast-folded"]
    assert all(len(e["losses"]) == 3 and e["within"] for e in record["correctness"])
    assert {entry["contestant"] for entry in record["profile"]} == {"fast", "fast-folded"}
    assert record["roofline"]["layers"] and not record["problems"]
    text = out.with_suffix(".md").read_text()
    assert text in printed.out and "| 4 | fast-folded |" in text and "Layer by layer" in text
    assert "In processor time, which other jobs on the machine disturb less: fast at" in text
    assert out.with_suffix(".png").read_bytes().startswith(PNG)


def test_losses_over_budget_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = correctness.Reference([1.0, 2.0], [1.1, 2.0])
    assert far.budget == pytest.approx(2 * 0.05 + 0.01)
    monkeypatch.setattr(step, "reference_losses", lambda *_: far)
    out = tmp_path / "step.json"
    arguments = ["--contestants", "fast", "--rounds", "1", "--no-roofline", "--profile"]
    assert main(["bench", "step", *TINY, *arguments, "--out", str(out), "--device", "cpu"]) == 1
    record = json.loads(out.read_text())
    assert record["problems"][0].endswith("from the float32 step's, budget 11.0%")
    assert "**over budget**" in out.with_suffix(".md").read_text()


def test_the_float32_step_follows_itself() -> None:
    workload = Workload("resnet8", batch_size=4, image_size=8, num_steps=1)
    reference = correctness.reference_losses("batch", workload, CPU, 2)
    again = correctness.reference_losses("batch", workload, CPU, 2)
    assert reference == again
    assert reference.rounded != reference.losses and reference.budget < 0.1


def test_the_table_of_several_sizes_names_who_had_no_room() -> None:
    measured = {
        "contestant": "fast", "ours": True, "batch_size": 128, "status": "measured",
        "images_per_second": 12345.6, "spread": 0.01, "mfu": 0.36, "share_of_matmul": 0.45,
        "peak_memory_bytes": 3 * 2**30, "speed_up": {"naive": 4.2}, "seconds_per_step": 0.01,
    }  # fmt: skip
    gone = {"contestant": "naive", "ours": False, "batch_size": 1024, "status": "out of memory"}
    record = {
        "date": "2026-01-01", "problems": ["x: y"], "correctness": [], "profile": [],
        "roofline": None, "rates": RATES | {"peak_flops_per_second": 989e12},
        "machine": {"device": "Card", "type": "cuda", "driver": "580", "clocks": "c",
                    "versions": {"torch": "2.11"}, "commit": "0123456789abcdef", "dirty": True},
        "settings": {"model": "resnet18", "num_steps": 10, "image_size": 32, "rounds": 3,
                     "steps": 20, "contestants": {"fast": "ours"}},
        "flops": {"forward_equivalents": 26, "step_per_image": 28.9e9},
        "results": [measured, gone],
    }  # fmt: skip
    text = step_tables(record)
    assert "| 128 | fast | 12,346 | 1.0% | 36.0% | 45.0% | 3.00 GiB | 4.20 | not compared |" in text
    assert "| 1024 | naive | out of memory | – | – | – | – | – | – |" in text
    assert "commit 0123456789ab with local changes" in text and "989 TFLOP/s" in text
    assert "- x: y" in text


def test_the_fastest_compiled_baseline_counts() -> None:
    def entry(name: str, seconds: float, status: str = "measured") -> dict[str, Any]:
        return {"contestant": name, "ours": name == "fast", "status": status,
                "seconds_per_step": seconds}  # fmt: skip

    found = [entry("compiled", 3.0), entry("compiled-graphs", 2.0), entry("naive", 9.0),
             entry("official", 1.0, "failed"), entry("fast", 1.0)]  # fmt: skip
    assert best_baselines(found) == {"compiled": 2.0, "naive": 9.0}


def test_scaling_varies_one_thing_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scaling.json"
    options = scaling.ScalingOptions(
        "resnet8", ("fast",), (2, 4), (8,), (1,), (0.25,), base_batch_size=2, device="cpu", out=out
    )
    assert scaling.bench_scaling(options) == 0
    record = json.loads(out.read_text())
    base = record["settings"]["base"]
    for entry in record["results"]:
        changed = {key for key in base if entry["workload"][key] != base[key]}
        assert changed <= {entry["axis"]} and entry["status"] == "measured"
    assert [e["axis"] for e in record["results"]] == ["batch_size"] * 2 + [
        "image_size", "num_steps", "width",
    ]  # fmt: skip
    assert "| batch size | fast: images/s | memory |" in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(PNG)


def test_a_run_in_which_nothing_could_be_measured_has_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    huge = {"fast": Contestant("fast", "", too_large, "batch", ours=True)}
    monkeypatch.setattr(scaling, "choose", lambda *_: huge)
    out = tmp_path / "scaling.json"
    options = scaling.ScalingOptions(
        "resnet8", (), (2,), (8,), (1,), (1,), 2, None, None, "cpu", out
    )
    assert scaling.bench_scaling(options) == 0
    assert "| 2 | out of memory | – |" in capsys.readouterr().out
    assert not out.with_suffix(".png").exists()


def test_results_are_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGE_ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    now = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
    first = machine.results_path("step", CPU, now)
    assert first.parent == tmp_path and first.name.endswith("_20260102-030405.json")
    first.touch()
    assert machine.results_path("step", CPU, now).name.endswith("_20260102-030405-2.json")
    (tmp_path / "pyproject.toml").touch()
    assert machine.results_path("step", CPU, now).parent == tmp_path / "benchmarks" / "results"


def test_rates_of_the_machine() -> None:
    assert machine.copy_bandwidth(CPU, 2**22) > 1e8
    assert machine.matmul_rate(CPU, torch.float32, 64) > 1e6
    assert machine.peak_rate(CPU) is None
    found = machine.describe_machine(CPU)
    assert found["device"] and found["driver"] is None and "torch" in found["versions"]


def test_default_contestants_of_the_cpu() -> None:
    assert list(choose((), CPU, None)) == ["naive", "tuned", "fast", "fast-folded"]
    assert list(choose(("fast", "compiled"), CPU, None)) == ["compiled", "fast"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "step, scaling, data or eval is expected after bench, got nothing"),
        (["stap"], "step, scaling, data or eval is expected after bench, got stap"),
        (["step", "--contestants", "nave"], "unknown contestant 'nave', expected one of naive"),
        (["step", "--contestants", "official"], "--official DIR"),
        (["step", "--contestants", "fast-eager"], "needs a GPU, got device cpu"),
        (["step", "--graph", "on"], "got --graph on with device cpu: use --graph auto"),
        (["step", "--official", "/no/such/folder"], "got /no/such/folder without train_ARAT.py"),
        (["step", "--profile", "nave"], "unknown --profile 'nave'"),
        (["step", "--model", "resnet50"], "baselines for resnet8, resnet18, wrn34-10, got model"),
        (["step", "--batch-sizes", "1"], "batch_size must be >= 2, got 1"),
        (["step", "--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["step", "--steps", "0"], "--steps must be >= 1, got 0"),
        (["step", "--out", "/"], "--out expects a file, got the folder /"),
        (["scaling", "--steps", "0"], "--steps must be >= 1, got 0"),
        (["scaling", "--widths", "0"], "width must be > 0, got 0"),
        (["scaling", "--contestants", "x"], "unknown contestant 'x'"),
    ],
)
def test_what_cannot_be_met_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device = ["--device", "cpu"] if arguments and arguments[0] != "stap" else []
    assert main(["bench", *arguments, *device]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("arat-fast: error: ") and line in lines[0]


def test_records_alone_do_not_change_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    assert not machine.is_changed(tmp_path), "no checkout"
    git("init", "--quiet")
    source = tmp_path / "code.py"
    source.write_text("1\n")
    git("add", "code.py")
    git("commit", "--quiet", "--message", "code")
    record = tmp_path / "benchmarks" / "results" / "step.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    assert not machine.is_changed(tmp_path)
    source.write_text("2\n")
    assert machine.is_changed(tmp_path)
