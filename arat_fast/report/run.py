"""Reading a run's folder, whatever state the run left it in."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arat_fast.statistics import wilson_interval

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Accuracy:
    """A measured accuracy: ``correct`` of ``num_samples``, and how it was measured."""

    correct: int
    num_samples: int
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """Share of correct examples, in [0, 1]."""
        return self.correct / self.num_samples

    @property
    def copies(self) -> int:
        """Corrupted copies of each image that were counted; 1 where the image itself was."""
        levels = self.details.get("corruptions")
        levels = levels.values() if isinstance(levels, Mapping) else ()
        return max(1, sum(len(level) for level in levels if isinstance(level, list)))

    @property
    def num_images(self) -> int:
        """Images, however many copies of each were counted."""
        return max(1, self.num_samples // self.copies)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval: Wilson's; of corrupted copies, which are no independent samples, the
        recorded one of the images' means."""
        recorded = self.details.get("interval")
        if self.copies > 1 and isinstance(recorded, list) and len(recorded) == 2:
            low, high = map(number, recorded)
            if low is not None and high is not None:
                return low, high
        return wilson_interval(self.correct // self.copies, self.num_images)


@dataclass(frozen=True)
class Examples:
    """Images with their adversarial versions.

    Attributes:
        x, x_adv: (K, C, H, W), in [0, 1].
        y, pred_clean, pred_adv: (K,), indices into ``classes``.
        prob_clean, prob_adv: (K,), confidence in the prediction.
        classes: names.
    """

    x: NDArray[np.float32]
    x_adv: NDArray[np.float32]
    y: NDArray[np.int64]
    pred_clean: NDArray[np.int64]
    pred_adv: NDArray[np.int64]
    prob_clean: Numbers
    prob_adv: Numbers
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)

    def class_name(self, index: int) -> str:
        """Name of a class, or its number where it has none."""
        return self.classes[index] if 0 <= index < len(self.classes) else f"class {index}"


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        path: the folder.
        version: of arat_fast that wrote it, or "".
        config: the nested configuration.
        train, evals, analyses: lines of metrics.jsonl, one per step (and split and model), by step.
        summary: summary.json, empty where the run has not written one.
        examples: None where there are none.
        notes: what was missing or unreadable, in words.
    """

    path: Path
    version: str
    config: Mapping[str, Any]
    train: tuple[Mapping[str, Any], ...]
    evals: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    examples: Examples | None
    notes: tuple[str, ...]
    analyses: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    def setting(self, *path: str) -> Any:
        """A field of the configuration, None where it is absent."""
        return dig(self.config, *path)

    def accuracies(self) -> dict[str, Accuracy]:
        """Final accuracies by name, in the order in which they are shown."""
        return read_accuracies(self.summary.get("accuracy"))

    def train_series(self, key: str) -> tuple[Numbers, Numbers]:
        """Epochs and values of one metric of the training lines; lines without it are left out."""
        return _series(self.train, key)

    def eval_series(self, key: str, split: str, model: str) -> tuple[Numbers, Numbers]:
        """Epochs and values of one metric of the evaluation lines."""
        chosen = [e for e in self.evals if (e.get("split"), e.get("model")) == (split, model)]
        return _series(tuple(chosen), key)

    def eval_kinds(self) -> list[tuple[str, str]]:
        """Pairs (split, model) that were evaluated during training, in order of appearance."""
        return list(dict.fromkeys((str(e.get("split")), str(e.get("model"))) for e in self.evals))


def read_run(path: Path) -> Run:
    """Read a run's folder.

    Only ``config.json`` has to be there and whole: a run that was interrupted, or whose metrics end
    in half a line, is read as far as it goes, and ``notes`` says what was left out.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: no such folder, or no ``config.json`` in it.
        ValueError: ``config.json`` is not a configuration.
    """
    file = path / "config.json"
    if not file.is_file():
        what = "a folder without config.json" if path.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"expected the folder of a run, got {path} ({what}); give the folder that "
            "`arat-fast train` printed"
        )
    notes: list[str] = []
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        config = stored["config"]
        if not isinstance(config, dict):
            raise TypeError("its entry config is no object")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"expected {file} to hold a run's configuration, got something else ({error}); "
            "train the run again or restore the file"
        ) from error
    train, evals, analyses = _read_metrics(path / "metrics.jsonl", notes)
    return Run(
        path=path,
        version=str(stored.get("version") or ""),
        config=config,
        train=train,
        evals=evals,
        summary=_read_summary(path / "summary.json", notes),
        examples=_read_examples(path / "examples.npz", notes),
        notes=tuple(notes),
        analyses=analyses,
    )


def read_accuracies(record: Any) -> dict[str, Accuracy]:
    """Accuracies by name out of a record, in the order in which they are shown."""
    found = {}
    for name, entry in record.items() if isinstance(record, Mapping) else ():
        accuracy = _accuracy(entry)
        if accuracy is not None:
            found[str(name)] = accuracy
    return in_order(found)


def in_order(accuracies: Mapping[str, Accuracy]) -> dict[str, Accuracy]:
    """Accuracies in the order in which they are shown."""
    return dict(sorted(accuracies.items(), key=lambda item: _rank(item[0])))


def dig(value: Any, *path: str) -> Any:
    """The entry of nested mappings at ``path``, None where there is none."""
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def number(value: Any) -> float | None:
    """``value`` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return None
    return float(value) if finite else None


