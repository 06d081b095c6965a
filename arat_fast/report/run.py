"""A run's folder, parsed once, whatever state the run left it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from arat_fast.config import Config, config_from_dict
from arat_fast.evaluation.pieces import NOT_NPZ
from arat_fast.files import check_ratio, parse_json, read_json
from arat_fast.statistics import difference_interval, wilson_interval

Numbers = NDArray[np.float64]
T = TypeVar("T")


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
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson_interval(self.correct, self.num_samples)


class Series(NamedTuple):
    """One metric along training: two arrays of one length; values may be NaN."""

    epochs: Numbers
    values: Numbers


@dataclass(frozen=True)
class Evaluation:
    """One evaluation during training: a line of metrics.jsonl of the kind ``eval``."""

    epoch: float
    split: str
    model: str
    clean: float
    pgd: float
    num_steps: int
    num_samples: int


@dataclass(frozen=True)
class Look:
    """A look at catastrophic overfitting: a line of metrics.jsonl of the kind ``watch``.

    Attributes:
        pgd: accuracy on a few images; None where the run went back to this epoch.
        fell: robustness has gone since the look before.
        fell_at: epoch of the fall that the run went back from.
    """

    epoch: float
    pgd: float | None = None
    num_steps: int = 0
    fell: bool = False
    fell_at: float | None = None


@dataclass(frozen=True)
class TrainingAnalysis:
    """One analysis during training: a line of metrics.jsonl of the kind ``analysis``.

    Attributes:
        gradient_conflict: of :func:`arat_fast.analysis.snapshot.mean_conflict`, or None.
        mixture: of :func:`arat_fast.analysis.snapshot.mean_mixture`, or None.
    """

    epoch: float
    gradient_conflict: Mapping[str, Any] | None
    mixture: Mapping[str, Any] | None


@dataclass(frozen=True)
class Summary:
    """summary.json; of a run that has not written one every field is at its default.

    Attributes:
        warnings: what the run said that the reader should know.
        accuracy: final accuracies by name, in the order in which they are shown.
        left_out: attacks that could not be run, and why.
        per_class, collapsed, randomised: as in :class:`arat_fast.evaluation.suite.SuiteResult`.
        wall_seconds: by "train", in finished steps since the run first started, and "eval".
        images_per_second: over the former.
        natural_model: the natural training that the run started from.
        evaluation: settings of the final evaluation.
    """

    status: str = ""
    reason: str = ""
    epochs: float | None = None
    steps: int | None = None
    processes: int = 1
    num_parameters: int | None = None
    train_samples: int | None = None
    classes: Sequence[str] = ()
    test_samples: int | None = None
    wall_seconds: Mapping[str, float] = field(default_factory=dict)
    images_per_second: float | None = None
    natural_model: Mapping[str, Any] | None = None
    device: str | None = None
    precision: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    kernels: str | None = None
    warnings: Sequence[str] = ()
    command: str | None = None
    commit: str | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    split: str | None = None
    model: str | None = None
    accuracy: Mapping[str, Accuracy] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    per_class: Mapping[str, Sequence[int]] = field(default_factory=dict)
    collapsed: str = ""
    randomised: str = ""


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


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        path: the folder.
        version: of arat_fast that wrote it.
        config: the configuration.
        summary: how it ended and what was measured then.
        metrics: what was logged along training, by name.
        evaluations: during training, in order.
        looks: at catastrophic overfitting, in order.
        training_analyses: during training, in order.
        analyses: what ``arat-fast analyze`` found of this state of the training, by part.
        examples: None where there are none.
        notes: what the run warned of, and what was missing or unreadable, in words.
    """

    path: Path
    version: str
    config: Config
    summary: Summary
    metrics: Mapping[str, Series]
    evaluations: tuple[Evaluation, ...]
    looks: tuple[Look, ...]
    training_analyses: tuple[TrainingAnalysis, ...]
    analyses: Mapping[str, Mapping[str, Any]]
    examples: Examples | None
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @property
    def epochs(self) -> float | None:
        """Epochs that were trained, as far as the folder tells."""
        if self.summary.status == "finished" or "loss" not in self.metrics:
            return self.summary.epochs
        return float(self.metrics["loss"].epochs[-1])

    @property
    def is_trained(self) -> bool:
        """The training has come to its end, whatever became of the evaluation."""
        return self.summary.epochs is not None and (self.epochs or 0) >= self.summary.epochs

    def better_before(self) -> tuple[Evaluation, Accuracy] | None:
        """The most robust evaluation during training, and the accuracy at the end, where that is
        lower by more than the choice of the images explains (Newcombe, 95 %)."""
        kind = "ema" if any(e.model == "ema" for e in self.evaluations) else "last"
        course = [e for e in self.evaluations if e.model == kind]
        if not course:
            return None
        last = course[-1]
        end = Accuracy(round(last.pgd * last.num_samples), last.num_samples)
        final = self.summary.accuracy.get(f"pgd{last.num_steps}")
        # Else they are of other images or of other weights.
        if final and (last.split, kind) == (self.summary.split, self.summary.model):
            end = final
        best = max(course, key=lambda e: e.pgd)
        correct = round(best.pgd * best.num_samples), end.correct
        low, _ = difference_interval(correct, (best.num_samples, end.num_samples))
        return (best, end) if low > 0 else None

    def evaluated(self) -> dict[tuple[str, str], dict[str, Series]]:
        """Clean and robust accuracy ("clean", "pgd") during training by split and model."""
        kinds = sorted({(e.split, e.model) for e in self.evaluations})
        found = {}
        for kind in kinds:
            lines = [e for e in self.evaluations if (e.split, e.model) == kind]
            rows = np.array([(e.epoch, e.clean, e.pgd) for e in lines], dtype=np.float64)
            epochs, clean, pgd = rows.T
            found[kind] = {"clean": Series(epochs, clean), "pgd": Series(epochs, pgd)}
        return found


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
        raise FileNotFoundError(
            f"expected the folder of a run, with config.json in it, got {path}; give the folder "
            "that `arat-fast train` printed"
        )
    try:
        stored = read_json(file)
        config, version = config_from_dict(stored["config"]), str(stored["version"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} does not hold a run's configuration ({error})") from error
    notes: list[str] = []
    missing = "There is no summary.json: the run is still going on, or it was stopped."
    summary = _read(path / "summary.json", _parse_summary, notes, missing) or Summary()
    metrics, evaluations, looks, training_analyses = _read_metrics(path / "metrics.jsonl", notes)
    return Run(
        path,
        version,
        config,
        summary,
        metrics,
        evaluations,
        looks,
        training_analyses,
        read_analyses(path / "analysis", summary.steps, notes),
        _read(path / "examples.npz", _parse_examples, notes),
        (*summary.warnings, *notes),
    )


def read_analyses(
    folder: Path, steps: int | None, notes: list[str]
) -> dict[str, Mapping[str, Any]]:
    """What ``arat-fast analyze`` wrote, by part.

    Args:
        folder: the folder ``analysis``; it may be absent.
        steps: that the run has trained; None where that is no matter.
        notes: gains what was left out, in words: records of another state of the training.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        record = _read(file, read_json, notes)
        if record is None:
            continue
        before = record["steps"]
        if None not in (before, steps) and before != steps:
            notes.append(
                f"analysis/{file.name} is of step {before:,}, the run has trained {steps:,} steps; "
                "it is left out here. arat-fast analyze makes it again."
            )
            continue
        found[file.stem] = record
    return found


def read_accuracies(record: Mapping[str, Mapping[str, Any]]) -> dict[str, Accuracy]:
    """Accuracies by name out of a record, in the order in which they are shown."""
    found = {}
    for name, entry in record.items():
        details = {k: v for k, v in entry.items() if k not in ("value", "correct", "num_samples")}
        found[name] = Accuracy(entry["correct"], entry["num_samples"], details)
    return in_order(found)


def in_order(found: Mapping[str, T]) -> dict[str, T]:
    """What was found of each attack, in the order in which it is shown."""
    return dict(
        sorted(
            found.items(),
            key=lambda a: (a[0] != "clean", not a[0].startswith("pgd"), a[0] != "autoattack"),
        )
    )


def _read(
    file: Path, parse: Callable[[Path], Any], notes: list[str], missing: str | None = None
) -> Any:
    """What ``parse`` makes of a file; None, and a note, where it is not there or not whole."""
    try:
        return parse(file)
    except FileNotFoundError:
        notes += [missing] if missing else []
    except (*NOT_NPZ, TypeError, AttributeError):
        notes.append(f"{file.name} cannot be read; it is left out here.")
    return None


def _parse_summary(file: Path) -> Summary:
    stored = read_json(file)
    stored["accuracy"] = read_accuracies(stored.get("accuracy", {}))
    return _from_fields(Summary, stored)


def _from_fields(kind: type[T], stored: Mapping[str, Any]) -> T:
    """A dataclass out of a record, which may hold more."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: stored[name] for name in names if name in stored})


def _parse_examples(file: Path) -> Examples:
    with np.load(file, allow_pickle=False) as archive:
        check_ratio(archive.zip, file)
        arrays = {f.name: archive[f.name] for f in fields(Examples)}
    return Examples(**arrays | {"classes": tuple(map(str, arrays["classes"]))})


def _read_metrics(
    file: Path, notes: list[str]
) -> tuple[
    dict[str, Series],
    tuple[Evaluation, ...],
    tuple[Look, ...],
    tuple[TrainingAnalysis, ...],
]:
    points: dict[str, list[tuple[float, float]]] = {}
    evaluations, looks, analyses = [], [], []
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        notes.append("There is no metrics.jsonl, so there are no curves.")
        lines = []
    broken = 0
    for text in lines:
        try:
            line = parse_json(text)
            kind = line.pop("kind")
            if kind == "eval":
                evaluations.append(_from_fields(Evaluation, line))
            elif kind == "watch":
                looks.append(_from_fields(Look, line))
            elif kind == "analysis":
                analyses.append(_from_fields(TrainingAnalysis, line))
            elif kind == "train":
                numbers = {n: float(v) for n, v in line.items() if n not in ("step", "run")}
                epoch = numbers.pop("epoch")
                for name, value in numbers.items():
                    points.setdefault(name, []).append((epoch, value))
        # A run that was killed leaves half a line; what else is there, no run has written.
        except (ValueError, TypeError, KeyError, AttributeError):
            broken += 1
    if broken:
        notes.append(f"Lines of metrics.jsonl that could not be read and were left out: {broken}.")
    metrics = {name: Series(*np.array(pairs, dtype=np.float64).T) for name, pairs in points.items()}
    return metrics, tuple(evaluations), tuple(looks), tuple(analyses)
