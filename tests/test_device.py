"""Which device is taken, and what the process does with its memory."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arat_fast.cli import main
from arat_fast.device import describe_device, resolve_device, set_deterministic

FAULTS = """
import resource
import torch
from arat_fast.device import keep_freed_memory

if {keep}:
    keep_freed_memory()

def work():
    # As layers do: each makes its activation, the backward pass frees the last one first.
    activations = [torch.ones(2**18)]
    for _ in range(39):
        activations.append(activations[-1] + 1)
    while activations:
        activations.pop()

for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so")
def test_freed_memory_is_kept() -> None:
    def faults(keep: bool) -> int:
        code = FAULTS.format(keep=keep)
        return int(
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        )

    # 40 MiB, twenty times, in pages of 4 KiB; how much of it glibc gives back differs from start to
    # start.
    pages = 20 * 40 * 2**20 // 4096
    kept, given_back = faults(keep=True), faults(keep=False)
    assert kept < pages / 100
    assert kept < given_back


def test_a_driver_that_is_too_old_is_no_reason_for_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Get")

    monkeypatch.setattr(torch.cuda, "init", init)
    # NVML, which is asked first, counts GPUs that this PyTorch cannot use.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("auto", "cuda", "cuda:1"):
        with pytest.raises(ValueError, match=r"too old .*12020.*; .*update the driver"):
            resolve_device(name)
    assert resolve_device("cpu") == torch.device("cpu")
    assert main(["info"]) == 0 and "too old" in capsys.readouterr().out
    assert main(["train", "digits", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("too old") == 1


@pytest.mark.parametrize("reason", ["No CUDA GPUs are available", "Found no NVIDIA driver on your"])
def test_without_a_gpu_the_cpu_is_taken(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.cuda, "init", init)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="this machine has 0"):
        resolve_device("cuda")


def test_a_gpu_that_this_pytorch_is_not_built_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [7, 0]
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
    for name in ("auto", "cuda"):
        with pytest.raises(ValueError, match=r"V100 has compute capability 7\.0.*7\.5 and newer"):
            resolve_device(name)
    capability[:] = 7, 5
    assert resolve_device("auto") == torch.device("cuda")


def test_deterministic_chooses_no_algorithm_by_its_time() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    seen = []
    try:
        for deterministic, device in ((True, gpu), (False, gpu), (True, cpu), (False, cpu)):
            set_deterministic(deterministic, device)
            seen.append(torch.backends.cudnn.benchmark)
            assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        set_deterministic(False, cpu)
    assert seen == [False, True, False, False]


def test_one_thread_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, words in ((1, "1 thread"), (2, "2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        assert describe_device(torch.device("cpu")).endswith(f", {words}")
