"""The self-check: what is wrong is seen, kept, and replaced."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from arat_fast import device, doctor
from arat_fast.attacks import PGD
from arat_fast.cli import main
from arat_fast.display import Display
from arat_fast.distributed import ALONE
from arat_fast.models import create_model
from arat_fast.models.wide_resnet import WideResNet
from arat_kernels.checks import OPERATIONS, Operation, Tensors
from arat_kernels.implementation import Impl, choose, is_replaced, replace_operations

CPU = torch.device("cpu")


def with_kernel(operation: Operation, off: float) -> Operation:
    """The reference as the kernel, one number of whose last result is ``off``."""

    def call(t: Tensors, impl: Impl | None) -> Tensor | Sequence[Tensor]:
        out = operation.call(t, "reference")
        if impl == "triton":
            last = out if isinstance(out, Tensor) else out[-1]
            # As a kernel would: autograd knows nothing of it.
            last.data[(-1,) * last.ndim] += off
        return out

    return dataclasses.replace(operation, call=call)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_that_is_wrong_is_seen(name: str) -> None:
    records = doctor.check(
        {
            name: with_kernel(OPERATIONS[name], 0.0),
            f"{name}-off": with_kernel(OPERATIONS[name], 0.3),
        },
        torch.float32,
        CPU,
    )
    assert records[name]["error"] == "" and records[name]["share"] <= 1
    assert list(doctor.wrong_functions(records)) == [name.partition("-")[0]]


@pytest.mark.parametrize("name", ["frozen_affine", "split_batch_norm"])
def test_numbers_for_which_rounding_would_decide_what_relu_does_are_moved(name: str) -> None:
    operation = OPERATIONS[name]
    tensors = operation.make(0, torch.float32)
    assert operation.off_the_edges(tensors) is tensors
    _, before = operation.edges[-1]
    tensors["residual"] -= before(tensors) * (torch.rand(tensors["x"].shape) < 0.2)
    moved = operation.off_the_edges(tensors)
    assert before(tensors).abs().min() < 1e-6 and before(moved).abs().min() > 1e-5
    assert moved["residual"].stride() == tensors["residual"].stride()


@pytest.mark.slow
def test_what_is_wrong_is_seen_where_python_leaves_assertions_out() -> None:
    program = (
        "import dataclasses, torch; from arat_fast import doctor; from arat_kernels import checks; "
        "own = checks.OPERATIONS['relu_backward']; "
        "call = lambda t, impl: own.call(t, 'reference') + 0.3 * (impl == 'triton'); "
        "wrong = {'relu': dataclasses.replace(own, call=call)}; "
        "found = doctor.check(wrong, torch.float32, torch.device('cpu')); "
        "raise SystemExit(not found['relu']['error'])"
    )
    assert subprocess.run([sys.executable, "-O", "-c", program]).returncode == 0


def test_what_does_not_compile_is_wrong_and_what_does_not_fit_is_unknown() -> None:
    def fails(error: type[Exception]) -> Operation:
        def call(t: Tensors, impl: Impl | None) -> Tensor:
            raise error("no such instruction")

        return dataclasses.replace(OPERATIONS["pgd_step"], call=call)

    operations = {"pgd_step-a": fails(RuntimeError), "relu-a": fails(torch.OutOfMemoryError)}
    records = doctor.check(operations, torch.float32, CPU)
    assert list(records) == ["pgd_step-a"] and "instruction" in records["pgd_step-a"]["error"]
    assert doctor.check(operations, torch.float32, CPU, known=records, seconds=-math.inf) == records


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and works")
def test_a_gpu_that_is_lost_ends_the_check_and_what_broke_it_is_kept() -> None:
    kept: list[dict[str, doctor.Record]] = []
    operations = {name: OPERATIONS["pgd_step"] for name in ("pgd_step-a", "pgd_step-b")}
    with pytest.raises(ValueError, match=r"pgd_step-a.*start again"):
        doctor.check(operations, torch.float32, torch.device("cuda"), keep=kept.append)
    assert [list(records) for records in kept] == [["pgd_step-a"]]
    assert list(doctor.wrong_functions(kept[0])) == ["pgd_step"]


def test_wrong_kernels_are_replaced_or_refused() -> None:
    said: list[str] = []
    wrong = {"pgd_step": "pgd_step-Linf: rms error 1", "fold": "fold-ResNet: off"}
    try:
        doctor.replace_wrong(wrong, False, said.append)
        assert len(said) == 2 and "rms error 1" in said[0] and "doctor" in said[0]
        assert choose("triton", torch.ones(1), operation="pgd_step") == "reference"
        with pytest.raises(ValueError, match=r"rms error 1.*--step\.kernels"):
            doctor.replace_wrong(wrong, True, said.append)
    finally:
        doctor.replace_wrong({}, False, said.append)
    with pytest.raises(ValueError, match="CUDA"):
        choose("triton", torch.ones(1), operation="pgd_step")


@pytest.mark.parametrize("norm", ["split", "shared"])
def test_operations_have_the_shapes_of_the_step(norm: str) -> None:
    model = create_model("resnet8", 4, norm=norm)  # type: ignore[arg-type]  # one of its values
    operations = doctor.operations_of(model, (3, 8, 8), 4, 6, PGD(norm="L2"), torch.bfloat16)
    functions = {name.partition("-")[0] for name in operations}
    # Replaced by the name of frozen_affine, as which it is checked.
    absent = {"add_frozen_affine"} | ({"split_batch_norm"} if norm == "shared" else set())
    expected = {name.partition("-")[0] for name in OPERATIONS} - absent
    assert functions == expected | {doctor.FOLD}
    assert any(name.endswith("-sum") for name in operations)
    assert "pgd_step-L2-6x3x8x8" in operations
    assert any(re.fullmatch(r"frozen_affine-6x\d+x8x8-residual-relu", n) for n in operations)
    for operation in operations.values():
        kernel = with_kernel(operation, 0.0)
        made = kernel.make(0, torch.bfloat16)
        assert all(result.isfinite().all() for result in kernel.results(made, "reference").values())
    fold = operations[next(name for name in operations if name.startswith(doctor.FOLD))]
    # On a CPU the folded network is no kernel.
    assert fold.check(fold.make(0, torch.float32)) <= 1


class Reading(nn.Module):
    """Holds a tensor that does not move with it, and reads values."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor([2.0])
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.max()) <= 1:
            x = x * self.scale
        return F.dropout(self.norm(self.conv(x)), training=True).mean((2, 3))


