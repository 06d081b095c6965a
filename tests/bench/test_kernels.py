"""The benchmarks of the operations, on small inputs and their reference implementations."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from arat_fast.display import Display
from benchmarks import kernels
from benchmarks.harness import Bench
from benchmarks.kernels import Options

CASES = [
    partial(kernels.cosine, num=8, widths=(4, 6)),
    partial(kernels.batch_assembly, num=3),
    partial(kernels.parts, num=3),
    partial(kernels.loss_gradient, num=4, num_classes=5),
    partial(kernels.affine, shape=(2, 3, 4, 4), backward=False),
    partial(kernels.affine, shape=(2, 3, 4, 4), backward=True),
    partial(kernels.folded_backward, shape=(2, 3, 4, 4)),
    *(partial(kernels.attack_step, shape=(2, 3, 4, 4), norm=norm) for norm in kernels.NORMS),
    *(partial(kernels.start, shape=(2, 3, 4, 4), norm=norm) for norm in kernels.NORMS[:2]),
    partial(kernels.batch_norm, shape=(16, 3, 4, 4), backward=False),
    partial(kernels.batch_norm, shape=(16, 3, 4, 4), backward=True),
    partial(kernels.frozen_batch_norm, shape=(4, 3, 4, 4)),
    partial(kernels.another_launch, shape=(16, 3, 4, 4), way="one_pass"),
]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench[Any]:
    monkeypatch.setattr(kernels, "BYTES_PER_GRAPH", 0)
    options = Options(device="cpu", out=tmp_path / "kernels.json", rounds=2)
    bench = Bench("kernels", options, kernels.table, Display(Console(quiet=True)))
    bench.record["rates"] = {
        "copy_bytes_per_second": 1e10, "matmul_flops_per_second": 1e12,
        "matmul_dtype": "float32", "peak_flops_per_second": None,
    }  # fmt: skip
    return bench


def small(case: partial[kernels.Work]) -> kernels.Work:
    """Without torch.compile, which takes its time on a CPU."""
    work = case(torch.device("cpu"))
    work.functions.pop("torch.compile", None)
    return work


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.func.__name__)
def test_contestants_compute_the_same(bench: Bench[Any], case: partial[kernels.Work]) -> None:
    entry = kernels.measure(bench, small(case))
    assert entry["bytes_per_second"] == entry["bytes_moved"] / entry["seconds_per_call"]
    assert entry["share_of_copy_bandwidth"] == entry["bytes_per_second"] / 1e10
    assert entry["speed_up"]["PyTorch eager"] > 0
    bench.record["results"].append({"operation": "some", "case": "one", **entry})
    bench.save()
    assert "| some | one |" in bench.path.with_suffix(".md").read_text()


def test_a_wrong_contestant_is_not_timed(bench: Bench[Any]) -> None:
    work = small(CASES[3])
    work.functions["wrong"] = lambda *given: [2 * x for x in work.functions["ours"](*given)]
    with pytest.raises(ValueError, match="wrong"):
        kernels.measure(bench, work)


def test_every_operation_is_benchmarked() -> None:
    folder = Path(kernels.__file__).parents[1] / "kernels" / "arat_kernels"
    operations = {path.parent.name for path in folder.glob("*/api.py")}
    assert set(kernels.OPERATIONS) == operations
    with pytest.raises(ValueError, match="conv"):
        Options(operations=("conv",))
