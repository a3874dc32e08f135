"""Index tensors whose entries are positions along an axis that may be permuted: the nearest entries, the best experts.

Such a tensor carries the one-hot coding of its entries (`Points`) and the obligation to pin that axis, which is met as soon
as something uses the positions themselves. What is here keeps to their meaning: they move with the axis. The positions may
have an order of their own for every place of the index tensor (the classes of several categorical variables).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from automerge.rules._engine import Engine
from automerge.rules._value import SELECTED, Factor, Points, Value, new_letter


def bare(value: Value) -> Value:
    """A value without its promises, where a rule has seen to them; what it owes as a slice it meets."""
    return value.whole().with_axes(value.axes)


def common_labels(points: Points) -> np.ndarray | None:
    """The labels of positions that have one order, whatever entry of an index tensor names them; None for others."""
    letters = points.code.axes[-1]
    own = [f for f in points.code.factors if f.letters == letters]
    return own[0].labels if len(letters) == len(own) == 1 and own[0].injective else None


def labels_of(engine: Engine, index: Value) -> np.ndarray | None:
    """The labels of the positions that an index tensor names; from here on all its entries share their order."""
    if index.points is None or index.points.stride != 1:
        return None
    points = as_one(engine, index.points)
    labels = common_labels(points)
    if labels is None:
        code, (letter,) = points.code, points.code.axes[-1] or (None,)
        if letter is None or letter in code.pinned:
            return None
        labels = engine.axes.fresh((points.size,))
        axes = (*((),) * (len(code.axes) - 1), (letter,))
        common = Value(axes, {letter: points.size}, [Factor((letter,), labels)])
        points = replace(points, code=engine.elementwise([code, common]))
    index.points = points
    return labels


def as_one(engine: Engine, points: Points) -> Points:
    """The same where positions of a product of axes are those of one."""
    if len(points.code.axes[-1]) < 2:
        return points
    return replace(points, code=engine.merge_axis(points.code, len(points.code.axes) - 1)[0])


def naming(x: Value, dim: int, index: Value) -> bool:
    """Whether an index tensor names positions of a whole axis that may move."""
    points = index.points
    if points is None or points.stride != 1 or points.size != x.shape[dim] or set(x.axes[dim]) & x.pinned:
        return False
    return bool(points.code.axes[-1])


def coded(x: Value, dim: int, index: Value) -> bool:
    """Whether it does so in an order that depends on which of its entries does."""
    return naming(x, dim, index) and index.points is not None and common_labels(index.points) is None


def points_into(engine: Engine, x: Value, dim: int, index: Value) -> np.ndarray | None:
    """The labels of an axis, if the index tensor holds positions along exactly such an axis.

    An axis may end before the one that was pointed into: then the last of those positions do not come this far.
    """
    n = x.shape[dim]
    if index.points is None or n > index.points.size or set(x.axes[dim]) & x.pinned:
        return None
    points = labels_of(engine, index)
    if points is None:
        return None
    if n < points.size:
        engine.axes.pin(points[n:], "not among the positions that are looked up")
    return points[:n]


def ties_noted(engine: Engine) -> None:
    """Say what a choice of the largest rests on."""
    engine.notes[
        f"{engine.axes.where}: entries chosen by the largest or smallest of some scores are interchangeable as long as no "
        "two of those scores are exactly equal (the first of equals wins)"
    ] = None


def tie_axis(engine: Engine, x: Value, dim: int, labels: np.ndarray) -> Value:
    """Give an axis (as one letter) the labels of the one that an index points into, tied to those it has."""
    ties_noted(engine)
    x, letter = engine.merge_axis(x, dim)
    if letter is None:
        return x
    vector = Value(
        tuple((letter,) if k == dim else () for k in range(len(x.axes))),
        {letter: labels.size},
        [Factor((letter,), labels)],
    )
    return engine.elementwise([x, vector])


def alike(values: Sequence[Value]) -> bool:
    """Whether several index tensors name as many positions each: joined or compared, these are positions of one axis."""
    first = values[0].points
    return first is not None and all(
        v.points is not None and (v.points.size, v.points.stride) == (first.size, first.stride) for v in values
    )


def pointing_together(engine: Engine, values: Sequence[Value], joined: Value, dim: int, nodes: Sequence[Any]) -> Value:
    """A join of index tensors is one, and promises what they promise."""
    points = [v.points for v in values if v.points is not None]
    joined.points = Points(engine.concatenate([p.code for p in points], dim, nodes), points[0].stride)
    joined.promises = [promise for v in values for promise in v.promises]
    return joined


def relabelled(engine: Engine, index: Value, out: Value) -> Value:
    """Entries of an index tensor at other places, of which each may come from any: the positions have one order."""
    labels = labels_of(engine, index)
    if labels is None or index.points is None:
        index.settle()
        return out
    letter = new_letter()
    size, factors = out.size | {letter: labels.size}, [*out.factors, Factor((letter,), labels)]
    code = Value((*out.axes, (letter,)), size, factors, set(out.pinned), chosen=out.chosen)
    out.points, out.promises = Points(code, index.points.stride), index.promises
    return out


def rejoined(whole: Value, functions: Sequence[str]) -> Value:
    """A tensor that pieces of were joined again: an index tensor is one still, others meet what they owe.

    Args:
        whole: the tensor.
        functions: what was applied to the pieces; a function of positions uses them.
    """
    kept = whole.points is not None and tuple(functions) in ((), SELECTED)
    return whole.whole() if kept else whole.settle()


def holds(dtype: torch.dtype, count: int) -> bool:
    """Whether a type tells this many positions from each other, as the numbers that they are."""
    positions = torch.arange(count)
    return torch.equal(positions.to(dtype).to(positions.dtype), positions)
