"""Many models: every way of merging, N = 2 to 10."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from automerge import (
    CCA,
    ActivationMatching,
    FrankWolfe,
    Identity,
    Matcher,
    MergeMany,
    PairwiseFrankWolfe,
    Synchronised,
    WeightMatching,
)
from zoo.experiments._bench import Aligned, Bench
from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit, disjoint, span
from zoo.experiments._figures import colour, curve, legend_below, style, tiles
from zoo.experiments._tables import difference, grid, mean, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATCHERS: dict[str, Matcher] = {
    "naive": Identity(),
    "merge-many": MergeMany(),
    "merge-many, as published": MergeMany(start="identity"),
    "weight-matching": WeightMatching(),
    "pairwise": PairwiseFrankWolfe(),
    "synchronised": Synchronised(),
    "universe": FrankWolfe(),
    "cca": CCA(),
    "activation": ActivationMatching(WeightMatching(), mix=1.0),
    "universe, activations": ActivationMatching(),
}
"""Name -> matcher. ``weight-matching`` and ``pairwise`` are run with each model in turn as the reference."""

REFERENCES = 5

FUSED = {"universe, BatchNorm fused": FrankWolfe(), "cca, BatchNorm fused": CCA()}
"""Run on networks whose BatchNorm is folded into the convolutions, because no matrix acts on a running variance."""

BY_WEIGHTS = ("merge-many", "merge-many, as published", "weight-matching", "pairwise", "synchronised")
"""The baselines that permute by weights; ``activation`` is the one that permutes by activations."""

# setting -> (seeds that each set may use, N)
_PLANS: dict[str, tuple[int, tuple[int, ...]]] = {
    "digits-mlp": (10, tuple(range(2, 11))),
    "digits-resnet": (10, tuple(range(2, 11))),
    "digits-resnet-plain": (5, (5,)),
    "digits-resnet-layernorm": (5, (5,)),
    "digits-vit": (5, (5,)),
    "mnist-mlp": (5, (2, 3, 5)),
    "fashion-mlp": (5, (2, 3, 5)),
    "fashion-resnet": (5, (2, 3, 5)),
    "fashion-vgg": (5, (2, 3, 5)),
    "shakespeare-lm": (3, (2, 3)),
    "cifar-resnet": (5, (2, 5)),
}
_SMALL = ("digits-mlp", "digits-resnet")


def rows_of(bench: Bench, name: str, matcher: Matcher, seeds: list[int]) -> Iterator[Row]:
    """Match once (for pairwise matchers with each reference), repair in every way that fits."""
    states = bench.states(seeds)
    references: list[int | None] = [None]
    if name in ("weight-matching", "pairwise"):
        references = list(range(min(len(seeds), REFERENCES)))
    for reference in references:
        used: Any = matcher if reference is None else replace(matcher, reference=reference)  # type: ignore[type-var]
        aligned = bench.align(used, states)
        extra = {} if reference is None else {"reference": seeds[reference]}
        for repair in bench.repairs:
            state = bench.repaired(repair, aligned)
            yield {"matcher": name, **extra, "repair": repair, **bench.score(state), "seconds": aligned.seconds}
        if name in ("merge-many", "universe"):
            yield {"matcher": name, "repair": "repair (unaligned)", **_unaligned(bench, aligned, states)}


def _unaligned(bench: Bench, aligned: Aligned, states: list[Any]) -> dict[str, float]:
    """Repaired towards the networks as they were: what the published code does to MergeMany."""
    return bench.score(bench.repaired("repair", aligned, towards=states))


def _work(lab: Lab, setting: str, seeds: list[int]) -> Iterator[Row]:
    bench = lab.bench(setting)
    for seed in seeds:
        yield {"matcher": "single models", "seed": seed, "repair": "none", **bench.score(bench.state(seed))}
    yield {"matcher": "ensemble", "repair": "none", **bench.score(bench.states(seeds))}
    for name, matcher in MATCHERS.items():
        yield from rows_of(bench, name, matcher, seeds)
    if bench.normed:
        fused = lab.bench(setting, fused=True)
        for name, matcher in FUSED.items():
            yield from rows_of(fused, name, matcher, seeds)


def _units(lab: Lab) -> Iterator[Unit]:
    for setting in _PLANS if lab.profile.full else _SMALL:
        stride, counts = _PLANS[setting]
        stride = min(stride, lab.profile.most)
        for n in (c for c in counts if c <= stride):
            for number, seeds in enumerate(disjoint(lab.profile.sets, stride, n)):
                key = {"setting": setting, "n": n, "set": number, "seeds": span(seeds)}
                yield Unit(key, partial(_work, lab, setting, seeds))


def _draw(record: Record) -> Figure:
    wide = [s for s in record.values("setting") if len(record.values("n", setting=s)) > 2]
    figure, axes = tiles(len(wide) + 1, 4.4, 3.4)
    shown = [n for n in (*MATCHERS, "cca, BatchNorm fused") if n != "merge-many, as published"]
    for ax, setting in zip(axes, wide, strict=False):
        for name in ("single models", "ensemble"):
            line = "-" if name == "ensemble" else ":"
            curve(ax, record.where(setting=setting, matcher=name), "n", name, line=line)
        for k, name in enumerate(shown):
            rows = record.where(setting=setting, matcher=name, repair="repair")
            if rows:
                curve(ax, rows, "n", name, number=k)
        style(ax, record.title(setting), "number of models merged", "accuracy after REPAIR (%)")
        ax.set_xticks(record.values("n", setting=setting))
        means = [mean(record.where(setting=setting, matcher=m, repair="repair")) for m in shown if m != "naive"]
        ax.set_ylim(100 * min(m.value for m in means if m.sets) - 12, 101)  # the naive average falls out of the picture
    settings = record.values("setting")
    labels = []
    for j, setting in enumerate(settings):
        n = min(5, max(record.values("n", setting=setting)))
        labels.append(f"{setting}, N = {n}")
        for k, name in enumerate(("single models", *shown)):
            found = mean(
                record.where(setting=setting, n=n, matcher=name, repair=("repair", "none")[name == "single models"])
            )
            mark = "|" if name == "single models" else "o"
            label = name if j == 0 else None
            axes[-1].plot(
                [100 * found.value], [j], mark, color=colour(name, k), label=label, markersize=4 + 6 * (mark == "|")
            )
    axes[-1].set_yticks(range(len(settings)), labels)
    axes[-1].invert_yaxis()
    style(axes[-1], "all settings", "accuracy after REPAIR (%)", "")
    legend_below(figure, axes[-1])
    return figure


def _body(record: Record) -> str:
    parts = []
    for setting in record.values("setting"):
        counts = record.values("n", setting=setting)
        parts.append(f"## {record.title(setting)}\n")
        for n in counts if len(counts) < 3 else [c for c in counts if c in (2, 5, counts[-1])]:
            rows = record.where(setting=setting, n=n)
            sets = len({r["set"] for r in rows})
            single = mean([r for r in rows if r["matcher"] == "single models"])
            ensemble = mean([r for r in rows if r["matcher"] == "ensemble"])
            parts.append(
                f"N = {n}, {sets} sets. Single models {single.percent()}, ensemble {ensemble.percent()} "
                f"(mean ± deviation over the sets, accuracy in %).\n"
            )
            names = [m for m in record.values("matcher", setting=setting) if m not in ("single models", "ensemble")]
            repairs = [r for r in record.values("repair", setting=setting) if r != "repair (unaligned)"]
            parts.append(grid(rows, "matcher", "repair", names, repairs))
    return "\n".join(["## Summary\n", standing(record), *parts, _flattery(record)])


def standing(record: Record, last: bool = False) -> str:
    """The universe against the permutation baselines: by weights alone, and by activations.

    Args:
        record: of this experiment.
        last: for each setting only its largest N.
    """
    lines = []
    above = [0, 0]
    for setting in record.values("setting"):
        counts = record.values("n", setting=setting)
        for n in counts[-1:] if last else counts:
            rows = {m: record.where(setting=setting, n=n, matcher=m, repair="repair") for m in MATCHERS}
            found = {m: mean(r) for m, r in rows.items()}
            best = max(BY_WEIGHTS, key=lambda m: found[m].value)
            cells = [f"{record.title(setting)}, N = {n}"]
            for k, (ours, theirs) in enumerate((("universe", best), ("universe, activations", "activation"))):
                gap = difference(rows[ours], rows[theirs])
                above[k] += found[ours].value >= found[theirs].value
                other = f"{found[theirs].percent()} ({theirs})" if k == 0 else found[theirs].percent()
                cells += [found[ours].percent(), other, f"{100 * gap.value:+.1f}, {gap.wins} of {gap.sets}"]
            lines.append(cells)
    text = (
        "Accuracy after REPAIR on aligned endpoints, in %; the differences in points, and in how many sets they are "
        "above zero. By weights alone the universe is at or above the best of five baselines, *picked after the "
        f"fact*, in the mean in {above[0]} of {len(lines)} lines; by activations it is at or above pairwise "
        f"activation matching in {above[1]}.\n"
    )
    head = ["", "universe", "best baseline by weights", "difference"]
    head += ["universe, activations", "activation", "difference"]
    return f"{text}\n{table(head, lines)}"


def _flattery(record: Record) -> str:
    lines = []
    for setting in record.values("setting"):
        n = max(record.values("n", setting=setting))
        cells = [
            mean(record.where(setting=setting, n=n, matcher=m, repair=r)).percent()
            for m in ("merge-many", "universe")
            for r in ("repair", "repair (unaligned)")
        ]
        lines.append([record.title(setting), str(n), *cells])
    head = ["setting", "N", "merge-many", "merge-many, unaligned", "universe", "universe, unaligned"]
    return (
        "## REPAIR towards unaligned models\n\nThe code of C2M3 repairs MergeMany with the statistics of the models "
        "*before* "
        "they are aligned. What that costs, for both matchers:\n\n" + table(head, lines)
    )


EXPERIMENT = Experiment(
    "many",
    "Many models",
    "Which way of merging N networks keeps most of their accuracy, as it is and repaired? Every repair aims at the "
    "*aligned* networks and sees the same 512 unlabelled training inputs (64 pieces of text), which the matchers "
    "that look at activations see too. `weight-matching` and `pairwise` are run with each network as the reference "
    "(the first five, of more), and averaged. `cca` permutes, by activations, what admits no matrix: all that "
    "BatchNorm or LayerNorm follows, and attention.",
    _units,
    _draw,
    _body,
)
