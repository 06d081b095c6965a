"""The optional packages."""

from __future__ import annotations

import importlib
from typing import Any


def install_command(extra: str) -> str:
    """How to install the packages of an extra, for messages.

    Args:
        extra: its name in pyproject.toml.
    """
    return f"pip install -e '.[{extra}]' in the checkout of arat_fast"


def needed(extra: str, package: str) -> Any:
    """A package of an extra, imported.

    Raises:
        ValueError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} is not installed: {install_command(extra)}") from error
