"""The choice between kernels and reference, and the package's independence of triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from arat_kernels import implementation
from arat_kernels.implementation import choose, interpreting

CPU, META = torch.ones(2), torch.ones(2, device="meta")


def test_cpu_tensors_get_the_reference() -> None:
    assert choose(None, CPU, None, CPU) == "reference"
    assert choose("reference", CPU) == "reference"


def test_bad_choices() -> None:
    with pytest.raises(ValueError, match="got 'cuda'"):
        choose("cuda", CPU)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        choose(None, CPU, META)
    with pytest.raises(ValueError, match="expects CUDA tensors, got meta"):
        choose("triton", META)


@pytest.mark.skipif(interpreting(), reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        choose("triton", CPU)


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="not installed"):
        choose("triton", CPU)
    assert choose(None, CPU) == "reference"


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
