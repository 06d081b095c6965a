"""Run folders as the trainer writes them, with made-up but plausible numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny import changed

from arat_fast.config import Config, config_to_dict
from arat_fast.recipes import recipe
from arat_fast.statistics import wilson_interval

LAYERS = ("layer3.0.bn1", "layer3.0.bn2")
STEPS_PER_EPOCH = 22


def fake_config(objective: str = "arat", seed: int = 0, epochs: int = 30) -> Config:
    config = changed(recipe("digits").with_objective(objective), "train", epochs=epochs)
    return dataclasses.replace(config, seed=seed)


def write_fake_run(
    folder: Path,
    *,
    objective: str = "arat",
    seed: int = 0,
    epochs: int = 30,
    correct: tuple[int, int, int] = (349, 290, 268),
    channels: int = 1,
    size: int = 8,
    classes: Sequence[str] = tuple("0123456789"),
    layers: Sequence[str] = LAYERS,
    num_examples: int = 16,
    train_seconds: float = 74.2,
) -> Path:
    """A finished run; returns its folder."""
    folder.mkdir(parents=True)
    config = fake_config(objective, seed, epochs)
    (folder / "config.json").write_text(
        json.dumps({"version": "0.1.0", "config": config_to_dict(config)})
    )
    lines = metric_lines(objective, seed, epochs, layers)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(
        json.dumps(summary(config, correct, train_seconds), indent=2)
    )
    np.savez(folder / "examples.npz", **examples(num_examples, channels, size, classes, seed))
    return folder


def rewrite(file: Path, *path_and_value: Any) -> None:
    """Set one entry of a JSON file, by the names on the way to it."""
    *path, last, value = path_and_value
    content = entry = json.loads(file.read_text())
    for key in path:
        entry = entry[key]
    entry[last] = value
    file.write_text(json.dumps(content))


def metric_lines(
    objective: str, seed: int, epochs: int, layers: Sequence[str]
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    total = epochs * STEPS_PER_EPOCH
    lines: list[dict[str, Any]] = []
    for step in range(1, total + 1):
        done, w_adv = step / total, 0.1 + 0.8 * step / total
        rise = 1 - math.exp(-6 * done)
        if step % 10 == 0 or step % STEPS_PER_EPOCH == 0:
            terms = {"ce_adv": w_adv * (2.3 * math.exp(-3 * done) + rng.uniform(0.3, 0.4))}
            numbers = {"accuracy_adv": 0.1 + 0.7 * rise + rng.normal(0, 0.02)}
            if objective == "arat":
                terms["ce_clean"] = (1 - w_adv) * 2.3 * math.exp(-4 * done)
                for index, layer in enumerate(layers):
                    terms[f"invariance/{layer}"] = (2 + index) * math.exp(-2 * done)
                numbers |= {"accuracy_clean": 0.1 + 0.85 * rise, "w_adv": w_adv}
                numbers |= {"w_clean": 1 - w_adv}
            line = {"kind": "train", "step": step, "epoch": step / STEPS_PER_EPOCH}
            line |= {"lr": 0.1 * (1 - done), "loss": sum(terms.values()), **terms, **numbers}
            lines.append({**line, "images_per_second": 560 + rng.normal(0, 15)})
        if step % (4 * STEPS_PER_EPOCH) == 0:
            line = {"kind": "eval", "step": step, "epoch": step // STEPS_PER_EPOCH, "split": "val"}
            for model, bonus in (("last", 0.0), ("ema", 0.015)):
                shares = {"clean": 0.12 + 0.86 * rise + bonus, "pgd": 0.1 + 0.7 * rise + bonus}
                lines.append(
                    {**line, "model": model, **shares, "num_steps": 20, "num_samples": 200}
                )
    return lines


def accuracy(correct: int, num_samples: int = 360, **details: Any) -> dict[str, Any]:
    return {
        "value": correct / num_samples,
        "correct": correct,
        "num_samples": num_samples,
        "interval": list(wilson_interval(correct, num_samples)),
        **details,
    }


def summary(config: Config, correct: tuple[int, int, int], train_seconds: float) -> dict[str, Any]:
    clean, pgd, auto = correct
    attack = {"norm": "Linf", "eps": config.attack.eps, "seed": 0, "num_rejected": 0}
    after = {"apgd-ce": (auto + 6) / 360, "apgd-t": auto / 360}
    return {
        "recipe": config.recipe,
        "status": "finished",
        "objective": config.objective.name,
        "dataset": config.data.name,
        "seed": config.seed,
        "epochs": config.train.epochs,
        "steps": config.train.epochs * STEPS_PER_EPOCH,
        "num_parameters": 310_922,
        "train_samples": 1437,
        "classes": list("0123456789"),
        "test_samples": 360,
        "evaluation": config_to_dict(config)["eval"],
        "split": "test",
        "model": "ema",
        "accuracy": {
            "clean": accuracy(clean, branch="adv"),
            "clean_branch": accuracy(min(360, clean + 3), branch="clean"),
            "pgd20": accuracy(pgd, **attack, alpha=0.02, num_steps=20),
            "autoattack": accuracy(auto, **attack, num_steps=100, attacks=after),
        },
        "per_class": {
            "images": [36] * 10,
            **{
                name: [(right + k) // 10 for k in range(10)]
                for name, right in zip(("clean", "pgd20", "autoattack"), correct, strict=True)
            },
        },
        "wall_seconds": {"train": train_seconds, "eval": 61.8},
        "images_per_second": 1437 * config.train.epochs / train_seconds,
        "device": "cpu, 2 threads",
        "precision": "float32",
        "versions": {"python": "3.11.2", "torch": "2.11.0"},
        "kernels": "reference",
        "command": f"arat-fast train digits --seed {config.seed}",
        "commit": "0123456789abcdef0123456789abcdef01234567",
    }


def examples(
    num: int, channels: int, size: int, classes: Sequence[str], seed: int
) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    y = np.arange(num) % len(classes)
    x = rng.random((num, channels, size, size))
    delta = 0.12 * np.sign(rng.normal(size=x.shape)) * (rng.random(x.shape) < 0.8)
    pred_clean, pred_adv = y.copy(), y.copy()
    pred_adv[::4] = (y[::4] + 1) % len(classes)
    pred_clean[8::16] = (y[8::16] + 1) % len(classes)
    return {
        "x": x.astype(np.float32),
        "x_adv": np.clip(x + delta, 0, 1).astype(np.float32),
        "y": y,
        "pred_clean": pred_clean,
        "pred_adv": pred_adv,
        "prob_clean": rng.uniform(0.7, 1, num).astype(np.float32),
        "prob_adv": rng.uniform(0.35, 0.9, num).astype(np.float32),
        "classes": np.array(classes),
    }
