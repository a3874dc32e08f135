"""A comparison as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from html import escape

from automerge._comparison import COLUMNS, Comparison

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.best td { background: #e7f3e7; font-weight: 600; }
tr.worse td { color: #a33; }
tr.ends td { color: #666; background: #f6f6f6; }
p.lead { font-size: 1.1rem; } ul { color: #555; font-size: .9rem; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; } img { max-width: 100%; }
"""


def page(comparison: Comparison) -> str:
    """The table, the recommendation, and the pictures, with everything inline."""
    best = comparison.best()
    rows = [_row(cells, "ends") for cells in comparison.ends()]
    for row in comparison.rows:
        kind = "best" if row is best else "worse" if row.worse_than_naive or row.error else ""
        rows.append(_row(row.cells(), kind))
    head = "".join(f"<th>{escape(c)}</th>" for c in COLUMNS)
    notes = "".join(f"<li>{escape(n)}</li>" for n in comparison.footnotes())
    pictures = "".join(_picture(title, data) for title, data in comparison.pictures.items())
    samples = ", ".join(f"{n} to {escape(k)}" for k, n in comparison.samples.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>automerge compare</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>Merging {len(comparison.models)} models</h1>\n"
        f'<p class="lead">{escape(comparison.recommendation())}</p>\n<p>Samples: {samples}.</p>\n'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>\n"
        f"<ul>{notes}</ul>\n{pictures}\n</body></html>\n"
    )


def _row(cells: list[str], kind: str) -> str:
    inner = "".join(f"<td>{escape(c)}</td>" for c in cells)
    return f'<tr class="{kind}">{inner}</tr>' if kind else f"<tr>{inner}</tr>"


def _picture(title: str, data: bytes) -> str:
    text = base64.b64encode(data).decode("ascii")
    name = escape(title)
    return f'<figure><img alt="{name}" src="data:image/png;base64,{text}"><figcaption>{name}</figcaption></figure>'
