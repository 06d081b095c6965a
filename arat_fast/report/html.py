"""HTML that is escaped unless it says it is HTML already."""

from __future__ import annotations

import base64
import html
import unicodedata
from collections.abc import Iterable
from typing import TypeAlias


class Html(str):
    """Finished HTML; every other string is escaped when it enters a page."""


Child: TypeAlias = "str | None | Iterable[Child]"
_JOINERS = "\u200c\u200d"
_VOID = frozenset({"img", "meta", "br"})


def escape(text: str) -> Html:
    """Text as HTML, safe in content and in quoted attributes."""
    if isinstance(text, Html):
        return text
    return Html(html.escape("".join(c for c in text if _is_visible(c))))


def join(children: Iterable[Child]) -> Html:
    """The children in a row; None is left out."""
    return Html("".join(_render(child) for child in children))


def tag(name: str, /, *children: Child, **attributes: str | None) -> Html:
    """One element.

    Args:
        name: of the element.
        children: strings (escaped), :class:`Html`, nested sequences of these, or None.
        attributes: ``class_`` stands for class, other underscores for hyphens; None is left out.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def image(content: bytes, media_type: str, alt: str, **attributes: str | None) -> Html:
    """An embedded image.

    Args:
        content: the image file.
        media_type: "image/png" or "image/svg+xml".
        alt: what it shows, for those who cannot see it.
        attributes: as for :func:`tag`.
    """
    data = base64.b64encode(content).decode()
    return tag("img", src=f"data:{media_type};base64,{data}", alt=alt, **attributes)


def table(
    headings: Iterable[Child], rows: Iterable[Iterable[Child]], class_: str | None = None
) -> Html:
    """A table whose first column names the row; on a narrow screen each row becomes a block."""
    names = [_render(heading) for heading in headings]
    body = []
    for row in rows:
        first, *rest = row
        cells = [tag("th", first, scope="row")]
        for name, cell in zip(names[1:], rest, strict=True):
            cells.append(tag("td", tag("span", Html(name), class_="cell-name"), cell))
        body.append(tag("tr", cells))
    head = tag("tr", [tag("th", Html(name), scope="col") for name in names])
    return tag("table", tag("thead", head), tag("tbody", body), class_=class_)


def _render(child: Child) -> Html:
    if child is None:
        return Html("")
    if isinstance(child, str):
        return escape(child)
    return join(child)


def _is_visible(character: str) -> bool:
    # Left out: control characters; marks that reverse the text after them; halves of a surrogate
    # pair, which JSON can hold and no file can.
    category = unicodedata.category(character)
    return category not in ("Cc", "Cf", "Cs") or character in "\n\t" + _JOINERS
