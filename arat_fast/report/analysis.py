"""The analyses in a run's report, and the page on what an attacker sees."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arat_fast.report.analysis_plots import (
    Drawing,
    conflict_by_layer,
    conflict_over_time,
    confusion_panel,
    margin_histogram,
    masking_curves,
    mixture_by_layer,
    mixture_over_time,
    surface_panels,
)
from arat_fast.report.analysis_words import (
    attacker_words,
    conflict_words,
    masking_words,
    mixture_words,
    surface_words,
)
from arat_fast.report.examples import to_png
from arat_fast.report.html import Child, Html, image, join, table, tag
from arat_fast.report.page import Section
from arat_fast.report.run import Run, count
from arat_fast.report.words import NARROW_SPACE, plain

ATTACKER_PAGE = "attacker.html"

_ARRAYS = ("surface", "attacker")
_PARTS = ("gradient-conflict", "mixture", "surface", "masking", "attacker")
_NAMES = {
    "gradient": "There is a gradient",
    "steps": "More steps",
    "restarts": "More restarts",
    "radius": "Larger balls",
    "full range": "No limit",
    "random": "Random points",
    "black-box": "Without the gradient",
    "transfer": "From another network",
}


@dataclass(frozen=True)
class Analyses:
    """What the folder ``analysis`` of a run holds.

    Attributes:
        records: JSON by part; parts that are absent, cannot be read or are of another state of the
            training are left out.
        arrays: NPZ by part, likewise.
        notes: what was left out, in words.
    """

    records: Mapping[str, Mapping[str, Any]]
    arrays: Mapping[str, Mapping[str, NDArray[Any]]]
    notes: tuple[str, ...]


def read_analyses(folder: Path, steps: int | None = None) -> Analyses:
    """Read what ``arat-fast analyze`` wrote.

    Args:
        folder: the folder ``analysis``; it may be absent.
        steps: that the run has trained, >= 0; None where it is not known, or no matter.
    """
    records: dict[str, Mapping[str, Any]] = {}
    arrays: dict[str, Mapping[str, NDArray[Any]]] = {}
    notes = []
    for part in _PARTS:
        file = folder / f"{part}.json"
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            notes.append(f"analysis/{file.name} cannot be read; it is left out here.")
            continue
        before = count(content.get("steps"))
        if before is not None and steps is not None and before != steps:
            notes.append(
                f"analysis/{file.name} is of step {before:,}, the run has trained {steps:,} steps; "
                "it is left out here. arat-fast analyze makes it again."
            )
            continue
        records[part] = content
    for part in _ARRAYS:
        file = folder / f"{part}.npz"
        if part not in records or not file.is_file():
            continue
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays[part] = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            notes.append(f"analysis/{file.name} cannot be read; it is left out here.")
    return Analyses(records, arrays, tuple(notes))


def draw_analyses(analyses: Analyses, lines: Any = ()) -> dict[str, Drawing]:
    """Every plot that the records allow, by the name of its file.

    Args:
        analyses: of one network.
        lines: the analysis lines of its run's metrics.jsonl.

    Records that somebody changed by hand may lack what a plot needs; it is left out then.
    """
    records, arrays = analyses.records, analyses.arrays
    mixture = records.get("mixture")
    makers: dict[str, Callable[[], Drawing | None]] = {
        "gradient-conflict": lambda: conflict_over_time(lines),
        "gradient-conflict-layers": lambda: conflict_by_layer(records["gradient-conflict"]),
        "mixture": lambda: mixture_over_time({"": [lines]}),
        "mixture-layers": lambda: mixture_by_layer({"": [mixture]} if mixture else {}),
        "surface": lambda: surface_panels(arrays["surface"], records["surface"]),
        "masking": lambda: masking_curves(records["masking"]),
        "margins": lambda: margin_histogram(arrays["attacker"]),
        "confusion": lambda: confusion_panel(records["attacker"]),
    }
    drawings = {}
    for name, make in makers.items():
        try:
            drawing = make()
        except (KeyError, TypeError, ValueError, IndexError):
            continue
        if drawing is not None:
            drawings[name] = drawing
    return drawings


def training_html(run: Run, analyses: Analyses, drawings: Mapping[str, Drawing]) -> Html | None:
    """Gradient conflict and mixture distribution: words and plots; None without any."""
    last = run.analyses[-1] if run.analyses else {}
    conflict = analyses.records.get("gradient-conflict") or last.get("gradient_conflict") or {}
    mixture = analyses.records.get("mixture") or last.get("mixture") or {}
    parts: list[Child] = []
    for title, words, names in (
        ("Gradient conflict", conflict_words(conflict), ("gradient-conflict",)),
        ("Mixture distribution", mixture_words(mixture), ("mixture",)),
    ):
        shown = [drawings[n] for base in names for n in (base, f"{base}-layers") if n in drawings]
        if words or shown:
            parts.append(tag("h3", title))
            parts.append(tag("p", " ".join(words), class_="prose") if words else None)
            parts.append([_wide(drawing) for drawing in shown])
    return join(parts) if parts else None


def trust_html(analyses: Analyses, drawings: Mapping[str, Drawing]) -> Html | None:
    """The verdict on masked gradients, and where to see more; None without a check."""
    parts: list[Child] = [
        tag("div", [tag("p", note) for note in analyses.notes], class_="notice")
        if analyses.notes
        else None
    ]
    record = analyses.records.get("masking")
    if record:
        parts += [_verdict(record), _wide_of(drawings, "masking")]
    if "attacker" in analyses.arrays:
        link = tag("a", "What an attacker sees", href=ATTACKER_PAGE)
        parts.append(
            tag("p", link, ": images, gradients, margins and confusions, on a page of its own.")
        )
    return join(parts) if any(parts) else None


def attacker_sections(
    run: Run, analyses: Analyses, drawings: Mapping[str, Drawing]
) -> list[Section]:
    """The sections of the page on what an attacker sees; empty without its arrays."""
    view, record = analyses.arrays.get("attacker"), analyses.records.get("attacker")
    if view is None or record is None:
        return []
    try:
        gallery = _gallery(view)
        routes = _routes(record)
    except (KeyError, TypeError, ValueError, IndexError):
        return []
    overview = join(
        [
            tag("p", " ".join(attacker_words(record)), class_="prose"),
            tag(
                "div",
                [
                    drawings[n].to_plot().to_html()
                    for n in ("margins", "confusion")
                    if n in drawings
                ],
                class_="panels",
            ),
            routes,
        ]
    )
    surface = analyses.records.get("surface")
    candidates: list[tuple[str, str, Html | None]] = [
        ("overview", "What the attack does", overview),
        ("images", "Images, as the attack sees them", gallery),
        (
            "surface",
            "Around the images",
            join([tag("p", " ".join(surface_words(surface or {}))), _wide_of(drawings, "surface")])
            if "surface" in drawings
            else None,
        ),
        ("trust", "Can it be trusted?", _trust_in_full(analyses, drawings)),
    ]
    return [Section(anchor, title, body) for anchor, title, body in candidates if body]


def attacker_opening(run: Run, analyses: Analyses) -> Html:
    """Title and lead of the page."""
    record = analyses.records["attacker"]
    where = f"recipe {run.setting('recipe')} · seed {plain(run.setting('seed'))} · run {run.name}"
    norm = "L∞" if record.get("norm") == "Linf" else record.get("norm")
    lead = (
        f"PGD-{record.get('num_steps')} on {plain(record.get('num_samples'))} "
        f"{record.get('split')} images, radius {plain(record.get('eps'))} in {norm}. The attacker "
        "knows every weight and follows the gradient of the loss with respect to the image."
    )
    return Html(
        tag("p", where, class_="eyebrow")
        + tag("h1", "What an attacker sees")
        + tag("p", lead, class_="lead")
        + tag("p", tag("a", "Back to the report", href="report.html"))
    )


def _trust_in_full(analyses: Analyses, drawings: Mapping[str, Drawing]) -> Html | None:
    record = analyses.records.get("masking")
    if not record:
        return None
    checks = record.get("checks")
    rows = [
        [
            _NAMES.get(str(check.get("name")), str(check.get("name"))),
            "✓ as it must be" if check.get("passed") else tag("b", "✗ warning"),
            str(check.get("text")),
        ]
        for check in (checks if isinstance(checks, list) else ())
        if isinstance(check, dict)
    ]
    return join(
        [
            _verdict(record),
            _wide_of(drawings, "masking"),
            table(["Check", "Outcome", "What was found"], rows, class_="checks"),
        ]
    )


def _verdict(record: Mapping[str, Any]) -> Html:
    words = masking_words(record)
    if record.get("passed") is False:
        return tag("div", [tag("p", sentence) for sentence in words], class_="notice")
    return tag("p", " ".join(words), class_="prose")


def _wide_of(drawings: Mapping[str, Drawing], name: str) -> Html | None:
    return _wide(drawings[name]) if name in drawings else None


def _wide(drawing: Drawing) -> Html:
    plot = drawing.to_plot()
    return tag(
        "figure",
        tag("h3", plot.title),
        image(plot.svg, "image/svg+xml", plot.alt, class_="plot"),
        tag("figcaption", plot.caption),
        class_="panel whole",
    )


def _routes(record: Mapping[str, Any]) -> Html | None:
    routes, classes = record["routes"], record["classes"]
    if not routes:
        return None
    text = ", ".join(f"{classes[t]} → {classes[p]} ({n})" for t, p, n in routes)
    return tag("p", "The most frequent ways from right to wrong: ", text, ".", class_="small")


def _gallery(view: Mapping[str, NDArray[Any]]) -> Html:
    x, x_adv, saliency = view["x"], view["x_adv"], view["saliency"]
    delta = x_adv - x
    largest = float(np.abs(delta).max()) or 1.0
    classes = [str(name) for name in view["classes"]]
    cards = []
    for row, index in enumerate(view["index"]):
        strongest = float(np.abs(saliency[row]).max()) or 1.0
        label = int(view["y"][index])
        pictures = [
            (x[row], "clean", _reading(view, classes, int(index), "clean")),
            (x_adv[row], "attacked", _reading(view, classes, int(index), "adv")),
            (0.5 + 0.5 * delta[row] / largest, "change", ["up to", f"±{largest:.3g}"]),
            (0.5 + 0.5 * saliency[row] / strongest, "gradient", ["white", "is uphill"]),
        ]
        fooled = int(view["pred_adv"][index]) != label
        cards.append(
            tag(
                "article",
                tag(
                    "header",
                    tag("span", "is ", tag("b", classes[label])),
                    tag(
                        "span",
                        f"margin {_margin(view, 'clean', index)} → {_margin(view, 'adv', index)}",
                        class_="verdict",
                    ),
                ),
                tag(
                    "div",
                    [
                        tag(
                            "figure",
                            image(
                                to_png(pixels.astype(np.float32)),
                                "image/png",
                                f"{kind} image of {classes[label]}: {', '.join(words)}",
                            ),
                            tag(
                                "figcaption",
                                tag("span", kind, class_="kind"),
                                [tag("span", part) for part in words],
                            ),
                        )
                        for pixels, kind, words in pictures
                    ],
                    class_="triple four",
                ),
                class_="card wrong" if fooled else "card right",
            )
        )
    legend = (
        "Below the images stand the answer and how sure the network is of it. Change and gradient: "
        "mid grey is none; each gradient is scaled to its own largest value and is that of the "
        "cross-entropy at the clean image. First come images that the attack turned, then others."
    )
    return join([tag("p", legend, class_="small"), tag("div", cards, class_="cards")])


def _margin(view: Mapping[str, NDArray[Any]], suffix: str, index: int) -> str:
    return f"{view[f'margin_{suffix}'][index]:.1f}".replace("-", "−")


def _reading(
    view: Mapping[str, NDArray[Any]], classes: list[str], index: int, suffix: str
) -> list[str]:
    prediction = int(view[f"pred_{suffix}"][index])
    mark = "✓" if prediction == int(view["y"][index]) else "✗"
    sure = f"{100 * float(view[f'prob_{suffix}'][index]):.0f}{NARROW_SPACE}%"
    return [f"{mark} {classes[prediction]}", sure]
