"""Damaged files of every kind, through every command that reads them: each is read or refused in
one line, at once; where there is a checksum, what is read is what was written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Generator
from pictures import encoded, image_folder, picture, tar_shard
from rich.console import Console
from tiny import TinyRun, leaves, popen

import arat_fast
from arat_fast.cli import main
from arat_fast.command_line import apply_overrides
from arat_fast.compare.plan import plan_from_record
from arat_fast.compare.plan import read_record as read_comparison
from arat_fast.data.inspect import inspect
from arat_fast.data.prepare import convert_npz
from arat_fast.datasets.encoded import decode_image
from arat_fast.datasets.prepared import array_folder
from arat_fast.display import Display
from arat_fast.evaluation.pieces import read_arrays
from arat_fast.evaluation.record import read_record
from arat_fast.recipes import recipe
from arat_fast.report.run import read_run
from arat_fast.run.loop import train_run
from arat_fast.saved.network import read_saved
from arat_fast.training.checkpoint import load_checkpoint

SECONDS = 30.0
EXHAUSTIVE = "EXHAUSTIVE" in os.environ
NUMBERS = [
    range(3),
    pytest.param(
        range(3, 300 if EXHAUSTIVE else 12), marks=[pytest.mark.slow, pytest.mark.timeout(3000)]
    ),
]
OPTIONS = shlex.split(
    "--data.num-val 1421 --data.batch-size 8 --train.epochs 1 --train.log-every 1 --train.device "
    "cpu --attack.num-steps 1 --eval.num-steps 1 --eval.no-autoattack --eval.max-samples 8"
)
CONFIG = apply_overrides(recipe("digits"), OPTIONS)
VALUES: list[Any] = [None, True, -1, 0, 10**9, 2**70, 1e308, float("nan"), "", "8/255", "../x"]
VALUES += ["x" * 10_000, "\0", [], {}, [[]], {"a": {"b": 1}}, [1, "x", None]]


def trained(resume: bool = False) -> None:
    train_run(TinyRun(CONFIG, Path("run"), resume=resume, display=Display(Console(quiet=True))))


# What is done to a file.


def flip(content: bytes, rng: Generator) -> bytes:
    damaged = bytearray(content)
    for place in rng.integers(0, len(damaged), rng.integers(1, 9)).tolist():
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def cut(content: bytes, rng: Generator) -> bytes:
    return content[: int(rng.integers(len(content)))]


def _ends(content: bytes, rng: Generator) -> list[int]:
    return sorted(rng.integers(0, len(content) + 1, 4).tolist())


def insert(content: bytes, rng: Generator) -> bytes:
    a, _, _, d = _ends(content, rng)
    return content[:a] + rng.bytes(min(d - a, 4096) + 1) + content[a:]


def delete(content: bytes, rng: Generator) -> bytes:
    a, b, _, _ = _ends(content, rng)
    return content[:a] + content[b:]


def zero(content: bytes, rng: Generator) -> bytes:
    a, b, _, _ = _ends(content, rng)
    return content[:a] + bytes(b - a) + content[b:]


def swap(content: bytes, rng: Generator) -> bytes:
    a, b, c, d = _ends(content, rng)
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def swap_lines(content: bytes, rng: Generator) -> bytes:
    lines = content.splitlines(keepends=True)
    i, j = rng.integers(0, len(lines), 2).tolist()
    lines[i], lines[j] = lines[j], lines[i]
    return b"".join(lines)


def change_value(content: bytes, rng: Generator) -> bytes:
    """Another value, or one under another name, somewhere in JSON, or in one line of it."""
    lines = content.split(b"\n") if content.count(b'{"kind"') else [content]
    place = int(rng.integers(len(lines) - 1)) if len(lines) > 1 else 0
    whole = {"top": json.loads(lines[place])}
    inside = [whole, *(part for part in _parts(whole["top"]) if part)]
    part: Any = inside[int(rng.integers(len(inside)))]
    key = list(part)[int(rng.integers(len(part)))] if isinstance(part, dict) else 0
    kind = rng.integers(4)
    if kind == 0 and isinstance(part, dict) and part is not whole:
        part["other"] = part.pop(key)
    else:
        part[key] = VALUES[int(rng.integers(len(VALUES)))]
    lines[place] = json.dumps(whole["top"]).encode()
    return b"\n".join(lines)


def _parts(value: Any) -> list[Any]:
    if not isinstance(value, (dict, list)):
        return []
    items = value.values() if isinstance(value, dict) else value
    return [value, *(part for item in items for part in _parts(item))]


BYTES = (flip, cut, insert, delete, zero, swap)
JSON = (change_value, change_value, change_value, swap_lines, *BYTES)


# What reads it.


def command(*arguments: str) -> Callable[[], None]:
    def run() -> None:
        if main(arguments) not in (0, 2):
            raise AssertionError("neither done nor refused")

    return run


def numbers(value: Any) -> dict[str, Any]:
    return {
        path: item.numpy().tobytes() if isinstance(item, torch.Tensor) else item
        for path, item in leaves(value).items()
    }


def network() -> Any:
    saved = read_saved("run")
    return numbers({**saved.model.state_dict(), "facts": dict(saved.facts)})


def weights() -> Any:
    return numbers(dict(arat_fast.load("run/model.safetensors").state_dict()))


def exported() -> Any:
    return numbers(dict(arat_fast.load("out").state_dict()))


def arrays() -> Any:
    images = array_folder(Path("arrays"))
    return images.rows[np.arange(len(images))].tobytes(), images.labels.tolist()


def converted() -> Any:
    try:
        convert_npz(Path("generated.npz"), Path("converted"))
        images = array_folder(Path("converted"))
        return images.rows[np.arange(len(images))].tobytes(), images.labels.tolist()
    finally:
        shutil.rmtree("converted", ignore_errors=True)


REPORT = command("report", "run")
EVAL = command("eval", "run", "--attacks", "pgd", "--max-samples", "4")
EXPORT = command("export", "run", "--format", "hub", "--out", "again")
COMPARED = command("compare", "--from", "compared")


def resumed() -> None:
    trained(resume=True)


LONG = (REPORT, EVAL, EXPORT, COMPARED, resumed)
"""Where no checksum ends them at once, these are tried on every seventh file."""

KINDS: dict[str, tuple[tuple[Any, ...], list[Callable[[], Any]], list[Callable[[], Any]]]] = {
    # By file: what is done to it, what must read what was written, and what else reads it.
    "run/checkpoint.pt": (
        BYTES,
        [network, lambda: numbers(load_checkpoint(Path("run/checkpoint.pt")))],
        [resumed, EVAL, EXPORT],
    ),
    "run/model.safetensors": (
        BYTES,
        [weights],
        [command("eval", "run/model.safetensors", "--attacks", "pgd", "--max-samples", "4")],
    ),
    "run/config.json": (JSON, [], [lambda: read_run(Path("run")), REPORT]),
    "run/summary.json": (
        JSON,
        [],
        [lambda: read_run(Path("run")), REPORT, resumed, EXPORT],
    ),
    "run/metrics.jsonl": (JSON, [], [lambda: read_run(Path("run")), REPORT]),
    "run/examples.npz": (BYTES, [], [lambda: read_run(Path("run")), REPORT]),
    "run/evaluation.json": (
        JSON,
        [],
        [lambda: read_record(Path("run/evaluation.json")), EVAL, REPORT, EXPORT],
    ),
    "run/evaluation.npz": (BYTES, [], [lambda: read_arrays(Path("run/evaluation.npz")), EVAL]),
    "out/config.json": (JSON, [], [exported]),
    "out/model.safetensors": (BYTES, [exported], []),
    "compared/comparison.json": (
        JSON,
        [],
        [lambda: plan_from_record(read_comparison(Path("compared"))), COMPARED],
    ),
    "arrays/images.npy": (BYTES, [arrays], [lambda: inspect(Path("arrays"))]),
    "arrays/labels.npy": (BYTES, [arrays], [lambda: inspect(Path("arrays"))]),
    "generated.npz": (BYTES, [converted], [lambda: inspect(Path("generated.npz"))]),
    "shards/train/0.tar": (
        BYTES,
        [],
        [command("data", what, "shards") for what in ("prepare", "inspect")],
    ),
    "folder/train/cat/0_0.png": (BYTES, [], [command("data", "prepare", "folder")]),
    **{
        f"image{suffix}": (
            BYTES,
            [],
            [lambda suffix=suffix: decode_image(Path(f"image{suffix}").read_bytes(), "it")],
        )
        for suffix in (".jpg", ".png", ".webp", ".bmp")
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every kind."""
    root = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(subprocess, "Popen", popen)
        trained()
        EVAL()
        command("export", "run", "--format", "hub", "--out", "out")()
        rng = np.random.default_rng(0)
        np.savez_compressed(
            "generated.npz",
            image=rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8),
            label=np.arange(6) % 3,
        )
        convert_npz(Path("generated.npz"), Path("arrays"))
        for split in ("train", "test"):
            tar_shard(Path(f"shards/{split}/0.tar"), 0, 6)
        image_folder(Path("folder"))
        for suffix in (".jpg", ".png", ".webp", ".bmp"):
            Path(f"image{suffix}").write_bytes(encoded(picture(1), suffix))
        comparison(Path("compared"))
    return root


