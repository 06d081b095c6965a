"""Packs the golden values of one ARAT training run into the small files the parity test reads.

    python tests/data/make_golden.py SRC

SRC holds ``resnet18_official.npz``, ``resnet18_paper.npz`` and ``resnet18_keys.json``: what the
official code computes in float64 (arrays: see README.md beside this script). Written beside this
script: ``golden_official.npz``, ``golden_paper.npz``, ``golden_keys.json``. Nothing is rounded:

- Inputs and start noise are drawn again from their seeds; it is checked that they come out equal.
- Adversarial images are not stored as numbers. Each pixel is, after its last projection, one of
  five bases (the start, the two edges of the ball, 0, 1) plus a whole number of steps ``alpha``;
  base and number take one byte each. It is checked that the images come back within 1e-15.
- Values of the untrained network are the same in both runs, which is checked too: only
  ``golden_official.npz`` has them.
- Norms and heads of the many tensors are one array each, with the indices of their keys.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

EPS, ALPHA, NUM_STEPS = 8 / 255, 2 / 255, 10
STEPS = range(3)


def inputs() -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Images, labels and start noise of the three steps, in the order in which they are drawn."""
    random = np.random.RandomState(1)
    x = [random.rand(8, 3, 32, 32) for _ in STEPS]
    y = [random.randint(0, 10, 8) for _ in STEPS]
    noise = [random.uniform(-EPS, EPS, (8, 3, 32, 32)) for _ in STEPS]
    return x, y, noise


def bases(centre: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The values a pixel can have had before its last free steps, (5, ...)."""
    zero = np.zeros_like(start)
    return np.stack([start, centre - EPS, centre + EPS, zero, zero + 1])


def encode(x_adv: np.ndarray, centre: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(2, ...) int8: index of the base and number of steps, for each pixel."""
    offset = x_adv - bases(centre, start)
    steps = np.rint(offset / ALPHA)
    error = np.abs(offset - ALPHA * steps)
    error[np.abs(steps) > NUM_STEPS] = np.inf
    base = error.argmin(axis=0)
    steps = np.take_along_axis(steps, base[None], axis=0)[0]
    return np.stack([base, steps]).astype(np.int8)


def decode(code: np.ndarray, centre: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Inverse of :func:`encode`."""
    base = np.take_along_axis(bases(centre, start), code[:1].astype(np.int64), axis=0)[0]
    return base + ALPHA * code[1]


def pack(source: Path, keys: list[str], compat: str) -> dict[str, np.ndarray]:
    """The arrays of one run; ``keys`` names the tensors that the tables are indexed by."""
    golden = np.load(source / f"resnet18_{compat}.npz")
    packed = {name: golden[name] for name in ("lr", "prev_train_acc")}
    for k, (x, y, noise) in enumerate(zip(*inputs(), strict=True)):
        for name, value in (("x", x), ("y", y), ("start_noise", noise)):
            assert np.array_equal(golden[f"step{k}/{name}"], value), (compat, k, name)
        centre = x + noise if compat == "official" else x
        code = encode(golden[f"step{k}/x_adv"], centre, x + noise)
        error = np.abs(decode(code, centre, x + noise) - golden[f"step{k}/x_adv"]).max()
        assert error <= 1e-15, (compat, k, error)
        packed[f"step{k}/x_adv_code"] = code
    prefixes = [f"step{k}/{part}/" for k in STEPS for part in ("logits", "loss")]
    prefixes += ["step0/feat/", "final/logits/"]
    if compat == "official":
        prefixes.append("eval/")
    for name in golden.files:
        if name.startswith(tuple(prefixes)):
            packed[name] = golden[name]
    tables = ["step0/grad_norm", "step0/grad_head", "step0/after_head"]
    tables += [f"step{k}/after_norm" for k in STEPS]
    for table in tables:
        found = [key for key in keys if f"{table}/{key}" in golden.files]
        packed[table] = np.stack([golden[f"{table}/{key}"] for key in found])
        packed[f"{table}/keys"] = np.array([keys.index(key) for key in found], dtype=np.int16)
    covered = set(packed) | {
        f"step{k}/{n}" for k in STEPS for n in ("x", "y", "start_noise", "x_adv")
    }
    left = [
        n
        for n in golden.files
        if n not in covered and not n.startswith("eval/") and not n.startswith(tuple(tables))
    ]
    assert not left, left
    return packed


def main(source: Path) -> None:
    target = Path(__file__).parent
    layout = json.loads((source / "resnet18_keys.json").read_text())
    (target / "golden_keys.json").write_text(json.dumps(layout, separators=(",", ":")) + "\n")
    keys = list(layout["state_dict"])
    keys += [f"{layer}:{key}" for layer, state in layout["predictors"].items() for key in state]
    official, paper = (np.load(source / f"resnet18_{c}.npz") for c in ("official", "paper"))
    for name in official.files:
        assert not name.startswith("eval/") or np.array_equal(official[name], paper[name]), name
    for compat in ("official", "paper"):
        packed = pack(source, keys, compat)
        np.savez_compressed(target / f"golden_{compat}.npz", **packed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
