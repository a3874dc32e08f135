"""The loss in the plane through three networks, before and after they are aligned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal

import automerge
from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit, disjoint, span
from zoo.experiments._figures import panels, style
from zoo.experiments._tables import Mean, mean, table
from zoo.experiments.many import MATCHERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = ("naive", "universe", "universe, activations")
LEVELS = (0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 4.01)


def _work(lab: Lab, setting: str, number: int, seeds: list[int]) -> Iterator[Row]:
    """The centre for every set; the grid, one row per point, for the first."""
    bench = lab.bench(setting)
    points = 5 if lab.profile.short else 13
    reset: Literal["reset"] | None = "reset" if bench.normed else None
    test = [(x[:256], y[:256]) for x, y in bench.test[:1]]
    for name in _NAMES:
        aligned = bench.align(MATCHERS[name], bench.states(seeds))
        size = points if number == 0 else 2
        a, b, c = aligned.states
        inputs = [x[:256] for x in bench.calibration]
        found = automerge.plane(bench.network, a, b, c, test, size, repair=reset, repair_data=inputs)
        yield {
            "matcher": name,
            "point": "centre",
            "loss": found.centre_loss,
            "barrier": found.centre_barrier,
            "samples": found.samples,
        }
        for k, ((x, y), loss) in enumerate(zip(found.anchors, found.anchor_losses, strict=True)):
            yield {"matcher": name, "point": "abc"[k], "x": x, "y": y, "loss": loss}
        if number == 0:
            for y, line in zip(found.ys, found.losses, strict=True):
                for x, loss in zip(found.xs, line, strict=True):
                    yield {"matcher": name, "point": "grid", "x": x, "y": y, "loss": loss}


def _units(lab: Lab) -> Iterator[Unit]:
    small = ("digits-mlp", "digits-resnet")
    more = ("mnist-mlp", "digits-vit", "fashion-resnet", "fashion-vgg")
    for setting in (*small, *more) if lab.profile.full else small:
        for number, seeds in enumerate(disjoint(lab.profile.sets, 3, 3)):
            key = {"setting": setting, "n": 3, "set": number, "seeds": span(seeds)}
            yield Unit(key, partial(_work, lab, setting, number, seeds))


def _draw(record: Record) -> Figure:
    settings = record.values("setting")
    figure, axes = panels(len(_NAMES), len(settings), width=3.0, height=2.7)
    for k, ax in enumerate(axes):
        setting, name = settings[k // len(_NAMES)], _NAMES[k % len(_NAMES)]
        rows = record.where(setting=setting, matcher=name, set=0)
        points = [r for r in rows if r["point"] == "grid"]
        xs, ys = (list(dict.fromkeys(r[c] for r in points)) for c in "xy")
        losses = [[min(r["loss"], 4.0) for r in points[j * len(xs) : (j + 1) * len(xs)]] for j in range(len(ys))]
        drawn = ax.contourf(xs, ys, losses, levels=LEVELS, cmap="viridis_r")
        corners = [r for r in rows if r["point"] in ("a", "b", "c")]
        ax.plot([r["x"] for r in corners], [r["y"] for r in corners], "k^", markersize=5)
        middle = [sum(r[c] for r in corners) / 3 for c in "xy"]
        ax.plot(*middle, "r*", markersize=8)
        style(ax, f"{setting}: {name}", "", "")
        ax.set_xticks([])  # distances between weights say little by themselves
        ax.set_yticks([])
        if k % len(_NAMES) == len(_NAMES) - 1:
            figure.colorbar(drawn, ax=ax).ax.tick_params(labelsize=6)
    return figure


def _body(record: Record) -> str:
    lines = []
    for setting in record.values("setting"):
        for name in record.values("matcher"):
            rows = record.where(setting=setting, matcher=name, point="centre")
            ends = mean(record.where(setting=setting, matcher=name, point=("a", "b", "c")), "loss")
            show = partial(Mean.plain, digits=3)
            lines.append(
                [f"{record.title(setting)}: {name}", show(ends), show(mean(rows, "loss")), show(mean(rows, "barrier"))]
            )
    sets = len(record.values("set"))
    head = ["", "loss of the three", "loss of their mean", "barrier"]
    return (
        f"Loss in nats on 256 held-out samples, mean ± deviation over {sets} sets of three "
        f"networks:\n\n{table(head, lines)}\nIn the figure the three networks of the first set are triangles, their "
        "mean is the star; losses above 4 are cut."
    )


EXPERIMENT = Experiment(
    "landscape",
    "Landscape",
    "Are three networks in one basin of the loss once they are aligned? The loss is measured in the plane through "
    "them; with BatchNorm, its statistics are measured again at every point. The *barrier* is how far the loss of "
    "their mean is above the mean of their losses.",
    _units,
    _draw,
    _body,
)
