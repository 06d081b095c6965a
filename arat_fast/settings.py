"""Typed settings whose limits are declared once, in their types, and checked by one function."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have: ``Annotated[float, Range(low=0)]``.

    Args:
        above, below: limits that do not belong to it; None for none.
        low, high: limits that do.
    """

    above: float | None = None
    low: float | None = None
    below: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        # A NaN fails every comparison.
        return (
            (self.above is None or value > self.above)
            and (self.low is None or value >= self.low)
            and (self.below is None or value < self.below)
            and (self.high is None or value <= self.high)
        )

    def __str__(self) -> str:
        left = f"> {self.above:g}" if self.above is not None else f">= {self.low:g}"
        if self.below is None and self.high is None:
            return left
        start = f"({self.above:g}" if self.above is not None else f"[{self.low:g}"
        end = f"{self.below:g})" if self.below is not None else f"{self.high:g}]"
        return f"in {start}, {end}"


class _Free:
    """Marks a setting that does not change the weights; see :data:`FREE`."""


FREE = _Free()
"""``Annotated[int, FREE]``: may differ when a run is resumed, since it does not change weights."""

Count = Annotated[int, Range(low=1)]
Number = Annotated[int, Range(low=0)]
Weight = Annotated[float, Range(low=0)]
Positive = Annotated[float, Range(above=0)]

NormName = Literal["Linf", "L2", "L1"]
"""A norm, on the command line and in records; :data:`arat_fast.attacks.NORMS` has them."""


def check_settings(section: str, settings: Any) -> None:
    """Compare every field of a dataclass with the limits in its type; tuples element by element.

    Args:
        section: what the fields belong to, for the message: ``SECTION.FIELD must be …``.
        settings: instance of a dataclass.

    Raises:
        ValueError: names the first field that is outside of its range or its choices.
    """
    for name, (limits, choices, _) in _declared(settings.__class__).items():
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        for one in values:
            for limit in limits:
                if one not in limit:
                    raise ValueError(f"{section}{name} must be {limit}, got {one!r}")
            if choices and one not in choices:
                raise ValueError(
                    f"{section}{name} must be one of {', '.join(choices)}, got {one!r}"
                )


def free_fields(settings_type: type) -> frozenset[str]:
    """Names of the fields that are marked with :data:`FREE`."""
    return frozenset(name for name, (*_, free) in _declared(settings_type).items() if free)


@cache
def meanings(settings_type: type) -> dict[str, str]:
    """What the docstring below each field of a dataclass says, in one line, by field; none of a
    class without source, as one of an interactive session, or inside a function."""
    found = {}
    for part in reversed(settings_type.__mro__[:-1]):
        scope = _body(part.__module__)
        for name in part.__qualname__.split("."):
            classes = (inner for inner in scope if isinstance(inner, ast.ClassDef))
            scope = next((inner.body for inner in classes if inner.name == name), [])
        for declared, text in pairwise(scope):
            match declared, text:
                case (
                    ast.AnnAssign(target=ast.Name(name)),
                    ast.Expr(value=ast.Constant(str(words))),
                ):
                    found[name] = " ".join(words.split())
    return found


@cache
def _body(module: str) -> list[ast.stmt]:
    """A module's statements: :func:`inspect.getsource` would parse them for each of its classes."""
    with suppress(OSError, TypeError):
        return ast.parse(inspect.getsource(sys.modules[module])).body
    return []


@cache
def _declared(settings_type: type) -> dict[str, tuple[list[Range], list[str], bool]]:
    hints = get_type_hints(settings_type, include_extras=True)
    return {field.name: _parts(hints[field.name]) for field in dataclasses.fields(settings_type)}


def _parts(hint: Any) -> tuple[list[Range], list[str], bool]:
    """Ranges, choices and whether it is free, anywhere inside a type."""
    if get_origin(hint) is Literal:
        return [], list(get_args(hint)), False
    ranges = [part for part in get_args(hint) if isinstance(part, Range)]
    choices: list[str] = []
    free = FREE in get_args(hint)
    for part in get_args(hint):
        inner = _parts(part)
        ranges, choices, free = ranges + inner[0], choices + inner[1], free or inner[2]
    return ranges, choices, free


def shown(value: float) -> str:
    """A number as the command line reads it; a level of a pixel as a fraction, 8/255."""
    level = round(255 * value)
    is_level = level / 255 == value and len(str(value)) > 8
    return f"{level}/255" if is_level else str(value)
