"""Soups: is a merge a better place to start fine-tuning from?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from zoo.data import Dataset, load
from zoo.experiments._bench import Bench, State
from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit, each_set
from zoo.experiments._figures import curve, legend_below, style, tiles
from zoo.experiments._settings import SETTINGS
from zoo.experiments._tables import grid
from zoo.experiments.many import MATCHERS
from zoo.train import Recipe, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EPOCHS = (0, 1, 2, 4)
_RATE = 1e-3


def fresh_data(bench: Bench) -> Dataset:
    """Images that no network was trained on; of the digits there are none, so a fifth of the training images serves."""
    data = bench.data
    base, _, count = bench.setting.data.partition(":")
    if not count:
        return data.head(len(data.y_train) // 5)
    whole = load(base.partition("/")[0])
    start = int(count)
    unseen = replace(whole, x_train=whole.x_train[start : start + 2000], y_train=whole.y_train[start : start + 2000])
    unseen = unseen.head(2000, 2000)
    return unseen.halved() if "/2" in base else unseen


def _work(lab: Lab, setting: str, seeds: list[int]) -> Iterator[Row]:
    bench = lab.bench(setting)
    states = bench.states(seeds)
    data = fresh_data(bench)
    starts: dict[str, list[tuple[int, State | None]]] = {
        "single model": [(seed, state) for seed, state in zip(seeds[:3], states[:3], strict=True)],
        "fresh": [(seed, None) for seed in seeds[:3]],
    }
    for name in ("naive", "universe", "universe, activations"):
        starts[name] = [(seeds[0], bench.repaired("repair", bench.align(MATCHERS[name], states)))]
    for name, many in starts.items():
        for seed, state in many:
            for epochs in _EPOCHS[:2] if lab.profile.short else _EPOCHS:
                yield {"start": name, "seed": seed, "epochs": epochs, **_tuned(bench, data, state, epochs, seed)}
    yield {"start": "ensemble", "epochs": 0, **bench.score(states)}


def _tuned(bench: Bench, data: Dataset, start: State | None, epochs: int, seed: int) -> dict[str, float]:
    """The held-out score after a few epochs at a small rate."""
    if epochs == 0:
        return bench.score(start) if start is not None else bench.score(_untrained(bench, seed))
    recipe = Recipe(epochs=epochs, rate=_RATE)
    return bench.score(train(bench.setting.factory, data, recipe, 1000 + seed, start=start).state_dict)


def _untrained(bench: Bench, seed: int) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        return bench.setting.factory().state_dict()


def _units(lab: Lab) -> Iterator[Unit]:
    small = ("digits-mlp", "digits-resnet")
    settings = (*small, "fashion-mlp", "fashion-resnet") if lab.profile.full else small
    yield from each_set(lab, settings, min(5, lab.profile.most), _work)


def _draw(record: Record) -> Figure:
    settings = record.values("setting")
    figure, axes = tiles(len(settings))
    colours = {"single model": "single models"}
    for ax, setting in zip(axes, settings, strict=True):
        for k, name in enumerate(n for n in record.values("start") if n != "ensemble"):
            rows = record.where(setting=setting, start=name)
            curve(ax, rows, "epochs", colours.get(name, name), number=k)
        style(ax, record.title(setting), "epochs of fine-tuning", "accuracy (%)")
    legend_below(figure, axes[0])
    return figure


def _body(record: Record) -> str:
    parts = []
    for setting in record.values("setting"):
        rows = record.where(setting=setting)
        seen = "" if SETTINGS[setting].data.partition(":")[2] else " (seen in training: the digits have no others)"
        parts.append(f"## {record.title(setting)}, N = {rows[0]['n']}\n")
        parts.append(f"Accuracy in % after so many epochs on few images{seen}:\n")
        parts.append(grid(rows, "start", "epochs", record.values("start"), record.values("epochs"), corner="start"))
    return "\n".join(parts)


EXPERIMENT = Experiment(
    "soups",
    "Soups",
    "Is a merge a better place to start from? The repaired merge of N networks, single networks and fresh ones are "
    "fine-tuned for the same few epochs with the same recipe (AdamW, a peak rate of 0.001, one cycle) on 2,000 "
    "training images that none of them was trained on. Of the digits there are no such images; there a fifth of the "
    "training images serves.",
    _units,
    _draw,
    _body,
)
