"""Cycle error: a network carried around through others and back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, reduce
from typing import TYPE_CHECKING

import automerge
from automerge import Element, FrankWolfe, Identity, MergeMany, PairwiseFrankWolfe, WeightMatching
from zoo.experiments._bench import Bench, State
from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit, each_length
from zoo.experiments._figures import bars, legend_below, style, tiles
from zoo.experiments._tables import Mean, grid, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAIRWISE = {"weight-matching, pair by pair": WeightMatching(), "pairwise, pair by pair": PairwiseFrankWolfe()}
_TOGETHER = {"merge-many": MergeMany(), "universe": FrankWolfe()}
_LENGTHS = (2, 3, 5)


def steps(bench: Bench, name: str, states: list[State]) -> list[Element]:
    """The maps from each network to the next, and from the last to the first."""
    pairs = [(k, (k + 1) % len(states)) for k in range(len(states))]
    if name in _TOGETHER:
        matching = automerge.match(states, bench.symmetry, _TOGETHER[name])
        return [matching.between(a, b) for a, b in pairs]
    found = []
    for a, b in pairs:  # each pair is matched on its own, with the next network as the reference
        matching = automerge.match([states[b], states[a]], bench.symmetry, _PAIRWISE[name])
        found.append(matching.between(1, 0))
    return found


def _work(lab: Lab, setting: str, seeds: list[int]) -> Iterator[Row]:
    bench = lab.bench(setting)
    states = bench.states(seeds)
    first = states[0]
    for name in (*_PAIRWISE, *_TOGETHER):
        around = reduce(Element.then, steps(bench, name, states))
        back = bench.symmetry.apply(first, around)
        halfway = bench.align(Identity(), [first, back])
        yield {
            "matcher": name,
            "displaced": around.moved() / bench.positions,
            "distance": _distance(first, back),
            **bench.score(bench.repaired("repair", halfway)),
            "accuracy_of_carried": bench.score(back)["accuracy"],
        }


def _distance(a: State, b: State) -> float:
    names = [n for n in a if a[n].is_floating_point()]
    gap = sum(float((a[n].double() - b[n].double()).square().sum()) for n in names)
    return float((gap / sum(float(a[n].double().square().sum()) for n in names)) ** 0.5)


def _units(lab: Lab) -> Iterator[Unit]:
    small = ("digits-mlp", "digits-resnet")
    more = ("digits-vit", "mnist-mlp", "fashion-resnet", "fashion-vgg")
    yield from each_length(lab, (*small, *more) if lab.profile.full else small, _LENGTHS, _work)


def _draw(record: Record) -> Figure:
    settings = record.values("setting")
    lengths = record.values("n")
    figure, axes = tiles(len(settings))
    for ax, setting in zip(axes, settings, strict=True):
        cells = {}
        for name in record.values("matcher"):
            found = [mean(record.where(setting=setting, matcher=name, n=n), "displaced") for n in lengths]
            cells[name] = [(m.value, m.deviation) for m in found]
        bars(ax, [str(n) for n in lengths], cells)
        style(ax, record.title(setting), "networks in the cycle", "positions displaced (%)")
    legend_below(figure, axes[0])
    return figure


def _body(record: Record) -> str:
    parts = []
    for setting in record.values("setting"):
        rows, lengths = record.where(setting=setting), record.values("n", setting=setting)
        names = record.values("matcher")
        parts += [
            f"## {record.title(setting)}\n",
            "Positions displaced after one turn, in % (mean ± deviation over the sets):\n",
            grid(rows, "matcher", "n", names, lengths, value="displaced", corner="networks in the cycle"),
            "Distance of the weights to where they were, relative to their norm:\n",
            grid(
                rows,
                "matcher",
                "n",
                names,
                lengths,
                value="distance",
                show=partial(Mean.plain, digits=2),
                corner="networks in the cycle",
            ),
            "Accuracy of the network halfway between the first network and itself carried around, repaired, in %:\n",
            grid(rows, "matcher", "n", names, lengths, corner="networks in the cycle"),
        ]
    return "\n".join(parts)


EXPERIMENT = Experiment(
    "cycle",
    "Cycle error",
    "A network is carried from A to B, to C, ... and back to A by the maps that a matcher gives. It computes the "
    "same function all along, but are its units where they were? *Pair by pair*, every map is found from its two "
    "networks alone; `merge-many` and `universe` match all together, so that their maps compose to the identity by "
    "construction (it is measured here all the same). If the units are elsewhere, the average of the network with "
    "itself carried around is a bad network.",
    _units,
    _draw,
    _body,
)
