"""The choice between kernels and reference, and the package's independence of triton."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from arat_kernels import implementation
from arat_kernels.checks import OPERATIONS
from arat_kernels.implementation import choose, experimental, interpreting, is_enabled

CPU, META = torch.ones(2), torch.ones(2, device="meta")


def test_cpu_tensors_get_the_reference() -> None:
    assert choose(None, CPU, None, CPU) == "reference"
    assert choose("reference", CPU) == "reference"


@pytest.mark.parametrize(
    ("impl", "tensors", "keyword"),
    [("cuda", [CPU], "impl"), (None, [CPU, META], "one device"), ("triton", [META], "CUDA")],
)
def test_bad_choices(impl: Any, tensors: list[torch.Tensor], keyword: str) -> None:
    with pytest.raises(ValueError, match=keyword):
        choose(impl, *tensors)


@pytest.mark.skipif(interpreting(), reason="the interpreter takes CPU tensors")
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_refuses_what_it_cannot_run(name: str) -> None:
    operation = OPERATIONS[name]
    tensors = operation.make(0, torch.float32)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        operation.call(tensors, "triton")
    wrong: Any = "cuda"
    with pytest.raises(ValueError, match="impl"):
        operation.call(tensors, wrong)
    other = "x" if "x" in tensors else list(tensors)[-1]
    if len(tensors) == 1:
        return
    with pytest.raises(ValueError, match="one device"):
        operation.call({**tensors, other: tensors[other].to("meta")}, None)


def test_unproven_launches_are_off_and_named() -> None:
    with experimental("one_pass"):
        with experimental("dependent_launch"):
            assert not is_enabled("one_pass") and is_enabled("dependent_launch")
        assert is_enabled("one_pass")
    assert not is_enabled("one_pass")
    with pytest.raises(ValueError, match="one_pass"), experimental("two_passes"):  # type: ignore[arg-type]  # refused
        pass


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="not installed"):
        choose("triton", CPU)
    assert choose(None, CPU) == "reference"


@pytest.mark.slow
def test_every_operation_imports_without_triton() -> None:
    """A finder that knows no triton stands for a machine without it."""
    script = """
import importlib, pkgutil, sys
import importlib.util
import torch
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
sys.modules["triton"] = None
import arat_kernels
for module in pkgutil.iter_modules(arat_kernels.__path__):
    if module.ispkg:
        importlib.import_module(f"arat_kernels.{module.name}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
