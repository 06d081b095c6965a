"""Records of measurements: where they go, never over another, and which code they are of."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def unused(folder: Path, stem: str) -> Path:
    """``stem.json`` in ``folder``, made if need be, or ``stem-2.json`` …: not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    path, count = folder / f"{stem}.json", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.json"
    return path


def output(*command: str, folder: Path = ROOT) -> str:
    """What ``command`` prints in ``folder``, or "unknown" where it is missing or fails, as git does
    outside a checkout."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def commit() -> str:
    """The checkout's commit."""
    return output("git", "rev-parse", "HEAD")


def is_changed(folder: Path = ROOT) -> bool:
    """Whether a checkout differs from its commit in anything but records of measurements."""
    records = f":!{RESULTS.relative_to(ROOT)}"
    return output("git", "status", "--porcelain", "--", ".", records, folder=folder) not in (
        "",
        "unknown",
    )
