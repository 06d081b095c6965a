"""The page that holds a report's sections; needs nothing from outside, prints, fits a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arat_fast.report.html import Html, join, tag

# Even if something slipped through the escaping, the browser would load and run nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_CSS = """
:root { color-scheme: light; --ink: #1c2330; --soft: #5b6472; --line: #d9dde3; --paper: #f6f7f9;
  --blue: #0072b2; --red: #b34700; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans",
  "DejaVu Sans", Arial, sans-serif; overflow-wrap: break-word; }
td, th, .card, .eyebrow { overflow-wrap: anywhere; }
.wide td:nth-child(2), .wide td:nth-child(3), .wide td:nth-child(4), thead th {
  white-space: nowrap; }
.wide td > span { display: block; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 32px 64px; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 1.35rem; margin: 0 0 12px; }
h3 { font-size: 1rem; margin: 0 0 4px; }
p { margin: 0 0 12px; }
ul { margin: 0; padding-left: 1.2em; }
li { margin-bottom: 6px; }
main > section { border-top: 1px solid var(--line); margin-top: 36px; padding-top: 28px; }
.eyebrow, .small, figcaption, .kind { color: var(--soft); font-size: 0.86rem; }
.eyebrow { margin-bottom: 4px; }
.lead { font-size: 1.1rem; max-width: 52em; margin-bottom: 24px; }
.prose { max-width: 52em; }
.prose h3:not(:first-child) { margin-top: 18px; }
.notice { border: 1px solid #c9a227; border-left-width: 6px; background: #fffaeb;
  padding: 10px 14px; margin: 0 0 16px; border-radius: 4px; }
.notice p { margin: 0; }
.notice p + p { margin-top: 6px; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 16px; }
.number { border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px; }
.number p { margin: 0; font-size: 0.9rem; color: var(--soft); }
.number-name b { display: block; color: var(--ink); font-size: 1.05rem; }
.number .value { font-size: 2.9rem; line-height: 1.15; font-weight: 650; color: var(--ink);
  font-variant-numeric: tabular-nums; margin: 4px 0 2px; }
.value small { font-size: 0.5em; font-weight: 500; }
.bar { display: block; margin: 0 0 8px; overflow: visible; }
.panels { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 32px 28px; }
.panel { margin: 0; break-inside: avoid; }
.panel figcaption { margin-top: 2px; }
.plot { display: block; width: 100%; height: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px;
  margin: 0 0 12px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px 8px;
  break-inside: avoid; }
.card.wrong { border: 2px solid var(--ink); padding: 9px 11px 7px; }
.card header { display: flex; justify-content: space-between; gap: 10px; margin-bottom: 6px; }
.verdict { font-size: 0.86rem; color: var(--soft); text-align: right; }
.wrong .verdict { color: var(--ink); font-weight: 650; }
.triple { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 8px; }
.triple.four { grid-template-columns: repeat(4, minmax(0, 1fr)); }
.whole { margin-bottom: 24px; }
.checks th, .checks td { padding: 8px 14px 8px 0; }
.checks th:first-child, .checks td:nth-child(2) { white-space: nowrap; }
.triple figure { margin: 0; }
.triple img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  image-rendering: pixelated; background: var(--paper); border: 1px solid var(--line); }
.triple figcaption { line-height: 1.3; margin-top: 3px; color: var(--ink); font-size: 0.84rem; }
.triple figcaption span { display: block; }
.reading.miss b { text-decoration: underline; text-decoration-thickness: 2px;
  text-underline-offset: 2px; }
