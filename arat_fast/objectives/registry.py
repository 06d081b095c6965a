"""Objectives by name: the built-in ones, found in this package, and anybody's by import path."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import sys
from pathlib import Path

from arat_fast.objectives.base import Objective


def _built_in() -> dict[str, type[Objective]]:
    found: dict[str, type[Objective]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "registry":
            content = importlib.import_module(f"arat_fast.objectives.{module.name}")
            for _, value in inspect.getmembers(content, inspect.isclass):
                if issubclass(value, Objective) and "name" in value.__dict__ and value.name:
                    found[value.name] = value
    return found


OBJECTIVES: dict[str, type[Objective]] = _built_in()
"""Every class of this package that has a name, by its name."""

_imported: dict[str, type[Objective]] = {}


def known_objective(name: str) -> type[Objective] | None:
    """A built-in objective, or one that this process has imported by its path already."""
    return OBJECTIVES.get(name) or _imported.get(name)


def objective_type(name: str) -> type[Objective]:
    """The class of an objective; imports its module, so that the name must come from the user.

    Args:
        name: one of :data:`OBJECTIVES`, or ``mypackage.mymodule:MyObjective``; the module is looked
            for where Python looks, and in the current folder.

    Raises:
        ValueError: there is none, or it is no :class:`Objective`.
    """
    known = known_objective(name)
    if known is not None:
        return known
    module, _, attribute = name.partition(":")
    if not attribute:
        close = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"unknown objective {name!r}, expected one of {', '.join(OBJECTIVES)}, or your own as "
            f"mypackage.mymodule:MyObjective{hint}"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective.name={name} cannot be imported: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, Objective)):
        raise ValueError(f"{name} is no subclass of arat_fast.objectives.Objective, got {found!r}")
    _imported[name] = found
    return found


def objective_label(name: str) -> str:
    """What tables and plots call an objective, also where its module was not imported."""
    known = known_objective(name)
    return name.rpartition(":")[2] if known is None else known.label
