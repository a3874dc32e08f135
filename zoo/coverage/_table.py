"""The page that the rows make, and its summary."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Sequence

from zoo.coverage._case import NAMES
from zoo.coverage._measure import TOLERANCE, Row

_PACKAGES = ("automerge", "torch", "torchvision", "timm", "transformers", "numpy", "scipy")
_COLUMNS = "model, parameters (M), seconds, MiB, groups, free, what pinned the rest, operators without a rule, verified"
_HEAD = f"| {_COLUMNS.replace(', ', ' | ')} |"
_RULE = "|:--|--:|--:|--:|--:|--:|:--|:--|:--|"


def verified(row: Row) -> bool:
    """Whether the answer passed verification."""
    return row.status == "ok" and row.error is not None and row.error <= TOLERANCE


def versions() -> str:
    """Python and the packages that matter."""
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def runnable(rows: Sequence[Row]) -> list[Row]:
    """The rows of models that build and run here at all."""
    return [r for r in rows if r.status != "setup"]


def summary(rows: Sequence[Row]) -> list[str]:
    """Totals, one line each."""
    ran = runnable(rows)
    answered = [r for r in ran if r.status == "ok"]
    good = [r for r in answered if verified(r)]
    lines = [
        f"- answered: {len(answered)} of {len(ran)} models that run",
        f"- verified at {TOLERANCE:.0e}: {len(good)} of {len(answered)}",
    ]
    for library in NAMES:
        mine = [r for r in ran if r.library == library]
        if mine:
            lines.append(f"- {library}: {len(mine)} models, {sum(map(verified, mine))} verified")
    if good:
        worst = max(good, key=lambda r: r.error or 0.0)
        lines.append(f"- largest error among the verified: {worst.error:.1e} ({worst.title})")
    if answered:
        slowest = max(answered, key=lambda r: r.cpu_seconds)
        lines.append(f"- slowest: {slowest.cpu_seconds:.1f} s ({slowest.title})")
        known = [r for r in answered if r.memory is not None]
        if known:
            most = max(known, key=lambda r: r.memory or 0)
            above = sum((r.memory or 0) > 2 * r.model + 2**30 for r in known)
            lines.append(
                f"- most memory beside the model: {_mib(most.memory)} MiB ({most.title}); above two copies of the model and "
                f"1 GiB: {above} of {len(known)}"
            )
        lines.append(
            f"- blind, because the output hardly depends on the first layers: {sum(bool(r.blind) for r in good)}"
        )
        lines.append(f"- with operators that have no rule: {sum(bool(r.unruled) for r in answered)}")
    return lines


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.0f}"


def _operators(row: Row) -> str:
    names = list(dict.fromkeys(u.split(" ")[0] for u in row.unruled))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{n}`" for n in names[:3]) + more


def _cell(text: str, length: int = 160) -> str:
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return text if len(text) <= length else text[: length - 1] + "…"


def _line(row: Row) -> str:
    pins = "; ".join(f"{reason} ({count})" for reason, count in row.pins[:2])
    if row.status != "ok":
        return f"| {row.title} | {row.parameters / 1e6:.1f} | | | | | | | **{row.status}**: {_cell(row.message)} |"
    check = f"{row.error:.0e}" if verified(row) else f"**no**: {_cell(row.message)}"
    if verified(row) and row.blind:
        check += " (blind: the signal vanishes)"
    if verified(row) and not row.randomised:
        check += " (own weights)"
    cost = f"{row.cpu_seconds:.2f} | {_mib(row.memory)}"
    groups = f"{row.groups} + {row.modules}" if row.modules else f"{row.groups}"
    return (
        f"| {row.title} | {row.parameters / 1e6:.2f} | {cost} | {groups} | {100 * row.free:.1f} % | "
        f"{_cell(pins)} | {_operators(row)} | {check} |"
    )


_INTRODUCTION = """\
# Coverage

What inference answers on the models of torchvision, timm and transformers, with random weights. Written by
`python -m zoo.coverage`; the same rows, with every operator and note, are in `coverage.json` beside this page.

"Seconds" are processor seconds of one thread for tracing and inference together, "MiB" what they hold at their peak beside
the model; verification is apart. "Groups" such as "4 + 21" are 4 of units and 21 of interchangeable modules. "Free" is the
share of positions on parameter axes (longer than one) that belong to at least one group. "What pinned the rest" names the
two most frequent reasons, with how many positions each holds. "Verified" is the largest relative change of the float64
output under a random element of the whole group, on the example input and on a fresh one, with randomised weights and
normalisation statistics; the same pass must hold at 1e-9. The base models of transformers return their residual stream,
which pins it; the rows with a head leave it free.

In a fresh network the signal may vanish on the way to the output, so that verification sees nothing. Each row therefore
verifies a wrong group as well (one that moves a parameter of an early layer and leaves its partners); where that passes,
the layers are scaled to unit output and both are tried again. What is still blind is said so.
"""


def page(rows: Sequence[Row], date: str) -> str:
    """The whole page."""
    parts = [_INTRODUCTION, "## Summary\n", "\n".join([*summary(rows), f"- with {versions()}, on {date}"])]
    for library in NAMES:
        mine = [r for r in runnable(rows) if r.library == library]
        if mine:
            parts += [f"\n## {library}\n", _HEAD, _RULE, *[_line(r) for r in mine]]
    setup = [r for r in rows if r.status == "setup"]
    if setup:
        parts += [
            "\n## Not run\n",
            "Models that do not build or do not run forward on this machine, before inference.\n",
        ]
        parts += [f"- {r.library} {r.title}: {_cell(r.message, 220)}" for r in setup]
    return "\n".join(parts) + "\n"
