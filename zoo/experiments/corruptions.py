"""Out of distribution: merged networks under corruptions, and their calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from zoo.experiments._bench import Bench, State, batches
from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit, each_set
from zoo.experiments._figures import curve, legend_below, panels, style
from zoo.experiments._tables import Mean, grid, mean, table
from zoo.experiments.many import MATCHERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEVERITIES = (1, 2, 3)
_MERGES = ("naive", "merge-many", "universe", "universe, activations")


def noise(x: torch.Tensor, severity: int) -> torch.Tensor:
    """Gaussian noise of 0.3, 0.6 and 0.9 deviations of the pixels."""
    rng = torch.Generator().manual_seed(severity)
    return x + 0.3 * severity * torch.randn(x.shape, generator=rng)


def blur(x: torch.Tensor, severity: int) -> torch.Tensor:
    """A Gaussian kernel of 0.5, 0.8 and 1.1 pixels, on images of 8 or 14 pixels; in proportion on larger ones."""
    width = (0.2 + 0.3 * severity) * max(1.0, x.shape[-1] / 14)
    at = torch.arange(-3, 4) * 1.0
    line = torch.exp(-0.5 * (at / width) ** 2)
    kernel = torch.outer(line / line.sum(), line / line.sum()).expand(x.shape[1], 1, 7, 7)
    return F.conv2d(F.pad(x, (3,) * 4, mode="replicate"), kernel, groups=x.shape[1])


def rotation(x: torch.Tensor, severity: int) -> torch.Tensor:
    """By 10, 20 and 30 degrees, to the left or to the right in turn; what comes in has the value of the border."""
    angle = math.radians(10 * severity)
    turn = torch.where(torch.arange(len(x)) % 2 == 0, angle, -angle)
    zero = torch.zeros(len(x))
    rows = [torch.stack([turn.cos(), -turn.sin(), zero], 1), torch.stack([turn.sin(), turn.cos(), zero], 1)]
    places = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, places, padding_mode="border", align_corners=False)


def contrast(x: torch.Tensor, severity: int) -> torch.Tensor:
    """Every image brought nearer to its mean: 0.7, 0.4 and 0.1 of its contrast are left."""
    middle = x.mean(dim=(1, 2, 3), keepdim=True)
    return middle + (1.0 - 0.3 * severity) * (x - middle)


CORRUPTIONS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "noise": noise,
    "blur": blur,
    "rotation": rotation,
    "contrast": contrast,
}


def calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017): mean gap of confidence and accuracy over equal bins of confidence.

    Examples:
        >>> calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))  # 0.75 against 0.5
        0.25
    """
    confidence, chosen = probabilities.double().max(dim=-1)
    right = (chosen == labels).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gap = 0.0
    for k in range(bins):
        here = place == k
        if here.any():
            gap += float((confidence[here] - right[here]).sum().abs())
    return gap / len(labels)


@torch.no_grad()
def probabilities(bench: Bench, states: list[State], x: torch.Tensor) -> torch.Tensor:
    """The mean of the networks' probabilities."""
    network = bench.network.eval()
    parts = []
    for state in states:
        outputs = [torch.func.functional_call(network, state, (part,)) for part in x.split(512)]
        parts.append(torch.cat(outputs).double().softmax(dim=-1))
    return torch.stack(parts).mean(0)


def _measure(bench: Bench, source: Any, x: torch.Tensor) -> Row:
    labels = bench.data.y_test
    states = source if isinstance(source, list) else [source]
    return {
        **bench.score(source, batches(x, labels)),
        "calibration": calibration_error(probabilities(bench, states, x), labels),
    }


def _work(lab: Lab, setting: str, seeds: list[int]) -> Iterator[Row]:
    bench = lab.bench(setting)
    states = bench.states(seeds)
    merged = {name: bench.repaired("repair", bench.align(MATCHERS[name], states)) for name in _MERGES}
    for name, severity in [("none", 0), *((n, s) for n in CORRUPTIONS for s in SEVERITIES)]:
        x = CORRUPTIONS[name](bench.data.x_test, severity) if severity else bench.data.x_test
        key = {"corruption": name, "severity": severity}
        for seed, state in zip(seeds, states, strict=True):
            yield {**key, "who": "single models", "seed": seed, **_measure(bench, state, x)}
        yield {**key, "who": "ensemble", **_measure(bench, states, x)}
        for who, state in merged.items():
            yield {**key, "who": who, **_measure(bench, state, x)}


def _units(lab: Lab) -> Iterator[Unit]:
    small = ("digits-mlp", "digits-resnet")
    settings = (*small, "fashion-mlp", "fashion-resnet") if lab.profile.full else small
    yield from each_set(lab, settings, min(5, lab.profile.most), _work)


def _draw(record: Record) -> Figure:
    settings = record.values("setting")
    figure, axes = panels(len(CORRUPTIONS), len(settings), width=2.8, height=2.5)
    for k, ax in enumerate(axes):
        setting, name = settings[k // len(CORRUPTIONS)], list(CORRUPTIONS)[k % len(CORRUPTIONS)]
        rows = [*record.where(setting=setting, corruption="none"), *record.where(setting=setting, corruption=name)]
        for j, who in enumerate(("single models", "ensemble", *_MERGES)):
            line = ":" if who == "single models" else "-"
            curve(ax, [r for r in rows if r["who"] == who], "severity", who, number=j, line=line)
        style(ax, f"{setting}: {name}", "severity", "accuracy (%)")
    legend_below(figure, axes[0])
    return figure


def _body(record: Record) -> str:
    parts = []
    who = ["single models", "ensemble", *_MERGES]
    for setting in record.values("setting"):
        rows = [{**r, "what": r["corruption"] if r["severity"] else "clean"} for r in record.where(setting=setting)]
        columns = ["clean", *CORRUPTIONS]
        parts.append(f"## {record.title(setting)}, N = {rows[0]['n']}\n")
        parts.append("Accuracy in %, means over the three severities:\n")
        parts.append(grid(rows, "who", "what", who, columns, corner=""))
        parts.append("Expected calibration error in points (15 bins; lower is better):\n")
        parts.append(grid(rows, "who", "what", who, columns, value="calibration", corner=""))
        parts.append("Loss in nats:\n")
        show = partial(Mean.plain, digits=3)
        parts.append(grid(rows, "who", "what", who, columns, value="loss", show=show, corner=""))
    return "\n".join([_summary(record), *parts])


def _summary(record: Record) -> str:
    lines = []
    for setting in record.values("setting"):
        cells = [record.title(setting)]
        for who in ("single models", "ensemble", "universe", "universe, activations"):
            clean = mean(record.where(setting=setting, who=who, severity=0))
            wrong = mean(record.where(setting=setting, who=who, severity=SEVERITIES))
            cells.append(
                f"{100 * clean.value:.1f} → {100 * wrong.value:.1f} ({100 * (wrong.value - clean.value):+.1f})"
            )
        lines.append(cells)
    head = ["", "single models", "ensemble", "universe", "universe, activations"]
    return "## Summary\n\nAccuracy in %, clean → mean over all corruptions (change):\n\n" + table(head, lines)


EXPERIMENT = Experiment(
    "corruptions",
    "Out of distribution",
    "Is a merged network as robust and as well calibrated as the networks it is made of? All merges are repaired on "
    "the aligned networks with clean training images. Corruptions: Gaussian noise, blur, rotation and loss of "
    "contrast, at three severities; labels are not used for anything but the scores.",
    _units,
    _draw,
    _body,
)
