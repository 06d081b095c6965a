"""The pages: templates that escape whatever they are given, and words for numbers in them."""

from __future__ import annotations

import base64
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from arat_fast.report import words

_PACKAGE = Path(__file__).resolve().parent.parent


def render(name: str, **values: Any) -> str:
    """A template, filled in.

    Values are escaped in every template but those of plain text (``*.md.j2``). The filters are
    functions of :mod:`arat_fast.report.words` and :func:`data_uri`; ``contents`` is the list in
    which the sections of a page name themselves.

    Args:
        name: file in the folder ``templates`` of report, compare or export.
        values: by the names that the template has for them.

    Raises:
        LookupError: a value that the template needs is missing.
    """
    try:
        return _environment().get_template(name).render(**values, contents=[])
    except UndefinedError as error:
        raise LookupError(error.message) from error


@lru_cache
def _environment() -> Environment:
    folders = [_PACKAGE / part / "templates" for part in ("report", "compare", "export")]
    environment = Environment(
        loader=FileSystemLoader(folders),
        extensions=["jinja2.ext.do"],
        autoescape=lambda name: name is None or not name.endswith(".md.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    functions = (
        words.detail_name,
        words.duration,
        words.grouped,
        words.interval,
        words.metric_name,
        words.objective_name,
        words.percent,
        words.plain,
        data_uri,
    )
    environment.globals["zip"] = zip
    environment.filters |= {function.__name__: function for function in functions}
    return environment


def data_uri(content: bytes, media_type: str) -> str:
    """A file as an address that a page can hold in itself."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