def test_any_network_that_runs_has_operations() -> None:
    model, state = Reading(), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    operations = doctor.operations_of(model, (3, 8, 8), 8, 6, PGD(), torch.float32)
    assert "frozen_affine-6x8x6x6" in operations
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_what_evaluates_is_checked_in_float32_too() -> None:
    model = create_model("resnet8", 4)
    shapes = model, (3, 8, 8), 4, 6, PGD()
    wide = doctor.operations_of(*shapes, torch.float32)
    narrow = doctor.operations_of(*shapes, torch.bfloat16)
    added = narrow.keys() - wide.keys()
    assert {name.partition("-")[0] for name in added} == doctor.EVALUATED
    assert wide.keys() < narrow.keys()
    for name in added:
        made = narrow[name].make(0, torch.bfloat16)
        assert {t.dtype for t in made.values()}.isdisjoint({torch.bfloat16}) or "parts" in made


def test_what_is_left_for_the_next_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"error": "rms error 1", "share": None}
    known = {"pgd_step-a": wrong, "pgd_step-of-another-run": wrong, "crop_flip-b": wrong}
    # Of a training with the same card and versions.
    known[doctor.GRAPH] = wrong
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: ({"operations": known}, None))
    operations = {name: OPERATIONS["pgd_step"] for name in ("pgd_step-a", "relu-a", "relu-b")}
    out, warnings = io.StringIO(), []
    display = Display(Console(file=out, width=100))
    try:
        found = doctor.prepare(
            *(operations, torch.float32, CPU, ALONE, display, warnings.append), trains=False
        )
        assert found == {"pgd_step": "pgd_step-a: rms error 1"} and len(warnings) == 1
        assert is_replaced("pgd_step") and not is_replaced("crop_flip")
        assert "2 of 3 operations are left" in out.getvalue()
    finally:
        replace_operations([])


def test_the_command_measures_the_gpu_that_it_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    current: list[torch.device] = []
    record = {"operations": {}, "versions": {}}
    monkeypatch.setattr(device, "resolve_device", torch.device)
    monkeypatch.setattr(device, "resolve_precision", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: (record, tmp_path))
    for name in ("cuda", "cuda:1"):
        assert main(["doctor", "digits", "--device", name]) == 0
    assert current == [torch.device("cuda:1")]


def test_sums_of_blocks_are_checked_and_the_mean_of_the_last() -> None:
    model = WideResNet(10, 1, 4)
    expected = {f"split_batch_norm-6x{c}x{s}x{s}-sum" for c, s in ((16, 8), (32, 4), (64, 2))}
    expected.add("split_batch_norm-6x64x2x2-mean")
    operations = doctor.operations_of(model, (3, 8, 8), 4, 6, PGD(), torch.float32)
    found = {n for n in operations if n.endswith(("-sum", "-mean")) and n.startswith("split")}
    assert found == expected
    records = doctor.check(
        {name: with_kernel(operations[name], 0.0) for name in found}, torch.float32, CPU
    )
    assert not doctor.wrong_functions(records)


def test_the_command_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 2
    assert "GPU" in capsys.readouterr().err
