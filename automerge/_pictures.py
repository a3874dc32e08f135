"""Pictures of measurements, from plain numbers; needs the extra ``plot`` (matplotlib)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from automerge._canvas import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _GREY, _COLOURS = "#1f6fb4", "#8c8c8c", ("#1f6fb4", "#c98b27", "#3a7d44", "#d1495b", "#8e5ea2")
PathLike = str | os.PathLike[str]


def _plain(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_path(
    positions: Sequence[float],
    losses: Sequence[float],
    accuracies: Sequence[float],
    title: str,
    path: PathLike,
    force: bool,
) -> Path:
    """Loss and accuracy along the line between two networks."""
    curves = {"loss": losses, "accuracy (%)": [100 * a for a in accuracies]}
    shown = {label: values for label, values in curves.items() if values}
    figure = new_figure(4.5 * len(shown), 3.4, layout="constrained")
    for k, (label, values) in enumerate(shown.items()):
        axes = figure.add_subplot(1, len(shown), k + 1)
        axes.plot(positions, values, "o-", color=_BLUE, markersize=3.5)
        _plain(axes, "position between the two models", label)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, path, force)


def draw_plane(
    xs: Sequence[float],
    ys: Sequence[float],
    losses: Sequence[Sequence[float]],
    anchors: Sequence[tuple[float, float]],
    path: PathLike,
    force: bool,
) -> Path:
    """The loss in a plane as filled contours."""
    figure = new_figure(5.6, 4.6, layout="constrained")
    axes = figure.add_subplot(1, 1, 1)
    shown = axes.contourf(xs, ys, losses, levels=24, cmap="viridis_r")
    figure.colorbar(shown, ax=axes, label="loss")
    for name, (x, y) in zip("abc", anchors, strict=False):
        axes.plot(x, y, "o", color="white", markeredgecolor="black", markersize=7)
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(7, 5), color="black", fontsize=10)
    centre = tuple(sum(a[k] for a in anchors) / len(anchors) for k in (0, 1))
    axes.plot(*centre, "*", color="white", markeredgecolor="black", markersize=11)
    axes.set_xlabel("from a to b (distance of weights)")
    axes.set_ylabel("across, to c")
    axes.set_aspect("equal")
    return save_figure(figure, path, force)


def draw_bars(groups: Mapping[str, Mapping[str, float]], path: PathLike, force: bool) -> Path:
    """Groups of named numbers as horizontal bars, one panel per group."""
    longest = max((len(g) for g in groups.values()), default=1)
    figure = new_figure(4.6 * max(len(groups), 1), max(2.4, 0.26 * longest + 1.0), layout="constrained")
    for k, (title, values) in enumerate(groups.items()):
        axes = figure.add_subplot(1, len(groups), k + 1)
        places = list(range(len(values)))
        axes.barh(places, list(values.values()), height=0.7, color=_COLOURS[k % len(_COLOURS)])
        axes.set_yticks(places, list(values), fontsize=7)
        axes.invert_yaxis()
        _plain(axes, title, "")
    return save_figure(figure, path, force)
