"""Numbers and settings in words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from arat_fast.config import Config
from arat_fast.datasets import DATASETS
from arat_fast.objectives import ForeignSettings, objective_label
from arat_fast.recipes import recipe
from arat_fast.report.run import Run
from arat_fast.statistics import difference_interval

NARROW_SPACE = "\u202f"
MINUS = "\u2212"
DASH = "\u2013"

_METRICS = {
    "clean": "Clean",
    "autoattack": "AutoAttack",
    "clean_branch": "Clean, through the clean branch",
    "aa-torchattacks10": "AutoAttack with 10 steps (torchattacks)",
    "apgd-ce": "APGD on the cross-entropy",
    "apgd-dlr": "APGD on the DLR loss",
    "apgd-t": "targeted APGD",
    "fab-t": "targeted FAB",
    "square": "Square",
}
_DETAILS = {
    "alpha": "step size",
    "branch": "BatchNorm branch",
    "eager_because": "not folded, since",
    "eps": "radius",
    "max_samples": "first images only:",
    "num_disputed": "images attacked again on the network itself",
    "num_draws": "gradients averaged a step",
    "num_rejected": "results outside the ball",
    "num_restarts": "starts",
    "num_targets": "target classes",
    "path": "code",
}
_WEIGHTS = {
    "last": "the weights of the last step",
    "ema": "the exponential moving average (EMA) of the weights",
    "swa": "the average of the weights late in training (SWA)",
}


def percent(value: float, num_samples: int | None = None) -> str:
    """A share in [0, 1] as percent, with the decimals that ``num_samples`` can carry."""
    return f"{100 * value:.{_decimals(num_samples)}f}{NARROW_SPACE}%"


def signed_points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    text = f"{abs(100 * difference):.1f}"
    if text == "0.0":
        return f"±{text}"
    return f"{'+' if difference > 0 else MINUS}{text}"


def interval(low: float, high: float, num_samples: int | None = None) -> str:
    """Two shares as a range in percent."""
    decimals = _decimals(num_samples)
    return f"{100 * low:.{decimals}f}{DASH}{100 * high:.{decimals}f}{NARROW_SPACE}%"


def _decimals(num_samples: int | None) -> int:
    return 2 if num_samples is not None and num_samples >= 2000 else 1


def plain(value: Any) -> str:
    """A setting as text: numbers short, multiples of 1/255 as fractions."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or "empty"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or "empty"
    return str(value) or "empty"


def ball(norm: str, eps: float) -> str:
    """A ball in short: "L∞ ball, eps 8/255"."""
    return f"{norm_name(norm)} ball, eps {plain(eps)}"


def norm_name(norm: str) -> str:
    """A norm as it is written: "Linf" is L∞."""
    return norm.replace("inf", "∞")


def duration(seconds: float) -> str:
    """A time as people say it: 48 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f}{NARROW_SPACE}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NARROW_SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{NARROW_SPACE}min {whole % 60:02d}{NARROW_SPACE}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{NARROW_SPACE}h {minutes % 60:02d}{NARROW_SPACE}min"


def grouped(value: float) -> str:
    """A count with thousands separated: 1,437; fractions of small rates are kept."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def metric_name(key: str) -> str:
    """Name of a final accuracy: "pgd20" is PGD-20."""
    if key.startswith("pgd") and key[3:].isdigit():
        return f"PGD-{key[3:]}"
    return _METRICS.get(key, key)


def detail_name(key: str) -> str:
    """What a record says of a measurement, in words: "num_steps" is steps."""
    return _DETAILS.get(key, key.removeprefix("num_").replace("_", " "))


def objective_name(config: Config) -> str:
    """The method, and in what it and its BatchNorm differ from the recipe."""
    objective = config.objective
    label = objective_label(objective.name)
    if isinstance(objective, ForeignSettings):
        return label
    try:
        base = recipe(config.recipe, compat=config.compat)
    except ValueError:
        return label
    same = base.objective.name == objective.name
    default = base.objective if same else type(objective)(objective.name)
    changes = [
        _change(field.name, getattr(objective, field.name))
        for field in dataclasses.fields(objective)
        if field.name != "name" and getattr(objective, field.name) != getattr(default, field.name)
    ]
    if same and config.model.norm != base.model.norm:
        changes.append(f"{config.model.norm} BatchNorm")
    return f"{label} ({', '.join(changes)})" if changes else label


