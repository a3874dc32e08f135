"""Stability: does a matcher find the same maps again?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from statistics import stdev
from typing import TYPE_CHECKING, Any

from automerge import ActivationMatching, Element, FrankWolfe, MergeMany, PairwiseFrankWolfe, WeightMatching
from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit, each_set
from zoo.experiments._figures import colour, legend_below, style, tiles
from zoo.experiments._tables import mean, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MATCHERS: dict[str, Any] = {
    "universe": FrankWolfe(),
    "universe, random start": FrankWolfe(start="sinkhorn"),
    "universe, identity start": FrankWolfe(start="identity"),
    "merge-many": MergeMany(),
    "merge-many, as published": MergeMany(start="identity"),
    "weight-matching": WeightMatching(),
    "weight-matching, as published": WeightMatching(start="identity"),
    "pairwise": PairwiseFrankWolfe(),
    "universe, activations": ActivationMatching(),
}


def _seeded(matcher: Any, seed: int) -> Any:
    if isinstance(matcher, ActivationMatching):
        return replace(matcher, solver=_seeded(matcher.solver, seed))
    if isinstance(matcher, PairwiseFrankWolfe):
        return replace(matcher, solver=_seeded(matcher.solver, seed))
    return replace(matcher, seed=seed)


def _work(lab: Lab, setting: str, seeds: list[int]) -> Iterator[Row]:
    """Each time the units of every network are shuffled, and the matcher gets another seed."""
    bench = lab.bench(setting)
    states = bench.states(seeds)
    for name, matcher in _MATCHERS.items():
        maps: list[Element] = []
        for again in range(3 if lab.profile.short else 5):
            shuffles = [bench.symmetry.random_element(1000 * again + s) for s in seeds]
            shuffled = [bench.symmetry.apply(s, e) for s, e in zip(states, shuffles, strict=True)]
            aligned = bench.align(_seeded(matcher, again), shuffled)
            own = shuffles[1].then(aligned.matching.between(1, 0)).then(shuffles[0].inverse())
            maps.append(own)
            yield {"matcher": name, "again": again, **bench.score(bench.repaired("repair", aligned))}
        for a, b in combinations(range(len(maps)), 2):
            same = 1 - maps[a].then(maps[b].inverse()).moved() / bench.positions
            yield {"matcher": name, "again": a, "against": b, "same": same}


def _units(lab: Lab) -> Iterator[Unit]:
    small = ("digits-mlp", "digits-resnet")
    more = ("digits-vit", "mnist-mlp", "fashion-resnet", "fashion-vgg")
    settings = (*small, *more) if lab.profile.full else small
    yield from each_set(lab, settings, 3, _work)


def spread(record: Record, matcher: str, settings: list[str] | None = None) -> list[Row]:
    """The deviation of the accuracy over repetitions, one row per setting and set."""
    out: list[Row] = []
    for setting in record.values("setting") if settings is None else settings:
        for number in record.values("set", setting=setting):
            rows = record.where(setting=setting, matcher=matcher, set=number)
            values = [r["accuracy"] for r in rows if "accuracy" in r]
            if len(values) > 1:
                out.append({"setting": setting, "set": number, "deviation": stdev(values)})
    return out


def _draw(record: Record) -> Figure:
    settings = record.values("setting")
    figure, axes = tiles(len(settings))
    for ax, setting in zip(axes, settings, strict=True):
        for j, name in enumerate(_MATCHERS):
            same = mean(record.where(setting=setting, matcher=name), "same")
            deviation = mean(spread(record, name, [setting]), "deviation")
            if same.sets and deviation.sets:
                at = (100 * same.value, 100 * deviation.value)
                ax.plot(*at, "o", color=colour(name, j), markersize=5, label=name)
        style(ax, record.title(setting), "positions mapped alike (%)", "deviation of accuracy (points)")
    legend_below(figure, axes[0])
    return figure


def _body(record: Record) -> str:
    parts = []
    for setting in record.values("setting"):
        lines = []
        for name in record.values("matcher"):
            rows = record.where(setting=setting, matcher=name)
            deviation = mean(spread(record, name, [setting]), "deviation")
            cell = f"{100 * deviation.value:.2f}" if deviation.sets else "–"
            lines.append([name, mean(rows, "same").percent(), mean(rows).percent(), cell])
        parts.append(f"## {record.title(setting)}\n")
        head = [
            "matcher",
            "positions mapped alike (%)",
            "accuracy after REPAIR (%)",
            "deviation over repetitions (points)",
        ]
        parts.append(table(head, lines))
    return "\n".join(parts)


EXPERIMENT = Experiment(
    "stability",
    "Stability",
    "Does a matcher give the same answer again? Three networks are matched five times; each time their units are "
    "shuffled by random elements of the group, and the matcher gets another seed. *Positions mapped alike* compares "
    "the maps from the second network to the first between repetitions, after the shuffles are undone. `universe` "
    "starts from signatures, which do not depend on the order of the units.",
    _units,
    _draw,
    _body,
)
