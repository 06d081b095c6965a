"""What holds between all tests."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ema_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an epoch with an average, a normalisation inside its network and a command
    that names a folder; who writes into it takes a copy."""
    from tiny import changed, tiny_config

    import arat_fast

    config = tiny_config(epochs=1, kind="ema", start=0.0, decay=0.5)
    out = tmp_path_factory.mktemp("ema") / "run"
    command = "arat-fast train digits --out /home/me/run --seed 0"
    arat_fast.train(changed(config, "model", mean=(0.3,), std=(0.4,)), out, command=command)
    return out


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
