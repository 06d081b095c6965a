"""Numbers and settings in words."""

from __future__ import annotations

import math
from typing import Any

from arat_fast.report.run import Run, count, dig, number

NARROW_SPACE = "\u202f"
MINUS = "\u2212"
DASH = "\u2013"

_DATASETS = {
    "digits": "scikit-learn’s handwritten digits",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
    "tiny-imagenet": "Tiny-ImageNet",
    "imagenette": "Imagenette",
}
_OBJECTIVES = {
    "arat": "ARAT",
    "at": "Plain adversarial training",
    "trades": "TRADES",
    "mart": "MART",
    "lbgat": "LBGAT",
    "arrest": "ARREST",
    "natural": "Ordinary training",
}
_WEIGHTS = {
    "last": "the weights of the last step",
    "ema": "the exponential moving average (EMA) of the weights",
    "swa": "the average of the weights late in training (SWA)",
}


def percent(value: float, num_samples: int | None = None) -> str:
    """A share in [0, 1] as percent, with the decimals that ``num_samples`` can carry."""
    decimals = 2 if num_samples is not None and num_samples >= 2000 else 1
    return f"{100 * value:.{decimals}f}{NARROW_SPACE}%"


def signed_points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    text = f"{abs(100 * difference):.1f}"
    if text == "0.0":
        return f"±{text}"
    return f"{'+' if difference > 0 else MINUS}{text}"


def interval(low: float, high: float, num_samples: int | None = None) -> str:
    """Two shares as a range in percent."""
    decimals = 2 if num_samples is not None and num_samples >= 2000 else 1
    return f"{100 * low:.{decimals}f}{DASH}{100 * high:.{decimals}f}{NARROW_SPACE}%"


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
    known = {
        "clean": "Clean",
        "autoattack": "AutoAttack",
        "clean_branch": "Clean, through the clean branch",
        "corruptions": "Common corruptions",
        "aa-torchattacks10": "AutoAttack with 10 steps (torchattacks)",
    }
    return known.get(key, key)


def objective_name(run: Run) -> str:
    """What was trained, in short, with every ablation that was switched on."""
    name = str(run.setting("objective", "name"))
    title = _OBJECTIVES.get(name, name)
    if name == "custom":
        return str(run.setting("objective", "label") or "an objective of its own")
    if name == "lbgat":
        guide = run.setting("objective", "guide")
        by = {"": "", "clean-branch": ", guided by its clean branch"}.get(guide, f", guide {guide}")
        return f"{title} (alpha {plain(run.setting('objective', 'alpha'))}{by})"
    if name != "arat":
        return title
    changes = []
    if run.setting("objective", "stop_gradient") is False:
        changes.append("no stop-gradient")
    if run.setting("objective", "predictor") is False:
        changes.append("no predictor")
    if run.setting("model", "norm") == "shared":
        changes.append("one shared BatchNorm")
    if run.setting("objective", "direction") not in (None, "adv_to_clean"):
        changes.append(f"direction {run.setting('objective', 'direction')}")
    return f"{title} ({', '.join(changes)})" if changes else title


def dataset_name(run: Run) -> str:
    """Name of the dataset."""
    name = str(run.setting("data", "name"))
    return _DATASETS.get(name, name)


def weights_name(model: Any) -> str:
    """Which weights were evaluated: "ema" in words."""
    return _WEIGHTS.get(str(model), str(model))


def threat_words(run: Run) -> str | None:
    """What the attacker may do; None where the configuration does not say."""
    eps = number(run.setting("attack", "eps"))
    if eps is None:
        return None
    if run.setting("attack", "norm") == "L2":
        return (
            f"may change the whole image by at most {plain(eps)} in Euclidean length (L2), "
            "on a brightness scale from 0 to 1"
        )
    return (
        f"may change every pixel by at most {plain(eps)} on a brightness scale from 0 to 1 "
        "(L∞ norm)"
    )


def epochs_done(run: Run) -> float | None:
    """Epochs that were trained, as far as the folder tells."""
    if run.train:
        last = number(run.train[-1].get("epoch"))
        finished = number(run.summary.get("epochs"))
        if run.summary.get("status") != "finished":
            return last
        return finished if finished is not None else last
    return number(run.summary.get("epochs"))


def describe(run: Run) -> str:
    """One sentence: network, objective, epochs, data."""
    parts = [f"A {run.setting('model', 'name')}"]
    parameters = count(run.summary.get("num_parameters"))
    if parameters:
        parts.append(f" with {grouped(parameters)} parameters")
    parts.append(", trained")
    epochs = epochs_done(run)
    if epochs is not None:
        parts.append(f" for {plain(round(epochs, 1))} epoch{'' if epochs == 1 else 's'}")
    before = count(dig(run.summary, "natural_model", "epochs"))
    if before is not None:
        parts.append(f", after {before} of natural training,")
    images = count(run.summary.get("train_samples"))
    of = f"{grouped(images)} images of " if images else ""
    parts.append(f" on {of}{dataset_name(run)}")
    method = objective_name(run)
    parts.append(f" with {method[0].lower() + method[1:] if method[1:2].islower() else method}.")
    return "".join(parts)


def _float(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    scaled = value * 255
    if 0 < abs(value) < 1 and abs(scaled - round(scaled)) < 1e-9 and not _is_short(value):
        return f"{round(scaled)}/255"
    return f"{value:.6g}"


def _is_short(value: float) -> bool:
    return len(repr(value)) <= 6
