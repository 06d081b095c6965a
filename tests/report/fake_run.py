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

from arat_fast.config import Config, config_to_dict
from arat_fast.recipes import recipe
from arat_fast.statistics import wilson_interval

LAYERS = ("layer3.0.bn1", "layer3.0.bn2")
STEPS_PER_EPOCH = 22


def fake_config(objective: str = "arat", seed: int = 0, epochs: int = 30) -> Config:
    config = recipe("digits").with_objective(objective)
    train = dataclasses.replace(config.train, epochs=epochs)
    return dataclasses.replace(config, seed=seed, train=train)


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
    clean = 0.1
    handicap = 0.0 if objective == "arat" else 0.04
    handicap += 0.006 * seed
    for step in range(1, total + 1):
        done = step / total
        if step % STEPS_PER_EPOCH == 1:
            w_adv = clean
        if step % 10 == 0 or step % STEPS_PER_EPOCH == 0:
            rise = 1 - math.exp(-6 * done)
            clean = float(np.clip(0.1 + 0.89 * rise + rng.normal(0, 0.02), 0, 1))
            adv = float(np.clip(0.1 + 0.74 * rise + rng.normal(0, 0.045), 0, 1))
            terms = {"ce_adv": w_adv * (2.3 * math.exp(-3 * done) + 0.35 + rng.normal(0, 0.05))}
            if objective == "arat":
                terms["ce_clean"] = (1 - w_adv) * 2.3 * math.exp(-4 * done)
                for index, layer in enumerate(layers):
                    value = (2 + index) * math.exp(-2 * done) + rng.normal(0, 0.08)
                    terms[f"invariance/{layer}"] = value
            line = {
                "kind": "train",
                "step": step,
                "epoch": step / STEPS_PER_EPOCH,
                "lr": 0.1 * (done / 0.3 if done < 0.3 else (1 + math.cos((done - 0.3) * 4.48)) / 2),
                "loss": sum(terms.values()),
                **terms,
                "accuracy_adv": adv,
            }
            if objective == "arat":
                line |= {"accuracy_clean": clean, "w_adv": w_adv, "w_clean": 1 - w_adv}
            line["images_per_second"] = 560 + rng.normal(0, 15)
            lines.append(line)
        if step % (4 * STEPS_PER_EPOCH) == 0:
            for model, bonus in (("last", 0.0), ("ema", 0.015)):
                lines.append(
                    {
                        "kind": "eval",
                        "step": step,
                        "epoch": step // STEPS_PER_EPOCH,
                        "split": "val",
                        "model": model,
                        "clean": float(min(1.0, 0.12 + 0.86 * rise + bonus - handicap)),
                        "pgd": float(0.1 + 0.7 * rise + bonus - handicap),
                        "num_steps": 20,
                        "num_samples": 200,
                    }
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
    threat = {"norm": "Linf", "eps": config.attack.eps}
    clean, pgd, auto = correct
    after = {
        "apgd-ce": (auto + 6) / 360,
        "apgd-t": auto / 360,
        "fab-t": auto / 360,
        "square": auto / 360,
    }
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
        "test_samples": 360,
        "evaluation": config_to_dict(config)["eval"],
        "split": "test",
        "model": "ema",
        "accuracy": {
            "clean": accuracy(clean, branch="adv"),
            "clean_branch": accuracy(min(360, clean + 3), branch="clean"),
            "pgd20": accuracy(
                pgd,
                implementation="arat_fast.attacks.PGD",
                **threat,
                alpha=0.02,
                num_steps=20,
                num_restarts=1,
                seed=0,
                num_rejected=0,
            ),
            "autoattack": accuracy(
                auto,
                implementation="pyautoattack 0.2.1",
                version="standard",
                **threat,
                num_steps=100,
                num_targets=9,
                num_queries=5000,
                seed=0,
                attacks=after,
                num_rejected=0,
            ),
        },
        "wall_seconds": {"train": train_seconds, "eval": 61.8},
        "images_per_second": 1437 * config.train.epochs / train_seconds,
        "device": "cpu, 2 threads",
        "precision": "float32",
        "versions": {
            "python": "3.11.2",
            "torch": "2.11.0",
            "torchvision": "0.26.0",
            "arat-fast": "0.1.0",
            "matplotlib": "3.11.2",
        },
        "kernels": "reference",
        "command": f"arat-fast train digits --seed {config.seed}",
        "commit": "0123456789abcdef0123456789abcdef01234567",
    }


def examples(
    num: int, channels: int, size: int, classes: Sequence[str], seed: int
) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    y = np.arange(num) % len(classes)
    x = _pictures(num, channels, size, y, rng)
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


def _pictures(
    num: int, channels: int, size: int, y: NDArray[Any], rng: np.random.Generator
) -> NDArray[Any]:
    if (channels, size) == (1, 8):
        from arat_fast.data.digits import load_digits

        images, labels = load_digits(train=True)
        chosen = [int((labels == int(label)).nonzero()[i // 10]) for i, label in enumerate(y)]
        return images[chosen].numpy() / 16
    grid = np.linspace(0, 3, size)
    waves = np.sin(grid[:, None] * rng.uniform(1, 3, (num, channels, 1, 1)) + grid[None, :])
    return 0.5 + 0.45 * waves
