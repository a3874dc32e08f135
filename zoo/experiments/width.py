"""Width: do wider networks merge better?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit, disjoint, span
from zoo.experiments._figures import curve, legend, panels, style
from zoo.experiments._settings import Setting, mlp_of_width, resnet_of_width
from zoo.experiments._tables import grid, mean
from zoo.experiments.many import MATCHERS, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = ("naive", "merge-many", "weight-matching", "universe", "universe, activations")
_COUNT = 3


def _plan(lab: Lab) -> list[tuple[str, float, Setting]]:
    """Family, width, setting."""
    mlp: tuple[int, ...] = (16, 32, 64, 128, 256) if lab.profile.full else (32, 64, 128)
    resnet: tuple[float, ...] = (0.25, 0.5, 1, 2, 4, 8) if lab.profile.full else (0.5, 1)
    found: list[tuple[str, float, Setting]] = [("MLP", w, mlp_of_width(w)) for w in mlp]
    return [*found, *(("ResNet8", w, resnet_of_width(w)) for w in resnet)]


def _work(lab: Lab, setting: Setting, seeds: list[int]) -> Iterator[Row]:
    bench = lab.bench(setting)
    for seed in seeds:
        yield {"matcher": "single models", "seed": seed, "repair": "none", **bench.score(bench.state(seed))}
    yield {"matcher": "ensemble", "repair": "none", **bench.score(bench.states(seeds))}
    for name in _NAMES:
        yield from rows_of(bench, name, MATCHERS[name], seeds)


def _units(lab: Lab) -> Iterator[Unit]:
    for family, width, setting in _plan(lab):
        for number, seeds in enumerate(disjoint(lab.profile.sets, _COUNT, _COUNT)):
            key = {"setting": setting.name, "family": family, "width": width, "n": _COUNT}
            yield Unit({**key, "set": number, "seeds": span(seeds)}, partial(_work, lab, setting, seeds))


def _draw(record: Record) -> Figure:
    families = record.values("family")
    figure, axes = panels(len(families))
    for ax, family in zip(axes, families, strict=True):
        for k, name in enumerate(_NAMES):
            curve(ax, record.where(family=family, matcher=name, repair="repair"), "width", name, number=k)
        curve(ax, record.where(family=family, matcher="single models"), "width", "single models", line=":")
        style(ax, f"{family} on the digits, N = {_COUNT}", "width", "accuracy after REPAIR (%)")
        ax.set_xscale("log", base=2)
        widths = record.values("width", family=family)
        ax.set_xticks(widths, [f"{w:g}" for w in widths])
        ax.minorticks_off()
    legend(axes[0])
    return figure


def _body(record: Record) -> str:
    parts = []
    for family in record.values("family"):
        widths = record.values("width", family=family)
        rows = record.where(family=family)
        singles = [
            mean([r for r in rows if r["matcher"] == "single models" and r["width"] == w]).percent() for w in widths
        ]
        parts.append(f"## {family}, N = {_COUNT}\n")
        parts.append(
            "Single models: " + ", ".join(f"{s} (width {w:g})" for s, w in zip(singles, widths, strict=True)) + ".\n"
        )
        for repair in ("repair", "none"):
            title = "after REPAIR" if repair == "repair" else "as it is"
            parts.append(f"Accuracy {title}, in %, by width:\n")
            parts.append(grid([r for r in rows if r["repair"] == repair], "matcher", "width", _NAMES, widths))
    return "\n".join(parts)


EXPERIMENT = Experiment(
    "width",
    "Width",
    "Do wider networks merge better? N = 3 networks each; the width is the number of units in each of the MLP's "
    "hidden layers, and of the ResNet a factor on 16 channels.",
    _units,
    _draw,
    _body,
)
