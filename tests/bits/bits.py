"""Short training runs whose numbers must not move, and the digests of what they leave behind.

``python tests/bits/bits.py`` makes this machine's part of the table ``bits.json`` anew, on purpose,
after a change that is meant to move numbers (the other parts are then to be deleted);
``test_bits.py`` compares with it. Digests are of values, not of files:
tensors by name, dtype, shape and bytes, metrics by their numbers, evaluations image by image.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

TABLE = Path(__file__).with_name("bits.json")

COMMON = (
    *("--train.epochs", "2", "--train.eval-every", "1", "--train.log-every", "5"),
    *("--train.device", "cpu", "--eval.num-steps", "3", "--eval.max-samples", "48"),
    *("--eval.no-autoattack", "--attack.num-steps", "3"),
)

CASES: dict[str, str] = {
    "arat": "",
    "arat-ten-steps": "--attack.num-steps 10 --train.epochs 1",
    "official": "--compat official --train.epochs 1",
    "at": "--objective.name at",
    "trades": "--objective.name trades",
    "mart": "--objective.name mart",
    "lbgat": "--objective.name lbgat",
    "arrest": "--objective.name arrest",
    "natural": "--objective.name natural",
    "swa": "--average.kind swa --average.start 0.5 --average.every 7",
    "ema": "--average.kind ema --average.decay 0.9 --average.start 0.25",
    "bf16": "--step.precision bf16 --train.epochs 1",
    "folded": "--attack.bn running",
    "l2": "--attack.norm L2 --attack.eps 0.5 --attack.alpha 0.2",
    "restarts": "--attack.num-restarts 2 --train.epochs 1",
    "accumulate": "--train.accumulate 3",
    "analyze": "--analyze.every 1",
    "shared": "--model.norm shared --objective.no-predictor",
    "shared-official": "--model.norm shared --compat official --train.epochs 1",
    "two-ranks": "",
    "autoattack": "--eval.autoattack --eval.max-samples 32 --train.epochs 4",
    "resumed": "",
}
"""Arguments after ``arat-fast train digits``; the last of equal ones counts."""

SAME = {"resumed": "arat"}
"""Cases that must agree with another one, but for a line of metrics where they were stopped."""

_NUMBERS = ("loss", "accuracy_clean", "accuracy_adv", "lr", "w_adv", "w_clean", "clean", "pgd")


VARIABLES = {
    **os.environ,
    **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    **{"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""The runs' environment: one thread, and the same instructions where a processor has more."""


def environment() -> str:
    """What the bits depend on beside the code; the table has a part for each that was tried."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    cpu = " ".join(facts.get(name, "?") for name in ("model name", "cpu family", "model"))
    return f"{cpu}, AVX2, torch {torch.__version__}"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _flat(value[key], f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _flat(item, f"{path}/{number}")


def digest(tensors: dict[str, Any]) -> str:
    """SHA-256 over path, dtype, shape and bytes of every tensor in nested containers."""
    total = hashlib.sha256()
    for path, tensor in _flat(tensors):
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        total.update(f"{path} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(raw)
    return total.hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The digests of what a run has left in its folder."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    parts = {name: state[name] for name in ("model", "objective", "optimizer", "average")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {name: line.get(name) for name in ("kind", "step", *_NUMBERS)}
        for line in lines
        if line["kind"] in ("train", "eval")
    ]
    examples = _numbers(folder / "examples.npz")
    accuracy = json.loads((folder / "summary.json").read_text())["accuracy"]
    counts = {name: record["correct"] for name, record in accuracy.items()}
    return {
        "weights": digest(load_file(folder / "model.safetensors")),
        **{name: digest(part) for name, part in parts.items()},
        "metrics": hashlib.sha256(json.dumps(metrics).encode()).hexdigest(),
        "examples": digest(examples),
        "correct": json.dumps(counts),
    }


def run(case: str, folder: Path) -> dict[str, str]:
    """Train one case into ``folder`` and return its digests."""
    arguments = ["train", "digits", *_merged(CASES[case]), "--out", str(folder)]
    if case == "two-ranks":
        _python(
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "arat_fast",
            *arguments,
        )
    elif case == "resumed":
        _interrupt(arguments, folder / "metrics.jsonl")
        _python("arat_fast", *arguments, "--resume")
    else:
        _python("arat_fast", *arguments)
    found = digests(folder)
    if case == "arat":
        found["evaluation"] = _evaluated(folder)
    return found


def _python(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    subprocess.run(command, env=VARIABLES, check=True, stdout=subprocess.DEVNULL)


def _merged(arguments: str) -> list[str]:
    words = arguments.split()
    given = {word for word in words if word.startswith("--")}
    given |= {"--eval.no-autoattack"} if "--eval.autoattack" in given else set()
    kept: list[str] = []
    skipping = False
    for word in COMMON:
        if word.startswith("--"):
            skipping = word in given
        if not skipping:
            kept.append(word)
    return [*kept, *words]


def _interrupt(arguments: list[str], metrics: Path) -> None:
    """Send SIGTERM in the second epoch, or at its begin, and wait for the checkpoint."""
    command = [sys.executable, "-m", "arat_fast", *arguments]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=VARIABLES, stdout=quiet, stderr=quiet)
    while not metrics.exists() or '"kind": "eval"' not in metrics.read_text():
        assert process.poll() is None, "the run ended before it was interrupted"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75


def _evaluated(folder: Path) -> str:
    """The digest of ``arat-fast eval``'s results image by image."""
    out = folder / "again.json"
    options = (
        "--attacks pgd apgd-ce square --max-samples 24 --num-steps 4 --num-restarts 2 --seed 3"
    )
    _python("arat_fast", "eval", str(folder), *options.split(), "--out", str(out))
    return digest(_numbers(out.with_suffix(".npz")))


def _numbers(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of an .npz file, those of names and words left out."""
    with np.load(path) as arrays:
        numeric = [name for name in arrays if arrays[name].dtype.kind in "biuf"]
        return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in numeric}


def make_table() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    table = json.loads(options.out.read_text()) if options.out.exists() else {}
    cases = table.setdefault(environment(), {})
    for case in options.cases:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            cases[case] = run(case, Path(folder) / "run")
        print(f"{case}: {time.perf_counter() - start:.0f} s", flush=True)
        options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    make_table()
