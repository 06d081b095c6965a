"""The optional packages."""

from __future__ import annotations


def install_command(extra: str) -> str:
    """How to install the packages of an extra, for messages.

    Args:
        extra: its name in pyproject.toml.
    """
    return f"pip install -e '.[{extra}]' in the checkout of arat_fast"
