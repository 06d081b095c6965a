"""Every GPU test and every kernel benchmark on this machine's card, in under nine minutes.

Writes ``benchmarks/results/<card>_<date>.json`` and the same as a Markdown table. The benchmarks of
an operation whose tests fail are left out: a speed counts only beside its correctness. Without a
GPU it says so and exits with status 2.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TEST_SECONDS = 260
TOTAL_SECONDS = 525


def pytest_run(arguments: list[str], seconds: float) -> int | None:
    """pytest's exit status, or None where it ran past ``seconds``."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=0", *arguments]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return None


def outcomes(junit: Path) -> dict[str, dict[str, int]]:
    """Passed, failed and skipped tests by test module, as pytest's JUnit file has them."""
    counts: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        module = case.get("classname", "").split(".")[-1]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        if "skipped" in kinds:
            outcome = "skipped"
        entry = counts.setdefault(module, {"passed": 0, "failed": 0, "skipped": 0})
        entry[outcome] += 1
    return counts


def table(result: dict[str, Any]) -> str:
    """The result for people to read."""
    lines = [
        f"# {result['gpu']}, {result['date']}",
        "",
        "| tests | passed | failed | skipped |",
        "|---|---|---|---|",
    ]
    for module, counts in sorted(result["tests"].items()):
        cells = [str(counts[kind]) for kind in ("passed", "failed", "skipped")]
        lines.append(f"| {module} | {' | '.join(cells)} |")
    if result["benchmarks"]:
        info = result["benchmarks"][0]["extra_info"]
        lines += [
            "",
            f"Copy bandwidth of this run: {info['copy_bytes_per_second'] / 1e12:.2f} TB/s (read + "
            f"written). Driver {info['driver']}, torch {info['torch']}, triton {info['triton']}, "
            f"commit {info['commit'][:12]}{' with local changes' if info['dirty'] else ''}, "
            f"clocks as read {info['sm_clock']}, {info['memory_clock']}.",
            "",
            "| benchmark | µs per call | TB/s | share of copy | speed-up over |",
            "|---|---|---|---|---|",
        ]
    for entry in result["benchmarks"]:
        info = entry["extra_info"]
        over = ", ".join(f"{name} {value:.2f}×" for name, value in info["speed_up"].items())
        lines.append(
            f"| {entry['name']} | {info['seconds_per_call'] * 1e6:.1f} | "
            f"{info['bytes_per_second'] / 1e12:.2f} | {info['share_of_copy_bandwidth']:.0%} | "
            f"{over} |"
        )
    if result["left_out"]:
        lines += ["", "Left out: " + "; ".join(result["left_out"]) + "."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run it all: 0 if every test passed and every benchmark ran, 1 if not, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("no CUDA device is visible to PyTorch: nothing was run", file=sys.stderr)
        return 2
    started = time.monotonic()
    left_out = []
    with tempfile.TemporaryDirectory() as folder:
        junit, timings = Path(folder, "tests.xml"), Path(folder, "benchmarks.json")
        status = pytest_run(["tests", "-m", "gpu", f"--junit-xml={junit}"], TEST_SECONDS)
        if status is None:
            left_out.append(f"tests stopped after {TEST_SECONDS} s, so no benchmark is reported")
        tests = outcomes(junit) if junit.exists() else {}
        green = [
            path
            for path in sorted((ROOT / "benchmarks" / "kernels").glob("test_*.py"))
            if tests.get(path.stem, {}).get("passed") and not tests[path.stem]["failed"]
        ]
        for path in sorted((ROOT / "benchmarks" / "kernels").glob("test_*.py")):
            if path not in green:
                left_out.append(f"benchmarks of {path.stem}: its GPU tests did not all pass")
        bench_status: int | None = 0
        if green:
            left = TOTAL_SECONDS - (time.monotonic() - started)
            arguments = [*map(str, green), f"--benchmark-json={timings}", "--benchmark-disable-gc"]
            bench_status = pytest_run(arguments, left)
            if bench_status is None:
                left_out.append(f"benchmarks stopped after {left:.0f} s")
        benchmarks = json.loads(timings.read_text())["benchmarks"] if timings.exists() else []
    # A benchmark that failed before its end has no rates.
    benchmarks = [entry for entry in benchmarks if "speed_up" in entry["extra_info"]]
    for entry in benchmarks:
        entry["stats"].pop("data", None)
    now = datetime.datetime.now(datetime.timezone.utc)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "date": now.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started),
        "tests": tests,
        "benchmarks": benchmarks,
        "left_out": left_out,
    }
    card = re.sub(r"\W+", "-", result["gpu"]).strip("-").lower()
    path = ROOT / "benchmarks" / "results" / f"{card}_{now:%Y%m%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(result))
    print(f"wrote {path} and {path.with_suffix('.md').name}")
    return int(bool(status or left_out or bench_status))


if __name__ == "__main__":
    sys.exit(main())