def count(value: Any) -> int | None:
    """``value`` if it is a whole number >= 0, else None."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and found == int(found) else None


def make_accuracy(value: Any, num_samples: Any, correct: Any = None) -> Accuracy | None:
    """An accuracy from a share or a count, None where the numbers do not make one."""
    samples, right, share = count(num_samples), count(correct), number(value)
    if not samples:
        return None
    if right is None and share is not None:
        right = round(share * samples)
    return Accuracy(right, samples) if right is not None and 0 <= right <= samples else None


def _accuracy(entry: Any) -> Accuracy | None:
    if not isinstance(entry, Mapping):
        return None
    found = make_accuracy(entry.get("value"), entry.get("num_samples"), entry.get("correct"))
    if found is None:
        return None
    details = {k: v for k, v in entry.items() if k not in ("value", "num_samples", "correct")}
    return Accuracy(found.correct, found.num_samples, details)


def _rank(name: str) -> int:
    if name == "clean":
        return 0
    if name.startswith("pgd"):
        return 1
    return 2 if name == "autoattack" else 3


def _series(lines: tuple[Mapping[str, Any], ...], key: str) -> tuple[Numbers, Numbers]:
    points = []
    for line in lines:
        epoch, value = number(line.get("epoch")), line.get(key)
        if epoch is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
            # What is not finite stays as a gap in the curve.
            finite = number(value)
            points.append((epoch, math.nan if finite is None else finite))
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _read_metrics(file: Path, notes: list[str]) -> tuple[tuple[Mapping[str, Any], ...], ...]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append("There is no metrics.jsonl, so there are no curves.")
        return (), (), ()
    lines = text.split("\n")
    # A run that was resumed goes over some steps again; the later line is what the weights saw.
    train: dict[int, Mapping[str, Any]] = {}
    evals: dict[tuple[int, str, str], Mapping[str, Any]] = {}
    analyses: dict[int, Mapping[str, Any]] = {}
    broken = 0
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        step = count(entry.get("step")) if isinstance(entry, dict) else None
        if step is None or number(entry.get("epoch")) is None:
            if index < len(lines) - 1:
                broken += 1
            else:
                notes.append("The last line of metrics.jsonl is cut off; it was left out.")
        elif entry.get("kind") == "train":
            train[step] = entry
        elif entry.get("kind") == "analysis":
            analyses[step] = entry
        elif entry.get("kind") == "eval":
            evals[step, str(entry.get("split")), str(entry.get("model"))] = entry
    if broken:
        notes.append(f"Lines of metrics.jsonl that could not be read and were left out: {broken}.")
    return (
        tuple(train[step] for step in sorted(train)),
        tuple(evals[key] for key in sorted(evals)),
        tuple(analyses[step] for step in sorted(analyses)),
    )


def _read_summary(file: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        notes.append("There is no summary.json: the run is still going on, or it was stopped.")
        return {}
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        notes.append("summary.json cannot be read; final results are missing here.")
        return {}
    return summary


def _read_examples(file: Path, notes: list[str]) -> Examples | None:
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as archive:
            x, x_adv = (archive[k].astype(np.float32) for k in ("x", "x_adv"))
            labels = [archive[k].astype(np.int64) for k in ("y", "pred_clean", "pred_adv")]
            probabilities = [archive[k].astype(np.float64) for k in ("prob_clean", "prob_adv")]
            classes = tuple(str(name) for name in archive["classes"])
        wrong_shape = x.ndim != 4 or x.shape != x_adv.shape or x.size == 0
        if wrong_shape or any(a.shape != (len(x),) for a in (*labels, *probabilities)):
            raise ValueError("arrays of different lengths")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        notes.append("examples.npz cannot be read; the example images are missing here.")
        return None
    x, x_adv = (np.nan_to_num(a, nan=0.0) for a in (x, x_adv))
    y, pred_clean, pred_adv = labels
    prob_clean, prob_adv = probabilities
    return Examples(x, x_adv, y, pred_clean, pred_adv, prob_clean, prob_adv, classes)