table { border-collapse: collapse; width: 100%; margin: 0 0 12px; }
th { text-align: left; font-weight: 500; vertical-align: top; }
td { vertical-align: top; font-variant-numeric: tabular-nums; }
thead th { color: var(--soft); font-size: 0.86rem; border-bottom: 2px solid var(--line); }
.runs th, .runs td, .wide th, .wide td { padding: 8px 14px 8px 0; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
.big { font-weight: 650; }
.runs td > span, .runs th > span, .runs .small { display: block; }
.who { display: flex; gap: 10px; align-items: flex-start; }
.letter { flex: none; font-weight: 700; border: 1.5px solid var(--ink); border-radius: 50%;
  width: 1.75em; height: 1.75em; line-height: 1.55em; text-align: center; font-size: 0.86rem; }
.runs .badge { display: inline-block; color: var(--ink); font-size: 0.8rem; margin: 0 0 0 8px;
  border: 1px solid var(--ink); border-radius: 3px; padding: 0 6px; }
.runs .difference .small { display: inline-block; font-size: 0.8rem; white-space: nowrap;
  margin-left: 0.35em; }
.runs { table-layout: fixed; }
.runs thead th:first-child { width: 22%; }
.runs thead th:nth-child(n+5):nth-last-child(2) { width: 11%; }
.runs thead th:last-child { width: 13%; }
.options th, .options td { padding: 8px 14px 8px 0; }
.options { table-layout: fixed; }
.options thead th:first-child { width: 22%; }
.options code { font-size: 0.86rem; white-space: pre-wrap; }
.difference { margin-top: 2px; }
.cell-name { display: none !important; }
.runs + h3 { margin-top: 20px; }
.columns { columns: 3 260px; column-gap: 32px; }
.columns section { break-inside: avoid; margin-bottom: 18px; }
.pairs { font-size: 0.88rem; margin: 0; }
.pairs th, .pairs td { padding: 3px 8px 3px 0; width: 50%; }
.pairs th { color: var(--soft); }
.pairs td .small { display: block; font-size: 0.8rem; }
.pairs .changed th, .pairs .changed td { color: var(--ink); font-weight: 650; }
.pairs .changed .small { font-weight: 400; }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: 6px; margin: 0 0 12px;
  padding: 12px 14px; white-space: pre-wrap; font-size: 0.88rem; }
footer { color: var(--soft); font-size: 0.86rem; border-top: 1px solid var(--line);
  margin-top: 36px; padding-top: 16px; }
@media (max-width: 720px) {
  main { padding: 20px 16px 40px; }
  h1 { font-size: 1.6rem; }
  .lead { font-size: 1rem; }
  .panels { grid-template-columns: minmax(0, 1fr); }
  .cards { grid-template-columns: minmax(0, 1fr); }
  .checks th:first-child, .checks td:nth-child(2) { white-space: normal; }
  .runs thead, .wide thead { display: none; }
  .runs tr, .wide tr { display: block; padding: 8px 0; }
  .runs tbody tr + tr, .wide tbody tr + tr { border-top: 1px solid var(--line); }
  .runs th, .runs td, .wide th, .wide td { display: block; padding: 2px 0; border: 0 !important; }
  .runs td, .wide td { padding-left: 42%; position: relative; min-height: 1.6em; }
  .runs td > .cell-name, .wide td > .cell-name { display: block !important; position: absolute;
    left: 0; width: 40%; color: var(--soft); font-size: 0.86rem; }
}
@media print {
  @page { margin: 14mm; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  tr, .number, .notice { break-inside: avoid; }
  .numbers, .cards { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 10px; }
  .number .value { font-size: 2.2rem; }
  .number { padding: 10px 12px; }
  .notice, .triple img, pre { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes:
        anchor: its id in the page.
        title: its heading.
        body: what stands under it.
    """

    anchor: str
    title: str
    body: Html


def page(title: str, opening: Html, sections: Sequence[Section], closing: str) -> str:
    """A whole HTML document.

    Args:
        title: of the document.
        opening: what stands first, with the h1.
        sections: the rest, in order.
        closing: last line.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light"),
        tag("title", title),
        tag("style", Html(_CSS)),
    )
    parts = [
        tag("section", tag("h2", section.title), section.body, id=section.anchor)
        for section in sections
    ]
    body = tag("body", tag("main", tag("header", opening), parts, tag("footer", closing)))
    return f"<!doctype html>\n{tag('html', join([head, body]), lang='en')}\n"
