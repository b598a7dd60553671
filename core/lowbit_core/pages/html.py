"""One page in the one look: text, tables, and charts with their numbers beside them; no other file, no network.

The charts are drawn by Vega, Vega-Lite and vega-embed (BSD-3), which the package vl-convert-python brings as one script
of 0.9 MB. Beside plotly (4.8 MB) and bokeh (1.3 MB, on a canvas, and nine packages that it needs) it makes the smallest
page, and is one wheel without dependencies. The tables stand without scripts.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape

from lowbit_core.pages.chart import Chart, Table

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1.25rem;
  color: #212529; background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem } ul { margin: .3rem 0; padding-left: 1.2rem; font-size: .92rem }
pre { background: #f6f7f8; padding: .6rem .8rem; font-size: .84rem; white-space: pre-wrap }
p { margin: .35rem 0 } .quiet { color: #5c636a; font-size: .9rem }
.verdict { border-left: 5px solid #5c636a; background: #f6f7f8; padding: .7rem 1rem; margin: 1.1rem 0 }
.verdict.good { border-color: #2b8a3e; background: #f4faf5 }
.verdict.open { border-color: #e67700; background: #fff9ef }
.verdict.bad { border-color: #c92a2a; background: #fdf3f3 }
.verdict strong { font-size: 1.1rem } .verdict ul { margin: .4rem 0 0; padding-left: 1.2rem; font-size: .92rem }
.warning { background: #fff3bf; padding: .5rem .8rem }
.wide { overflow-x: auto; margin-bottom: 1.2rem }
table { border-collapse: collapse; font-size: .84rem; overflow-wrap: normal }
th { color: #5c636a; font-weight: 500; vertical-align: bottom }
td, th { padding: 4px 8px; border-bottom: 1px solid #e9ecef; text-align: right } td { white-space: nowrap }
td:first-child, th:first-child { text-align: left; padding-left: 0 } td small { color: #5c636a; display: block }
tr.best td { background: #f4faf5 }
figure { margin: 0 0 1.6rem; display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: .3rem 1.6rem;
  align-items: start; break-inside: avoid }
figcaption { grid-column: 1 / -1; font-weight: 600 } figcaption .quiet { font-weight: normal; margin: 0 }
.chart { width: 100% } .chart svg { display: block; max-width: 100% }
.numbers { overflow: auto; max-height: 340px } .numbers td { white-space: normal }
.numbers small { white-space: nowrap }
.numbers td:first-child { min-width: 4.5rem }
#vg-tooltip-element { font-family: inherit }
@media (max-width: 760px) { body { margin: 1rem auto; padding: 0 .8rem }
  figure { grid-template-columns: minmax(0, 1fr) }
  .numbers { max-height: 260px } }
@media print { body { max-width: none; margin: 0; font-size: 11pt } .numbers { max-height: none; overflow: visible }
  figure { grid-template-columns: minmax(0, 6fr) minmax(0, 5fr); gap: .3rem 1rem } .numbers table { font-size: .66rem }
  .numbers td, .numbers th { padding: 2px 4px } .numbers small { white-space: normal }
  .wide { overflow: visible } .wide table { font-size: .62rem } h2 { break-after: avoid }
  #vg-tooltip-element { display: none } }
"""
SNIPPET = "window.vegaEmbed = vegaEmbed;"  # what the bundle gives to the page
DRAW = """
for (const place of document.querySelectorAll(".chart"))
  vegaEmbed(place, JSON.parse(place.nextElementSibling.textContent), {actions: false, renderer: "svg"});
"""


def page(title: str, parts: Sequence[str | Chart]) -> str:
    """A whole document; `parts` are pieces of HTML and charts."""
    body = "".join(part if isinstance(part, str) else figure(part) for part in parts)
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    drawn = any(isinstance(part, Chart) and part.spec for part in parts)
    script = f"<script>{library()}</script><script>{DRAW}</script>" if drawn else ""
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>{body}{script}</body></html>\n"


@cache
def library() -> str:
    """Vega with everything it needs, for a script element; taking it out of its package takes two seconds."""
    from vl_convert import javascript_bundle

    return javascript_bundle(SNIPPET).replace("</script", "<\\/script")


def figure(chart: Chart) -> str:
    """The picture and its numbers; the numbers alone where nothing is drawn, a sentence where there are none."""
    note = f'<p class="quiet">{escape(chart.note)}</p>' if chart.note else ""
    caption = f"<figcaption>{escape(chart.title)}{note}</figcaption>"
    if not chart.table.rows:
        return f"<figure>{caption}<p>Nothing was measured.</p></figure>"
    numbers = f'<div class="numbers">{table(chart.table)}</div>'
    if chart.spec is None:
        return f"<figure>{caption}{numbers}</figure>"
    label = escape(f"{chart.title}; the table holds its numbers")
    spec = json.dumps(chart.spec, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return (
        f'<figure>{caption}<div><div class="chart" role="img" aria-label="{label}"></div>'
        f'<script type="application/json">{spec}</script></div>{numbers}</figure>'
    )


def table(one: Table, best: Sequence[str | None] = ()) -> str:
    """Rows and columns; an interval in brackets stands small under its value, and rows named in `best` are marked."""
    head = "".join(f"<th>{escape(name)}</th>" for name in one.columns)
    rows = "".join(
        f"<tr{' class=best' if row[0] in best else ''}>"
        + "".join(f"<td>{_cell(cell)}</td>" for cell in row)
        + "</tr>"
        for row in one.rows
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def wide(one: Table, best: Sequence[str | None] = ()) -> str:
    """A table of its own that may scroll sideways on a phone."""
    return f'<div class="wide">{table(one, best)}</div>'


def verdict(kind: str, sentence: str, reasons: Sequence[str] = ()) -> str:
    """The one thing to read: `kind` is good, open or bad."""
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    reasons_list = f"<ul>{items}</ul>" if items else ""
    return f'<div class="verdict {kind}"><strong>{escape(sentence)}</strong>{reasons_list}</div>'


def heading(text: str) -> str:
    """The page's own."""
    return f"<h1>{escape(text)}</h1>"


def paragraph(text: str, kind: str = "") -> str:
    """A sentence, `quiet` or a `warning`."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def bullets(sentences: Iterable[str]) -> str:
    """One below the other."""
    return "<ul>" + "".join(f"<li>{escape(one)}</li>" for one in sentences) + "</ul>"


def code(lines: Iterable[str]) -> str:
    """Lines for a shell."""
    return "<pre>" + escape("\n".join(lines)) + "</pre>"


def _cell(text: str) -> str:
    value, bracket, interval = escape(text).partition(" [")
    return f"{value}<small>[{interval}</small>" if bracket else value
