"""The methods of a comparison: what each sets beside the recipe."""

from __future__ import annotations

import difflib
import re
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from arat_fast.objectives import OBJECTIVES


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


_TITLES = {
    "natural": "Natural",
    "at": "AT",
    "trades": "TRADES",
    "mart": "MART",
    "lbgat": "LBGAT",
    "arrest": "ARREST",
    "arat": "ARAT",
}


def _objective(name: str) -> Method:
    return Method(name, _TITLES.get(name, name), ("--objective.name", name))


def _switches(stop_gradient: bool, predictor: bool, split: bool) -> tuple[str, ...]:
    return (
        *("--objective.name", "arat"),
        f"--objective.{'' if stop_gradient else 'no-'}stop-gradient",
        f"--objective.{'' if predictor else 'no-'}predictor",
        *("--model.norm", "split" if split else "shared"),
    )


# An objective of one's own is given in Python, which no command line can.
_NAMES = list(OBJECTIVES)
METHODS: dict[str, Method] = {
    **{name: _objective(name) for name in dict.fromkeys((*_TITLES, *_NAMES))},
    "arat+swa": Method(
        "arat+swa",
        "ARAT + SWA",
        ("--objective.name", "arat", "--average.kind", "swa"),
    ),
}
"""Every objective under its own name, and ARAT with averaged weights."""

ABLATION: tuple[Method, ...] = (
    Method("naive", "Naive invariance", _switches(False, False, False), True),
    Method("naive+stop-gradient", "+ stop-gradient", _switches(True, False, False), True),
    Method("naive+predictor", "+ predictor", _switches(False, True, False), True),
    Method("naive+split-bn", "+ split BN", _switches(False, False, True), True),
)
"""Naive invariance (one BatchNorm, gradient to both sides, no predictor) and each part added to it
alone; all of them together are ``arat``."""


def choose_methods(
    labels: Sequence[str], variants: Sequence[str] = (), ablation: bool = False
) -> list[Method]:
    """The rows of a comparison.

    Args:
        labels: of METHODS or of the variants, in the order of the table.
        variants: "NAME: overrides" each; one that has the name of a method replaces it.
        ablation: add the ablation's rows, and ARAT beside which they stand.

    Raises:
        ValueError: a label is unknown or comes twice, or a variant cannot be read.
    """
    given = [_variant(text) for text in variants]
    twice = {m.label for m in given if sum(m.label == n.label for n in given) > 1}
    if twice:
        raise ValueError(f"two variants are called {sorted(twice)[0]!r}: name each differently")
    known = {**METHODS, **{m.label: m for m in ABLATION}, **{m.label: m for m in given}}
    chosen: dict[str, Method] = {}
    for label in (*labels, *(m.label for m in given if m.label not in labels)):
        if label not in known:
            close = difflib.get_close_matches(label, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"unknown objective {label!r}, expected one of {', '.join(METHODS)} or the name "
                f"of a --variant{hint}"
            )
        if label in chosen and label in labels:
            raise ValueError(f"--objectives names {label!r} twice")
        chosen[label] = known[label]
    if ablation:
        chosen.setdefault("arat", known["arat"])
        for method in ABLATION:
            chosen.setdefault(method.label, known[method.label])
    return list(chosen.values())


def _variant(text: str) -> Method:
    title, colon, options = text.partition(":")
    title = title.strip()
    # Composed: an accent of its own is no letter, and two spellings would be two folders.
    name = unicodedata.normalize("NFC", title.lower())
    label = re.sub(r"[^\w.+]+|_+", "-", name).strip("-.")
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
