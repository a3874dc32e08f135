"""Interchangeable modules: what it is worth to exchange the experts of a list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import automerge
from automerge import FrankWolfe, Symmetry, WeightMatching
from zoo.experiments._bench import Bench
from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit, each_length
from zoo.experiments._figures import bars, legend_below, style, tiles
from zoo.experiments._tables import grid, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MATCHERS = {"universe": FrankWolfe(), "weight-matching": WeightMatching()}
_LENGTHS = (2, 3, 5)


def symmetries(whole: Symmetry) -> dict[str, Symmetry]:
    """What may move: the units inside experts alone, or the experts, too."""
    return {"experts stay": replace(whole, exchanges=()), "experts exchanged": whole}


def _work(lab: Lab, setting: str, seeds: list[int]) -> Iterator[Row]:
    bench = lab.bench(setting)
    states = bench.states(seeds)
    scores = [bench.score(state)["accuracy"] for state in states]
    yield {"merge": "single models", "accuracy": sum(scores) / len(scores)}
    for matcher, how in _MATCHERS.items():
        for order, symmetry in symmetries(bench.symmetry).items():
            own = Bench(bench.setting, bench.runs)
            own.symmetry = symmetry
            aligned = own.align(how, states)
            for repair in ("none", "repair"):
                yield {
                    "merge": f"{matcher}, {order}",
                    "repair": repair,
                    "objective": aligned.matching.stats["objective"],
                    "moved": _exchanged(aligned.matching),
                    "seconds": aligned.seconds,
                    **own.score(own.repaired(repair, aligned)),
                }


def _exchanged(matching: automerge.Matching) -> float:
    """The share of parameters in interchangeable modules that take their entries from another module."""
    within = {name for e in matching.symmetry.exchanges for names in e.params for name in names}
    found = [len(e.sources) for e in matching.to_universe]
    return sum(found) / max(1, len(within) * len(found))


def _units(lab: Lab) -> Iterator[Unit]:
    settings = ("digits-experts", "mnist-experts") if lab.profile.full else ("digits-experts",)
    yield from each_length(lab, settings, _LENGTHS, _work)


def _draw(record: Record) -> Figure:
    settings, lengths = record.values("setting"), record.values("n")
    figure, axes = tiles(len(settings))
    for ax, setting in zip(axes, settings, strict=True):
        cells = {}
        for name in record.values("merge"):
            found = [mean(_best(record, setting, name, n)) for n in lengths]
            cells[name] = [(m.value, m.deviation) for m in found]
        bars(ax, [str(n) for n in lengths], cells)
        style(ax, record.title(setting), "networks", "accuracy of the repaired merge (%)")
    legend_below(figure, axes[0])
    return figure


def _best(record: Record, setting: str, name: str, n: int) -> list[Row]:
    return record.where(setting=setting, merge=name, n=n, repair=(None, "repair"))


def _body(record: Record) -> str:
    parts = []
    for setting in record.values("setting"):
        lengths, names = record.values("n", setting=setting), record.values("merge")
        parts.append(f"## {record.title(setting)}\n")
        for repair, title in (("none", "as averaged"), ("repair", "repaired")):
            rows = record.where(setting=setting, repair=(None, repair))
            parts += [f"Accuracy, {title}, in % (mean ± deviation over the sets):\n", _table(rows, names, lengths)]
        rows = record.where(setting=setting, repair="repair")
        parts += ["Parameters that come from another module, in %:\n", _table(rows, names, lengths, "moved")]
    return "\n".join(parts)


def _table(rows: list[Row], names: list[str], lengths: list[int], value: str = "accuracy") -> str:
    return grid(rows, "merge", "n", names, lengths, value=value, corner="networks")


EXPERIMENT = Experiment(
    "modules",
    "Interchangeable modules",
    "The experts of a mixture do the same with other weights, so that two trainings put what they learn into other experts. "
    "Inference finds that whole modules may be exchanged (`Symmetry.exchanges`). Here the same networks are matched with "
    "and without these exchanges: with the experts where they are, units are matched inside pairs of experts that have "
    "nothing in common.",
    _units,
    _draw,
    _body,
)
