"""What the process does with its memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
