"""Different tasks: networks trained on disjoint halves of the labels, and on different data sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from automerge import ActivationMatching, FrankWolfe, Identity, Matcher, MergeMany, WeightMatching
from zoo.data import Dataset
from zoo.experiments._bench import Aligned, Bench, State, batches
from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit
from zoo.experiments._figures import bars, legend_below, style, tiles
from zoo.experiments._settings import SETTINGS, Setting, dataset
from zoo.experiments._tables import grid, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MATCHERS: dict[str, Matcher] = {
    "naive": Identity(),
    "merge-many": MergeMany(),
    "universe": FrankWolfe(),
    "activation": ActivationMatching(WeightMatching(), mix=1.0),
    "universe, activations": ActivationMatching(),
}
HALVES = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
OTHER = 100
"""Added to the seed of the second network, so that the two do not start from the same weights."""


@dataclass(frozen=True)
class Part(Setting):
    """A setting on another set of data, or on some labels only; its outputs are as many.

    Attributes:
        labels: which are kept; all if empty.
    """

    labels: tuple[int, ...] = ()

    @property
    def dataset(self) -> Dataset:
        """The part of the data."""
        whole = dataset(self.data)
        return whole.only(self.labels) if self.labels else whole


def parts_of(setting: Setting, pair: str) -> list[Part]:
    """The two tasks that a setting is split into."""

    def part(name: str, title: str, data: str = setting.data, labels: tuple[int, ...] = ()) -> Part:
        return Part(name, title, setting.factory, data, setting.recipe, labels)

    if pair == "halves":
        ends = [(half, f"{half[0]} to {half[-1]}") for half in HALVES]
        return [part(f"{setting.name}-{h[0]}to{h[-1]}", f"{setting.title}, labels {e}", labels=h) for h, e in ends]
    other = setting.data.replace("fashion_mnist", "mnist")
    return [
        part(setting.name, setting.title),
        part(f"{setting.name}-mnist", f"{setting.title}: the same on MNIST", data=other),
    ]


def with_head(body: State, own: State) -> State:
    """The merged network with one network's own (aligned) output layer: its last two tensors."""
    names = list(body)[-2:]
    return {**body, **{n: own[n] for n in names}}


def _work(lab: Lab, setting: Setting, pair: str, seed: int) -> Iterator[Row]:
    tasks = [lab.use(part) for part in parts_of(setting, pair)]
    both = torch.cat([task.dataset.x_train[:256] for task in tasks])
    own = [Bench(task, lab.runs, inputs=both) for task in tasks]
    states = [own[0].state(seed), own[1].state(seed + OTHER)]
    for task, (bench, state) in enumerate(zip(own, states, strict=True)):
        yield {"matcher": "single models", "heads": "own", "repair": "none", "task": task, **bench.score(state)}
    for name, matcher in _MATCHERS.items():
        aligned = own[0].align(matcher, states)
        for repair in ("none", "repair"):
            merged = own[0].repaired(repair, aligned)
            for row in _scores(own, merged, aligned, pair):
                yield {"matcher": name, "repair": repair, **row}


def _scores(own: list[Bench], merged: State, aligned: Aligned, pair: str) -> Iterator[Row]:
    """The merged body with each task's own head on its task; with the mean of the heads on all labels at once."""
    for task, (bench, state) in enumerate(zip(own, aligned.states, strict=True)):
        yield {"heads": "own", "task": task, **bench.score(with_head(merged, state))}
    if pair == "halves":
        x, y = (torch.cat([getattr(bench.data, k) for bench in own]) for k in ("x_test", "y_test"))
        yield {"heads": "mean", "task": 2, **own[0].score(merged, batches(x, y))}


def _units(lab: Lab) -> Iterator[Unit]:
    plan = [("digits-mlp", "halves"), ("digits-resnet", "halves")]
    if lab.profile.full:
        plan += [("mnist-mlp", "halves"), ("fashion-mlp", "data sets"), ("fashion-resnet", "data sets")]
    for name, pair in plan:
        for number in range(5 if lab.profile.full else lab.profile.sets):
            key = {"setting": name, "pair": pair, "n": 2, "set": number, "seeds": f"{number}, {number + OTHER}"}
            yield Unit(key, partial(_work, lab, SETTINGS[name], pair, number))


def _draw(record: Record) -> Figure:
    settings = record.values("setting")
    figure, axes = tiles(len(settings))
    names = ["single models", *_MATCHERS]
    for ax, setting in zip(axes, settings, strict=True):
        cells: dict[str, list[tuple[float, float]]] = {"own heads": [], "mean of the heads, all labels": []}
        for name in names:
            repair = "none" if name == "single models" else "repair"
            rows = record.where(setting=setting, matcher=name, repair=repair)
            for label, heads in (("own heads", "own"), ("mean of the heads, all labels", "mean")):
                found = mean([r for r in rows if r["heads"] == heads])
                cells[label].append((found.value if found.sets else 0.0, found.deviation))
        bars(ax, [n.replace(" ", "\n") for n in names], cells)
        style(ax, record.title(setting), "", "accuracy after REPAIR (%)")
    legend_below(figure, axes[0])
    return figure


def _body(record: Record) -> str:
    parts = []
    for setting in record.values("setting"):
        rows = [{**r, "how": f"{r['heads']} head, {r['repair']}"} for r in record.where(setting=setting)]
        single = mean([r for r in rows if r["matcher"] == "single models"])
        pair = rows[0]["pair"]
        what = "labels 0 to 4 against 5 to 9" if pair == "halves" else "Fashion-MNIST against MNIST"
        parts.append(f"## {record.title(setting)}: {what}\n")
        parts.append(f"Each network on its own task: {single.percent()} %.\n")
        columns = [
            "own head, none",
            "own head, repair",
            *(["mean head, none", "mean head, repair"] if pair == "halves" else []),
        ]
        parts.append(grid(rows, "matcher", "how", list(_MATCHERS), columns))
    return "\n".join(parts)


EXPERIMENT = Experiment(
    "tasks",
    "Different tasks",
    "Can networks be merged that have learnt different things? Two networks from *different* random weights: one "
    "has seen only the labels 0 to 4 and the other 5 to 9; or one Fashion-MNIST and the other MNIST. *Own head*: "
    "the merged body with each network's own output layer, on its task (mean over both tasks). *Mean head*: one "
    "network for all ten labels.",
    _units,
    _draw,
    _body,
)
