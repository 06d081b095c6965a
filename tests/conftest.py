"""What holds between all tests."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_threads_of_dali() -> Iterator[None]:
    """Pipelines go with the test that made them: a data worker that is forked while their threads
    hold a lock waits for it for ever."""
    yield
    if "nvidia.dali" not in sys.modules:
        return
    for task in Path("/proc/self/task").iterdir():
        # A thread may end while it is looked at.
        with suppress(OSError):
            if "DALI" in (task / "comm").read_text():
                gc.collect()
                return
