"""Ablation: what each part of the universe matcher brings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

import automerge
from automerge import FrankWolfe, Matcher, MergeMany, PairwiseFrankWolfe, Synchronised
from zoo.experiments._bench import Bench
from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit, each_set
from zoo.experiments._figures import panels, style
from zoo.experiments._tables import Mean, difference, mean, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT = "universe (default)"
VARIANTS: dict[str, Matcher] = {
    DEFAULT: FrankWolfe(),
    "without the universe: pairwise": PairwiseFrankWolfe(),
    "without the universe: synchronised": Synchronised(),
    "without Frank-Wolfe: merge-many": MergeMany(),
    "start: identity": FrankWolfe(start="identity"),
    "start: barycentre": FrankWolfe(start="barycentre"),
    "start: random (Sinkhorn)": FrankWolfe(start="sinkhorn"),
    "one restart more": FrankWolfe(restarts=1),
    "no reheating": FrankWolfe(reheats=0),
    "no polishing": FrankWolfe(polish=0),
    "no reheating, no polishing": FrankWolfe(reheats=0, polish=0),
    "all models at once": FrankWolfe(schedule="simultaneous"),
    "normalised blocks": FrankWolfe(block_weights="normalised"),
}
GAUGED = "canonical gauges first"


def objective(states: Sequence[Mapping[str, torch.Tensor]], bench: Bench) -> float:
    """Inner products of all pairs of aligned networks, statistics left out."""
    total = 0.0
    for name in bench.symmetry.shapes:
        if name in bench.symmetry.statistics:
            continue
        stack = torch.stack([s[name].double() for s in states])
        total += 0.5 * float(stack.sum(0).square().sum() - stack.square().sum())
    return total


def _work(lab: Lab, setting: str, seeds: list[int]) -> Iterator[Row]:
    bench = lab.bench(setting)
    states = bench.states(seeds)
    before = objective(states, bench)
    repairs = ("none", "reset", "repair") if bench.normed else ("none", "repair")
    for name, matcher in VARIANTS.items():
        aligned = bench.align(matcher, states)
        gain = objective(aligned.states, bench) - before
        for repair in repairs:
            state = bench.repaired(repair, aligned)
            yield {"variant": name, "repair": repair, "gain": gain, "seconds": aligned.seconds, **bench.score(state)}
    gauged, _ = automerge.canonicalise(bench.network, bench.example, states, bench.symmetry)
    found = bench.align(FrankWolfe(), gauged)
    for repair in repairs:
        yield {
            "variant": GAUGED,
            "repair": repair,
            "seconds": found.seconds,
            **bench.score(bench.repaired(repair, found)),
        }


def _units(lab: Lab) -> Iterator[Unit]:
    small = ("digits-mlp", "digits-resnet")
    more = ("digits-resnet-layernorm", "digits-vit", "mnist-mlp", "fashion-resnet", "fashion-vgg")
    settings = (*small, *more) if lab.profile.full else small
    yield from each_set(lab, settings, min(5, lab.profile.most), _work)


def _relative(record: Record, setting: str, variant: str) -> Mean:
    """The gain in the objective relative to the default's, in the mean over sets."""
    default = {r["set"]: r["gain"] for r in record.where(setting=setting, variant=DEFAULT, repair="none")}
    rows = record.where(setting=setting, variant=variant, repair="none")
    return mean([{"set": r["set"], "share": r["gain"] / default[r["set"]]} for r in rows if "gain" in r], "share")


def _draw(record: Record) -> Figure:
    settings, variants = record.values("setting"), record.values("variant")
    figure, (ax,) = panels(1, width=7.5, height=4.2)
    for k, setting in enumerate(settings):
        base = record.where(setting=setting, variant=DEFAULT, repair="repair")
        gaps = [difference(record.where(setting=setting, variant=v, repair="repair"), base) for v in variants]
        at = [j + (k - (len(settings) - 1) / 2) * 0.8 / len(settings) for j in range(len(variants))]
        margins = [0.0 if g.margin != g.margin else 100 * g.margin for g in gaps]
        ax.errorbar(
            [100 * g.value for g in gaps], at, xerr=margins, fmt="o", markersize=3, linewidth=0.8, label=setting
        )
    ax.set_yticks(range(len(variants)), variants, fontsize=7)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.6)
    style(ax, "", "accuracy after REPAIR against the default (points, 95 % intervals)", "")
    ax.legend(fontsize=6.5, frameon=False)
    return figure


def _body(record: Record) -> str:
    parts = []
    for setting in record.values("setting"):
        n = record.values("n", setting=setting)[0]
        base = record.where(setting=setting, variant=DEFAULT, repair="repair")
        lines = []
        for variant in record.values("variant"):
            rows = record.where(setting=setting, variant=variant)
            after = [r for r in rows if r["repair"] == "repair"]
            against = "" if variant == DEFAULT else str(difference(after, base))
            lines.append(
                [
                    variant,
                    _relative(record, setting, variant).percent(),
                    mean([r for r in rows if r["repair"] == "none"]).percent(),
                    mean(after).percent(),
                    against,
                    mean(rows, "seconds").plain(2),
                ]
            )
        parts.append(f"## {record.title(setting)}, N = {n}\n")
        parts.append(
            table(["variant", "gain in f (%)", "as it is", "after REPAIR", "against the default", "seconds"], lines)
        )
    everything = []
    for variant in record.values("variant"):
        if variant != DEFAULT:
            gap = difference(
                record.where(variant=variant, repair="repair"), record.where(variant=DEFAULT, repair="repair")
            )
            everything.append([variant, str(gap), gap.verdict])
    head = "## All settings together\n\n" + table(
        ["variant", "against the default, after REPAIR", "verdict"], everything
    )
    return "\n".join([head, *parts])


EXPERIMENT = Experiment(
    "ablation",
    "Ablation",
    "What does each part of the universe matcher bring? *f* is the sum of the inner products of all pairs of "
    "aligned networks; its gain over the networks as they are is set against the default's. With *canonical gauges "
    "first* the networks change before they are matched, so their *f* cannot be compared. Differences are paired by "
    "set, with 95 % intervals.",
    _units,
    _draw,
    _body,
)