def comparison(folder: Path) -> None:
    """A comparison of the run alone."""
    arguments = shlex.split("compare digits --objectives arat --seeds 0 --out")
    assert main([*arguments, str(folder), *OPTIONS]) == 0


@pytest.mark.parametrize("numbered", NUMBERS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_damage(
    name: str, numbered: range, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, exact, others = KINDS[name]
    source = files / name
    content = source.read_bytes()
    monkeypatch.chdir(files)
    expected = [read() for read in exact]
    top = Path(name).parts[0]
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    failed = []
    for number in numbered:
        rng = np.random.default_rng([number, len(name)])
        damaged = changes[number % len(changes)](content, rng)
        if damaged == content:
            continue
        for reader, read in enumerate([*exact, *others]):
            if not exact and read in LONG and number % 7 != 3:
                continue
            for path in list(work.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if (files / top).is_dir():
                shutil.copytree(files / top, top)
            (work / name).write_bytes(damaged)
            start = time.monotonic()
            problem = ""
            try:
                found = read()
                if reader < len(exact) and found != expected[reader]:
                    problem = "read as something else"
            except (ValueError, OSError) as error:
                if not str(error):
                    problem = "no reason"
            except (Exception, SystemExit) as error:
                problem = f"{type(error).__name__}: {error}"[:150]
            if time.monotonic() - start > SECONDS:
                problem += f" {time.monotonic() - start:.0f} s"
            if problem:
                how = changes[number % len(changes)].__name__
                failed.append(f"{number}, {how}, reader {reader}: {problem}")
    assert not failed, f"{len(failed)} of {len(numbered)}:\n" + "\n".join(failed)
