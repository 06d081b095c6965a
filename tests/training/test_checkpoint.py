"""Files that are whole or not there, and refusals in one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arat_fast.files import write_atomic, write_json
from arat_fast.training.checkpoint import load_checkpoint, save_checkpoint
from arat_fast.training.metrics import MetricsFile


def state(value: float) -> dict[str, object]:
    return {"weights": torch.full((1000,), value), "step": 3, "note": "x", "list": [1, 2.5]}


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", state(1.5))
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(loaded["weights"], torch.full((1000,), 1.5))
    assert loaded["step"] == 3 and loaded["list"] == [1, 2.5]
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_cut_file(tmp_path: Path, share: float) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, state(1))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="not a whole checkpoint") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and "c.pt" in str(error.value)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/exploded",)

    torch.save({"format": 1, "bomb": Bomb()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "exploded").exists()


def test_other_formats(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(3)}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="not a training checkpoint"):
        load_checkpoint(tmp_path / "plain.pt")
    torch.save({"format": 99}, tmp_path / "new.pt")
    with pytest.raises(ValueError, match="format 99, expected 1"):
        load_checkpoint(tmp_path / "new.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "absent.pt")


def test_full_disk_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, state(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        save_checkpoint(path, state(2))
    assert str(path) in str(error.value)
    monkeypatch.undo()
    assert float(load_checkpoint(path)["weights"][0]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_write_that_fails_midway_keeps_the_previous_file(tmp_path: Path) -> None:
    """A real failing write: the process may not make files over 100 kB."""
    program = f"""
import resource, sys, torch
from pathlib import Path
from arat_fast.training.checkpoint import save_checkpoint
path = Path({str(tmp_path)!r}) / "c.pt"
save_checkpoint(path, {{"weights": torch.ones(10)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(path, {{"weights": torch.ones(100_000)}})
except OSError as error:
    print("refused:", error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "refused: cannot write" in result.stdout and "File too large" in result.stdout
    assert load_checkpoint(tmp_path / "c.pt")["weights"].shape == (10,)
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_metrics_file_is_cut_but_never_padded(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    before = path.read_bytes()
    file = MetricsFile(path, keep=keep)
    file.write({"step": 3})
    file.close()
    assert path.read_bytes() == before[:keep] + b'{"step": 3}\n'


def test_lines_after_the_checkpoint_are_not_held(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = b'{"kind": "analysis", "step": 9, "epoch": 1}\n'
    path.write_bytes(first + b'{"kind": "analysis", "step": 18, "epoch": 2}\n')
    file = MetricsFile(path, keep=len(first))
    assert file.holds("analysis", 1) and not file.holds("analysis", 2)
    file.close()


def test_full_disk_under_the_metrics() -> None:
    """/dev/full refuses every write, as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    file = MetricsFile.__new__(MetricsFile)
    file.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115  # closed below
    file.keep = None
    with pytest.raises(OSError, match="cannot write /dev/full: No space left"):
        file.write({"step": 3})
    file.close()


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def write(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "f", write)
    assert list(tmp_path.iterdir()) == []


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "f.json", {"value": float("nan")})
    assert list(tmp_path.iterdir()) == []
