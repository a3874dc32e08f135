"""Different widths of one architecture in one universe: the narrower networks get dead units, where that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from automerge import FrankWolfe, Identity, Matcher, MergeMany
from zoo.experiments._bench import Bench, State
from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit
from zoo.experiments._figures import bars, legend, panels, style
from zoo.experiments._settings import SETTINGS, Setting, mlp_of_width, resnet_of_width
from zoo.experiments._tables import grid, mean, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MATCHERS: dict[str, Matcher] = {"naive": Identity(), "merge-many": MergeMany(), "universe": FrankWolfe()}
_TOLERANCE = 1e-4


class PaddingError(ValueError):
    """Dead units would change what a network computes."""


@dataclass(frozen=True)
class Padded:
    """A network in a wider architecture.

    Attributes:
        state: its weights, with zeros for the units that it does not have.
        error: the largest change of an output on the example, relative to the largest output.
    """

    state: State
    error: float


def pad(narrow: nn.Module, wide: nn.Module, example: torch.Tensor) -> Padded:
    """A narrow network's function in a wider architecture of the same kind: its weights in the corner, zeros elsewhere.

    A unit whose weights are all zero is dead: it puts out zero and nothing reads it. BatchNorm keeps it so, if its own weight
    and bias are zero too; a mean or a norm *over* the units does not, and then there is no such padding.

    Args:
        narrow: the network.
        wide: an untrained network of the wider architecture; not changed.
        example: inputs on which the two are compared.

    Raises:
        PaddingError: if the padded network computes something else, with the reason.
    """
    own, template = narrow.state_dict(), wide.state_dict()
    state: State = {}
    for name, value in template.items():
        if not value.is_floating_point():
            state[name] = own[name].clone()
            continue
        padded = torch.ones_like(value) if name.endswith("running_var") else torch.zeros_like(value)
        padded[tuple(slice(0, n) for n in own[name].shape)] = own[name]
        state[name] = padded
    with torch.no_grad():
        before = narrow.eval()(example)
        after = torch.func.functional_call(wide.eval(), state, (example,))
    error = float((after - before).abs().max() / before.abs().max())
    if not error < _TOLERANCE:
        raise PaddingError(
            f"dead units would change the function (outputs by {error:.0%} of the largest): {_reason(narrow, wide)}"
        )
    return Padded(state, error)


def _reason(narrow: nn.Module, wide: nn.Module) -> str:
    modules: Mapping[str, nn.Module] = dict(wide.named_modules())
    for name, module in narrow.named_modules():
        other = modules.get(name)
        for kind, size in (
            ("LayerNorm", "normalized_shape"),
            ("RMSNorm", "normalized_shape"),
            ("GroupNorm", "num_channels"),
        ):
            a, b = getattr(module, size, None), getattr(other, size, None)
            if type(module).__name__ == kind and a != b:
                few, many = (x[-1] if isinstance(x, tuple) else int(str(x)) for x in (a, b))
                return f"the {kind} {name!r} takes its statistics over all {many} units, of which {many - few} would be dead"
    return "units of the wider architecture are laid out otherwise (heads side by side, say)"


def _mixed(lab: Lab, narrow: Setting, wide: Setting, seed: int) -> tuple[Bench, list[State], list[float]]:
    """Two wide networks and two narrow ones in the wide architecture, with the accuracies of all."""
    small, large = lab.bench(narrow), lab.bench(wide)
    states = [large.state(seed), large.state(seed + 1)]
    alone = [large.score(s)["accuracy"] for s in states]
    for number in (seed, seed + 1):
        found = pad(small.loaded(small.state(number)), large.network, large.example)
        states.append(found.state)
        alone.append(small.score(small.state(number))["accuracy"])
    return large, states, alone


def _work(lab: Lab, narrow: Setting, wide: Setting, seed: int) -> Iterator[Row]:
    try:
        bench, states, alone = _mixed(lab, narrow, wide, seed)
    except PaddingError as error:
        yield {"matcher": "refused", "reason": str(error)}
        return
    for k, (state, accuracy) in enumerate(zip(states, alone, strict=True)):
        yield {"matcher": "single models", "repair": "none", "model": k, "accuracy": accuracy}
        yield {"matcher": "padded models", "repair": "none", "model": k, **bench.score(state)}
    yield {"matcher": "ensemble", "repair": "none", **bench.score(states)}
    for name, matcher in _MATCHERS.items():
        aligned = bench.align(matcher, states)
        for repair in ("none", "repair"):
            yield {"matcher": name, "repair": repair, **bench.score(bench.repaired(repair, aligned))}
    only = bench.align(FrankWolfe(), states[:2])
    for repair in ("none", "repair"):
        score = bench.score(bench.repaired(repair, only))
        yield {"matcher": "universe, the two wide ones alone", "repair": repair, **score}


def _plan(lab: Lab) -> list[tuple[Setting, Setting]]:
    narrow_norm = SETTINGS["digits-resnet-layernorm"]
    half = Setting(
        "digits-resnet-layernorm-w0.5",
        "ResNet8 ×0.5, LayerNorm, digits",
        partial(narrow_norm.factory.func, 8, **narrow_norm.factory.keywords),  # type: ignore[attr-defined]
        narrow_norm.data,
        narrow_norm.recipe,
    )
    pairs = [(mlp_of_width(32), mlp_of_width(64)), (resnet_of_width(0.5), resnet_of_width(1)), (half, narrow_norm)]
    if lab.profile.full:
        pairs[1:1] = [(mlp_of_width(64), mlp_of_width(128)), (mlp_of_width(16), mlp_of_width(256))]
        pairs[4:4] = [(resnet_of_width(1), resnet_of_width(2))]
    return pairs


def _units(lab: Lab) -> Iterator[Unit]:
    for narrow, wide in _plan(lab):
        refused = "layernorm" in wide.name
        for number in range(1 if refused else lab.profile.sets):
            key = {
                "setting": wide.name,
                "narrow": narrow.name,
                "n": 4,
                "set": number,
                "seeds": f"{2 * number}-{2 * number + 1}",
            }
            yield Unit(key, partial(_work, lab, narrow, wide, 2 * number))


def _pairs(record: Record) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["narrow"], r["setting"]) for r in record.rows))


def _draw(record: Record) -> Figure:
    kept = [(a, b) for a, b in _pairs(record) if not record.where(setting=b, narrow=a, matcher="refused")]
    figure, (ax,) = panels(1, width=1.6 + 1.6 * len(kept), height=3.4)
    cells = {}
    for name in ("single models", *_MATCHERS, "universe, the two wide ones alone"):
        repair = "none" if name == "single models" else "repair"
        found = [mean(record.where(setting=b, narrow=a, matcher=name, repair=repair)) for a, b in kept]
        cells[name] = [(m.value, m.deviation) for m in found]
    bars(ax, [f"{a}\n+ {b}" for a, b in kept], cells)
    style(ax, "two narrow and two wide networks", "", "accuracy after REPAIR (%)")
    legend(ax)
    return figure


def _body(record: Record) -> str:
    parts, refusals = [], []
    for narrow, wide in _pairs(record):
        rows = record.where(setting=wide, narrow=narrow)
        title = f"`{narrow}` and `{wide}`"
        if any(r["matcher"] == "refused" for r in rows):
            refusals.append(f"- {title}: {rows[0]['reason']}.")
            continue
        gap = max(
            abs(a["accuracy"] - b["accuracy"])
            for a in rows
            for b in rows
            if (a["matcher"], b["matcher"]) == ("single models", "padded models")
            and (a["set"], a["model"]) == (b["set"], b["model"])
        )
        parts.append(f"## {title}\n\nPadding changes no accuracy by more than {100 * gap:.2f} points.\n")
        names = [m for m in record.values("matcher") if m not in ("padded models", "refused")]
        parts.append(grid(rows, "matcher", "repair", names, ["none", "repair"]))
    refused = table(["refused", ""], []) if not refusals else "\n".join(refusals) + "\n"
    return "\n".join([*parts, "## Refused\n", refused])


EXPERIMENT = Experiment(
    "widths",
    "Different widths",
    "Can networks of different widths be merged in one universe? Two narrow and two wide networks of one "
    "architecture; the narrow ones are padded with dead units, which is refused where it would change their "
    "function.",
    _units,
    _draw,
    _body,
)
