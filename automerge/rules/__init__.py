"""Rules: what every operator says about the axes of its operands.

`analyse` runs the rules over a traced graph. An operator without a rule is decomposed (PyTorch's own decompositions) and
its pieces are ruled; only what remains pins what it touches, and is listed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import fx

from automerge.rules import (  # noqa: F401  (they register themselves)
    _choice,
    _contraction,
    _creation,
    _indexing,
    _joining,
    _movement,
    _ordering,
    _positions,
    _reduction,
    _vision,
    _writing,
)
from automerge.rules._axes import Unruled, settle_unread
from automerge.rules._dispatch import without_dispatch
from automerge.rules._engine import Engine
from automerge.rules._nodes import is_state, lasting
from automerge.rules._parameters import Splits
from automerge.rules._registry import Context, register_rule
from automerge.rules._run import DEBUG, Analysis, Run
from automerge.rules._ties import ORDERED
from automerge.rules._unread import in_part
from automerge.rules._value import Factor, Value

__all__ = [
    "DEBUG",
    "ORDERED",
    "Analysis",
    "Context",
    "Engine",
    "Factor",
    "Unruled",
    "Value",
    "analyse",
    "is_state",
    "register_rule",
]


def analyse(
    graphs: Sequence[fx.GraphModule],
    splits: Splits | None = None,
    withdrawn: Collection[tuple[str, int, int]] = (),
) -> Analysis:
    """Run the rules over traced graphs of one model, whose parameters they share: what is found holds for all of them.

    Args:
        graphs: from `automerge.trace`, on inputs of different sizes.
        splits: parameter axes to be given an order per position of another axis (from an earlier pass's requests).
        withdrawn: splits that are not to be asked for.
    """
    unsorted = [without_dispatch(graph) for graph in graphs]
    for graph, u in zip(graphs, unsorted, strict=True):
        u.graph.meta[ORDERED] = graph.meta.get(ORDERED, False)
    out = _analysed([u.graph for u in unsorted], splits or {}, withdrawn, None)
    while out.engine.refused:
        out = _analysed([u.graph for u in unsorted], splits or {}, withdrawn, out.engine.states)
    for u in unsorted:
        out.values.update({node: out.values[other] for node, other in u.nodes.items() if other in out.values})
        out.sorted |= u.sorted
    return out


def _analysed(
    graphs: Sequence[fx.GraphModule],
    splits: Splits,
    withdrawn: Collection[tuple[str, int, int]],
    states: Collection[Any] | None,
) -> Analysis:
    engine = Engine(states)
    engine.withdrawn = frozenset(withdrawn)
    engine.requests, engine.several = dict(splits), len(graphs) > 1
    out = Analysis(engine)
    runs = [Run(graph, splits, out) for graph in graphs]
    for run in runs:
        run.run()
    out.unruled = list(dict.fromkeys(out.unruled))
    _settle_splits(runs, out)
    engine.settle_lengths()
    return out


def _settle_splits(runs: Sequence[Run], out: Analysis) -> None:
    """Decide what to split in the next pass; what no graph reads stays in place."""
    engine = out.engine
    shapes = {name: value.shape for name, value in out.states.items()}
    out.unread = in_part([run.unread(run.live) for run in runs], shapes)
    out.unseen = (
        in_part([run.unread(run.seen) for run in runs], shapes) if any(run.none for run in runs) else out.unread
    )
    if any(run.asked for run in runs):
        out.untold = in_part([run.unread(lasting(run.graph, [])[0]) for run in runs], shapes)
    engine.settle_requests(out.unread)
    if out.unread:
        settle_unread(engine.axes, out.unread)
