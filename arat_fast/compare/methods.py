"""The methods of a comparison: what each sets beside the recipe."""

from __future__ import annotations

import difflib
import re
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from arat_fast.objectives import OBJECTIVES, objective_type


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        label: short name, part of the folders' names.
        title: name in tables and plots.
        options: overrides of the recipe's configuration, as ``arat-fast train`` takes them.
        ablation: whether it is a row of the ablation rather than a method of its own.
    """

    label: str
    title: str
    options: tuple[str, ...]
    ablation: bool = False


def _switches(stop_gradient: bool, predictor: bool, split: bool) -> tuple[str, ...]:
    return (
        *("--objective.name", "arat"),
        f"--objective.{'' if stop_gradient else 'no-'}stop-gradient",
        f"--objective.{'' if predictor else 'no-'}predictor",
        *("--model.norm", "split" if split else "shared"),
    )


METHODS: dict[str, Method] = {
    kind.name: Method(kind.name, kind.label, ("--objective.name", kind.name))
    # By the year of the paper; what has none comes first.
    for kind in sorted(OBJECTIVES.values(), key=lambda o: o.paper.venue[-4:] if o.paper else "")
}
"""Every built-in objective under its own name, and ARAT with averaged weights."""
METHODS["arat+swa"] = Method(
    "arat+swa", "ARAT + SWA", ("--objective.name", "arat", "--average.kind", "swa")
)

ABLATION: tuple[Method, ...] = (
    Method("naive", "Naive invariance", _switches(False, False, False), True),
    Method("naive+stop-gradient", "+ stop-gradient", _switches(True, False, False), True),
    Method("naive+predictor", "+ predictor", _switches(False, True, False), True),
    Method("naive+split-bn", "+ split BN", _switches(False, False, True), True),
)
ALL_PARTS = _switches(True, True, True)
"""Naive invariance (one BatchNorm, gradient to both sides, no predictor) and each part added to it
alone; all of them together are ``arat``."""


def choose_methods(
    names: Sequence[str], variants: Sequence[str] = (), ablation: bool = False
) -> list[Method]:
    """The rows of a comparison.

    Args:
        names: labels of METHODS or of the variants, or objectives of one's own by import path
            (``mypackage.mymodule:MyObjective``), in the order of the table.
        variants: "NAME: overrides" each; one that has the name of a method replaces it.
        ablation: add the ablation's rows, and ARAT beside which they stand.

    Raises:
        ValueError: a name is unknown or comes twice, or a variant cannot be read.
    """
    known = {method.label: method for method in (*METHODS.values(), *ABLATION)}
    given = [_variant(text) for text in variants]
    labels = [method.label for method in given]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two variants have one name: {', '.join(labels)}; name each differently")
    known.update(zip(labels, given, strict=True))
    chosen: dict[str, Method] = {}
    for name in (*names, *(label for label in labels if label not in names)):
        method = known.get(name)
        if ":" in name:
            kind = objective_type(name)
            method = Method(_label(kind.__name__), kind.label, ("--objective.name", name))
        if method is None:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"unknown objective {name!r}, expected one of {', '.join(METHODS)}, your own as "
                f"mypackage.mymodule:MyObjective, or the name of a --variant{hint}"
            )
        if method.label in chosen:
            raise ValueError(f"--objectives names {method.label!r} twice")
        chosen[method.label] = method
    if ablation:
        for label in ("arat", *(method.label for method in ABLATION)):
            chosen.setdefault(label, known[label])
    return list(chosen.values())


def _variant(text: str) -> Method:
    title, colon, options = text.partition(":")
    title, label = title.strip(), _label(title)
    try:
        tokens = tuple(shlex.split(options))
    except ValueError as error:
        raise ValueError(f"--variant {text!r} cannot be read: {error}") from error
    if not colon or not label or not tokens or not tokens[0].startswith("--"):
        raise ValueError(
            f'--variant expects "NAME: --setting value ...", got {text!r}; for example '
            '"gamma 10: --objective.gamma 10"'
        )
    known = METHODS.get(label)
    return Method(label, known.title if known else title, tokens)


def _label(title: str) -> str:
    """A title as part of a folder's name."""
    # Composed: an accent of its own is no letter, and two spellings would be two folders.
    name = unicodedata.normalize("NFC", title.strip().lower())
    return re.sub(r"[^\w.+]+|_+", "-", name).strip("-.")
