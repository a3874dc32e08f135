"""Index tensors whose entries are positions along an axis that may be permuted: the nearest entries, the best experts.

Such a tensor carries the labels of that axis (`Value.points`) and the obligation to pin it, which is met as soon as
something uses the positions themselves. What is here keeps to their meaning: they move with the axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from automerge.rules._engine import Engine
from automerge.rules._registry import Context, pointwise, rule
from automerge.rules._value import SELECTED, Factor, Value, plain


def bare(value: Value) -> Value:
    """A value without its promises, where a rule has seen to them; what it owes as a slice it meets."""
    return value.whole().with_axes(value.axes)


def points_into(engine: Engine, x: Value, dim: int, index: Value) -> np.ndarray | None:
    """The labels of an axis, if the index tensor holds positions along exactly such an axis.

    An axis may end before the one that was pointed into: then the last of those positions do not come this far.
    """
    points, n = index.points, x.shape[dim]
    if points is None or n > points.size or set(x.axes[dim]) & x.pinned:
        return None
    if n < points.size:
        engine.axes.pin(points[n:], "not among the positions that are looked up")
    return points[:n]


def tie_axis(engine: Engine, x: Value, dim: int, labels: np.ndarray) -> Value:
    """Give an axis (as one letter) the labels of the one that an index points into, tied to those it has."""
    engine.notes[
        f"{engine.axes.where}: entries chosen by the largest or smallest of some scores are interchangeable as long as no "
        "two of those scores are exactly equal (the first of equals wins)"
    ] = None
    x, letter = engine.merge_axis(x, dim)
    if letter is None:
        return x
    vector = Value(
        tuple((letter,) if k == dim else () for k in range(len(x.axes))),
        {letter: labels.size},
        [Factor((letter,), labels)],
    )
    return engine.elementwise([x, vector])


def same_points(engine: Engine, values: Sequence[Value]) -> np.ndarray | None:
    """The labels of the one axis that several index tensors point into; None if there is none."""
    points = [v.points for v in values]
    first = points[0]
    if first is None or any(p is None or p.shape != first.shape for p in points):
        return None
    root = engine.axes.root
    return first if all(np.array_equal(root[first], root[p]) for p in points) else None


def pointing_together(values: Sequence[Value], joined: Value) -> Value:
    """A join of index tensors into one axis points into it as well, and promises what they promise."""
    joined.points = values[0].points
    joined.promises = [promise for v in values for promise in v.promises]
    return joined


def rejoined(whole: Value, functions: Sequence[str]) -> Value:
    """A tensor that pieces of were joined again: an index tensor still points where it did, others meet what they owe.

    Args:
        whole: the tensor.
        functions: what was applied to the pieces; a function of positions uses them.
    """
    kept = whole.points is not None and tuple(functions) in ((), SELECTED)
    return bare(whole) if kept else whole.settle()


def holds(dtype: torch.dtype, count: int) -> bool:
    """Whether a type tells this many positions from each other, as the numbers that they are."""
    positions = torch.arange(count)
    return torch.equal(positions.to(dtype).to(positions.dtype), positions)


@rule("eq", "ne", carries=True)
def compared(context: Context, *args: Any, **kwargs: Any) -> Value:
    """Two positions along one axis; or positions with some of the axis, each once, which makes one-hot rows."""
    a, b = args
    engine = context.engine
    for index, other in ((a, b), (b, a)):
        if isinstance(index, Value) and index.points is not None and _number(other) is not None:
            engine.axes.pin(_those(index.points, [_number(other)]), "compared with a number")
            return engine.elementwise([bare(index)])
    if isinstance(a, Value) and isinstance(b, Value):
        if same_points(engine, [a, b]) is not None:
            return engine.elementwise([bare(a), bare(b)])
        for index, other in ((a, b), (b, a)):
            found = _counted(index, other)
            if found is not None:
                assert index.points is not None
                dim, some = found
                engine.axes.select(index.points[some], index.points)
                return engine.elementwise([bare(index), tie_axis(engine, plain(other.shape), dim, index.points[some])])
    return pointwise(context, *args, **kwargs)


def _number(value: Any) -> float | None:
    """A number that does not depend on the data, or None."""
    if isinstance(value, Value):
        return float(value.data) if value.data is not None and value.data.numel() == 1 else None
    return float(value) if isinstance(value, (bool, int, float)) else None


def _those(points: np.ndarray, numbers: Sequence[float | None]) -> np.ndarray:
    """The labels of the positions among these numbers."""
    return points[[k for k in range(points.size) if k in numbers]]


@rule("masked_fill", carries=True)
def filled(context: Context, x: Value, mask: Value, value: Any) -> Value:
    """Positions some of which become a certain one: that one stays, the others move with their axis."""
    engine, number = context.engine, _number(value)
    if x.points is None or number not in range(x.points.size):
        return pointwise(context, x.settle(), mask.settle(), value)
    engine.axes.pin(_those(x.points, [number]), "put in the place of other positions")
    return engine.elementwise([bare(x), mask.settle()]).carry(x)


def _counted(index: Value, other: Value) -> tuple[int, np.ndarray] | None:
    """The axis of a constant that lists positions which an index tensor may hold, each once, and these positions."""
    if index.points is None or other.data is None:
        return None
    long = [k for k, n in enumerate(other.shape) if n > 1]
    if len(long) != 1:
        return None
    listed = other.data.detach().cpu().reshape(-1).numpy()
    some = listed.astype(np.int64)
    apart = np.unique(some).size == some.size and np.array_equal(some, listed)
    return (long[0], some) if apart and some.min() >= 0 and some.max() < index.points.size else None


@rule("remainder", "clamp", "clamp_min", "clamp_max", carries=True)
def bounded(context: Context, x: Any, *args: Any, **kwargs: Any) -> Value:
    """Positions that are brought into the range in which they are."""
    if isinstance(x, Value) and x.points is not None:
        name = context.node.target._schema.name.split("::")[1]
        low, high = _range(name, x.points.size, *args, **kwargs)
        if low <= 0 and high >= x.points.size - 1:
            return x.with_axes(x.axes).carry(x)
    return pointwise(context, x, *args, **kwargs)


def _range(name: str, n: int, *args: Any, **kwargs: Any) -> tuple[float, float]:
    """The numbers from 0 to n - 1 that an operator leaves as they are, as the lowest and the highest; none: (1, 0)."""
    given = [*args, *kwargs.values()]
    if any(isinstance(a, Value) for a in given):
        return 1, 0
    if name == "remainder":
        return 0, args[0] - 1
    if name == "clamp":
        bounds = dict(zip(("min", "max"), args, strict=False)) | kwargs
        low, high = bounds.get("min"), bounds.get("max")
        return (0 if low is None else low), (n - 1 if high is None else high)
    return (given[0], n - 1) if name == "clamp_min" else (0, given[0])
