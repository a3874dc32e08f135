"""Pictures of what `automerge.evaluate` and the matchers measured; needs the extra ``plot`` (matplotlib).

Everything is drawn on `matplotlib.figure.Figure` objects, never through pyplot, so no display and no global state is
touched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automerge._canvas import new_figure, save_figure
from automerge.evaluate import Barrier, Similarity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEFORE, _AFTER, _EXTRA = "#8c8c8c", "#1f6fb4", ("#d1495b", "#3a7d44", "#8e5ea2", "#c98b27")


def _figure(columns: int = 1, width: float = 5.0, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure = new_figure(width * columns, height, layout="constrained")
    return figure, [figure.add_subplot(1, columns, k + 1) for k in range(columns)]


def _style(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def plot_barrier(
    before: Barrier,
    after: Barrier,
    path: str | os.PathLike[str],
    *,
    others: Mapping[str, Barrier] | None = None,
    title: str = "",
    force: bool = False,
) -> Path:
    """Loss and accuracy along the path between two models, before and after matching.

    Args:
        before: the path between the models as trained.
        after: the path after matching.
        path: where to write the picture.
        others: further paths by label, e.g. ``{"after matching, repaired": ...}``.
        title: above the picture.
        force: replace an existing file.

    Returns:
        The path written.

    Raises:
        AutomergeError: if matplotlib is not installed.
        OutputError: if the picture cannot be written.
    """
    figure, (left, *rest) = _figure(2 if after.accuracies else 1)
    curves: list[tuple[str, Barrier, str]] = [("before matching", before, _BEFORE), ("after matching", after, _AFTER)]
    curves += [(n, b, _EXTRA[k % len(_EXTRA)]) for k, (n, b) in enumerate((others or {}).items())]
    for name, value, colour in curves:
        label = f"{name} (barrier {value.loss_barrier:.3f})"
        left.plot(value.positions, value.losses, "o-", color=colour, label=label, markersize=3.5)
        for axes in rest if value.accuracies else ():
            label = f"{name} (barrier {value.accuracy_barrier:.1%})"
            accuracies = [100 * v for v in value.accuracies]
            axes.plot(value.positions, accuracies, "o-", color=colour, label=label, markersize=3.5)
    for axes, what in zip((left, *rest), ("loss", "accuracy (%)"), strict=False):
        _style(axes, "position between the two models", what)
        axes.legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    return save_figure(figure, path, force)


def plot_similarity(
    before: Similarity, after: Similarity, path: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """The cosine of every tensor, and with activations the CKA and correlation at every place, before and after matching.

    Raises:
        AutomergeError: if matplotlib is not installed.
        OutputError: if the picture cannot be written.
    """
    panels = [("cosine similarity", before.per_tensor, after.per_tensor, (before.cosine, after.cosine))]
    for title, first, second in (
        ("CKA", before.cka, after.cka),
        ("correlation of units", before.correlation, after.correlation),
    ):
        if first and second:
            means = sum(first.values()) / len(first), sum(second.values()) / len(second)
            panels.append((title, first, second, means))
    longest = max(len(p[1]) for p in panels)
    figure, drawn = _figure(len(panels), 7.0, max(2.4, 0.32 * longest + 1.0))
    for axes, (title, first, second, means) in zip(drawn, panels, strict=True):
        names = list(first)
        places = list(range(len(names)))
        curves = [(first, "before", _BEFORE, means[0]), (second, "after", _AFTER, means[1])]
        for offset, (values, label, colour, mean) in zip((-0.2, 0.2), curves, strict=True):
            heights = [values.get(n, 0.0) for n in names]
            label = f"{label} (all: {mean:.3f})"
            axes.barh([p + offset for p in places], heights, height=0.38, color=colour, label=label)
        axes.set_yticks(places, names, fontsize=7)
        axes.invert_yaxis()
        _style(axes, title, "")
        axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, path, force)


def plot_objective(
    values: Sequence[float] | Mapping[str, Sequence[float]], path: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """The matching objective over the iterations, one curve or several by label.

    Raises:
        AutomergeError: if matplotlib is not installed.
        OutputError: if the picture cannot be written.
    """
    figure, (axes,) = _figure()
    curves: Mapping[str, Any] = values if isinstance(values, Mapping) else {"": values}
    for k, (name, curve) in enumerate(curves.items()):
        axes.plot(range(len(curve)), list(curve), color=(_AFTER, *_EXTRA)[k % 5], label=name, linewidth=1.5)
    _style(axes, "iteration", "objective")
    if any(curves):
        axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, path, force)
