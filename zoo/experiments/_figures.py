"""Figures of records: matplotlib without pyplot, written as SVG whose bytes depend on the numbers only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from zoo.experiments._tables import mean
from zoo.train import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "universe": "#1f6fb4",
    "naive": "#8c8c8c",
    "merge-many": "#d1495b",
    "merge-many, as published": "#e8a0a8",
    "weight-matching": "#c98b27",
    "weight-matching, as published": "#ecd0a0",
    "universe, random start": "#5b5ea6",
    "universe, identity start": "#a5a7d4",
    "pairwise": "#3a7d44",
    "synchronised": "#7fb685",
    "cca": "#8e5ea2",
    "cca, BatchNorm fused": "#c3a5cf",
    "activation": "#17807e",
    "universe, activations": "#3fb6e8",
    "single models": "#000000",
    "ensemble": "#000000",
}
_OTHERS = ("#1f6fb4", "#d1495b", "#3a7d44", "#c98b27", "#8e5ea2", "#17807e", "#8c8c8c")


def colour(name: str, number: int = 0) -> str:
    """The colour of a name in all figures, or one of a few."""
    return COLOURS.get(name.removesuffix(", pair by pair"), _OTHERS[number % len(_OTHERS)])


def panels(columns: int, rows: int = 1, width: float = 4.4, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with axes side by side.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, k + 1) for k in range(rows * columns)]


def tiles(count: int, width: float = 4.0, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure with axes in rows of three, or two rows of two; the last row is as long as it is."""
    across = 2 if count == 4 else 3
    figure, axes = panels(min(count, across), -(-count // across), width, height)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def style(axes: Axes, title: str, x: str, y: str) -> None:
    """Labels, a light grid, no box; a long title takes two lines."""
    axes.set_title(fill(title, 46, break_on_hyphens=False), fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def curve(
    axes: Axes,
    rows: Iterable[Mapping[str, Any]],
    along: str,
    label: str,
    *,
    value: str = "accuracy",
    factor: float = 100.0,
    number: int = 0,
    line: str = "-",
) -> None:
    """Means over sets along a column, with their deviations."""
    kept = list(rows)
    at = sorted({r[along] for r in kept})
    found = [mean([r for r in kept if r[along] == x], value) for x in at]
    bars = [0.0 if m.sets < 2 else factor * m.deviation for m in found]
    heights = [factor * m.value for m in found]
    axes.errorbar(
        at,
        heights,
        bars,
        linestyle=line,
        marker="o" if line == "-" and label != "ensemble" else None,
        color=colour(label, number),
        label=label,
        markersize=3,
        linewidth=1.2,
        capsize=2,
    )


def bars(
    axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[tuple[float, float]]], factor: float = 100.0
) -> None:
    """Bars side by side in groups, each a mean and a deviation."""
    width = 0.8 / max(len(series), 1)
    for k, (name, cells) in enumerate(series.items()):
        at = [g + (k - (len(series) - 1) / 2) * width for g in range(len(groups))]
        heights = [factor * c[0] for c in cells]
        errors = [0.0 if c[1] != c[1] else factor * c[1] for c in cells]
        axes.bar(at, heights, width * 0.95, yerr=errors, color=colour(name, k), label=name, error_kw={"linewidth": 0.7})
    axes.set_xticks(range(len(groups)), groups, fontsize=6.5)


def legend(axes: Axes) -> None:
    """The names, small and without a frame."""
    axes.legend(fontsize=6.5, frameon=False)


def legend_below(figure: Figure, axes: Axes, columns: int = 6) -> None:
    """The names of one of the axes, for all of them."""
    names = axes.get_legend_handles_labels()
    figure.legend(*names, fontsize=6.5, frameon=False, ncols=columns, loc="outside lower center")


def save(figure: Figure, path: Path) -> None:
    """Write SVG, all at once or not at all."""
    import matplotlib

    def write(temporary: str) -> None:
        with matplotlib.rc_context({"svg.hashsalt": "zoo.experiments", "svg.fonttype": "none"}):
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        text = "\n".join(line.rstrip() for line in Path(temporary).read_text("utf-8").splitlines()) + "\n"
        text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)  # hundredths of a point are small enough
        Path(temporary).write_text(text, "utf-8")

    write_atomically(path, write)