def dataset_name(config: Config) -> str:
    """Name of the dataset; of one's own images that of their folder or file."""
    dataset = DATASETS[config.data.name]
    own = Path(config.data.root).name if dataset.own else ""
    return own or dataset.label or dataset.name


def better_before(run: Run) -> tuple[str, str] | None:
    """That an earlier epoch was clearly better, in words; and the options that keep the best one,
    empty where the run has kept it."""
    found = run.better_before()
    if found is None:
        return None
    best, end = found
    n = best.num_samples
    images = f"{grouped(n)} {best.split} images"
    said = (
        f"epoch {plain(best.epoch)} was better: {percent(best.pgd, n)} of {images} under "
        f"PGD-{best.num_steps}, {percent(end.value, n)} at the end"
    )
    if run.config.train.keep_best:
        return said, ""
    tenth = (run.summary.train_samples or 10) // 10
    validated = "" if best.split == "val" else f"--data.num-val {tenth} "
    return said, f"{validated}--train.keep-best"


def overfitting(run: Run) -> str:
    """That attacked training images were right more often at the end than attacked test images, by
    more than the choice of both explains (Newcombe, 95 %); empty where they were not."""
    final, course = run.summary.accuracy, run.metrics.get("accuracy_adv")
    name = next((name for name in final if name.startswith("pgd")), None)
    if name is None or course is None or not run.summary.train_samples:
        return ""
    n, test = run.summary.train_samples, final[name]
    before = np.ceil(course.epochs[-1]) - 1
    last, batch = course.epochs > before, run.config.data.batch_size
    # Images of the epoch up to each line, of whose batches the last may be smaller.
    seen = np.minimum((course.epochs[last] - before) * np.ceil(n / batch) * batch, n)
    share = float(np.average(course.values[last], weights=np.diff(seen, prepend=0)))
    if np.isnan(share):
        return ""
    low, _ = difference_interval((round(share * n), test.correct), (n, test.num_samples))
    if low <= 0:
        return ""
    fewer = ""
    if run.evaluations and better_before(run) is None:
        fewer = (
            " Fewer epochs would hardly have helped: no evaluation during the training was clearly "
            "better. More images or other augmentation may (this run’s: "
            f"{_augmentation(run.config)})."
        )
    steps = run.config.attack.num_steps
    attack = "one step" if steps == 1 else f"{steps} steps"
    return (
        f"In the last epoch {percent(share, n)} of the training images were right under the "
        f"training’s own attack of {attack}; under {metric_name(name)} "
        f"{percent(test.value, test.num_samples)} of the {grouped(test.num_samples)} "
        f"{run.summary.split} images are. Chance does not explain the gap: the training "
        "overfits, at least in part: training images were measured under the "
        f"{attack}, in training mode and with the weights of the moment, {run.summary.split} "
        f"images under {metric_name(name)} and with the final weights.{fewer}"
    )


def _augmentation(config: Config) -> str:
    data = config.data
    if DATASETS[data.name].image_size:
        crop = f"random crops, {data.padding} pixels padded" if data.padding else ""
    else:
        crop = "random crops"
    kinds = {crop: bool(crop), "mirroring": data.flip, "RandAugment": data.augment}
    return ", ".join(kind for kind, used in kinds.items() if used) or "none"


def weights_name(model: str | None) -> str | None:
    """Which weights were evaluated: "ema" in words; None where that is not known."""
    return _WEIGHTS.get(model, model) if model else None


def threat_words(config: Config) -> str:
    """What the attacker may do."""
    return config.attack.ball.limit.format(eps=plain(config.attack.eps))


def _change(name: str, value: Any) -> str:
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {plain(value)}"


def _float(value: float) -> str:
    """At most six digits; what is a multiple of 1/255 and not a short decimal as a fraction."""
    scaled = value * 255
    if 0 < abs(value) < 1 and abs(scaled - round(scaled)) < 1e-9 and len(repr(value)) > 6:
        return f"{round(scaled)}/255"
    return f"{value:.6g}"
