"""Operators that join tensors along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from automerge.rules._engine import Engine
from automerge.rules._movement import permuted, with_axis
from automerge.rules._points import alike, bare, pointing_together, rejoined
from automerge.rules._registry import Context, distinct_from, rule
from automerge.rules._value import SELECTED, Value


@rule("cat", "concat", "concatenate", carries=True)
def cat(context: Context, tensors: Sequence[Value], dim: int = 0) -> Value:
    nodes = [context.first(n) for n in context.node.args[0]]
    pairs = [(v, n) for v, n in zip(tensors, nodes, strict=True) if v.shape != (0,)]
    if not pairs:
        return tensors[0]
    dim %= len(pairs[0][0].axes)
    none = [v for v, _ in pairs if v.shape[dim] == 0 and (v.factors or v.pinned)]
    if none:
        return _beside_none(context, none, [(v, n) for v, n in pairs if v.shape[dim]], dim)
    pairs = [(v, n) for v, n in pairs if v.shape[dim]] or pairs[:1]
    if len(pairs) == 1:
        return pairs[0][0]
    whole, axis, joined, functions = _pieces([v for v, _ in pairs])
    if whole is not None and axis == dim and functions[:1] != SELECTED:
        taken = rejoined(whole, functions).moved(lambda v, _: context.engine.take(v, dim, joined))
        return distinct_from([whole], taken) if functions else taken
    apart = _laid_out([v for v, _ in pairs], dim, context.engine)
    if apart is not None:
        return apart.moved(lambda v, tail: context.engine.reshape(v, (*context.shape, *tail)))
    return _joined(context, [v for v, _ in pairs], dim, [n for _, n in pairs], context.node)


def _beside_none(context: Context, none: Sequence[Value], pairs: Sequence[tuple[Value, Any]], dim: int) -> Value:
    """A join with what data chose none of: its other axes are those of the rest, as where one position is added to all."""
    engine = context.engine
    values = [v.settle() for v, _ in pairs]
    out = engine.concatenate(values, dim, [n for _, n in pairs]) if pairs else none[0].settle()
    for value in none:
        one = engine.reduce(value.settle(), set(value.axes[dim]))
        out = engine.elementwise([out, one.with_axes(() if k == dim else axis for k, axis in enumerate(one.axes))])
    return out


@rule("stack", carries=True)
def stack(context: Context, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(tensors[0].axes) + 1
    apart = _laid_out(tensors, dim, context.engine)
    if apart is not None:
        return apart
    if not alike(tensors):
        tensors = [v.settle() for v in tensors]
    nodes = [context.first(n) for n in context.node.args[0]]
    return _joined(context, [v.moved(lambda w, _: with_axis(w, dim)) for v in tensors], dim, nodes)


def _joined(context: Context, values: Sequence[Value], dim: int, nodes: Sequence[Any], node: Any = None) -> Value:
    """A join; of index tensors that name as many positions, which are then those of one axis, it names these."""
    if alike(values):
        joined = context.engine.concatenate([bare(v) for v in values], dim, nodes, node=node)
        return pointing_together(context.engine, values, joined, dim, nodes)
    return context.engine.concatenate([v.settle() for v in values], dim, nodes, node=node)


def _pieces(values: Sequence[Value]) -> tuple[Value | None, int, np.ndarray, tuple[str, ...]]:
    """The tensor that all were cut from along one axis, that axis, the positions, and the functions applied since."""
    origins = [v.origin for v in values if v.origin is not None]
    if len(origins) != len(values) or any(o[0] is not origins[0][0] or o[1] != origins[0][1] for o in origins):
        return None, 0, np.empty(0, np.int64), ()
    if any(o[3] != origins[0][3] for o in origins):
        return None, 0, np.empty(0, np.int64), ()
    return origins[0][0], origins[0][1], np.concatenate([o[2] for o in origins]), origins[0][3]


def _laid_out(values: Sequence[Value], dim: int, engine: Engine) -> Value | None:
    """Equal pieces of one tensor side by side along a further axis: the axis they were cut along, split and moved.

    (Heads that are chunks of the features, joined along the batch.) None if they are no such pieces.
    """
    whole, axis, joined, functions = _pieces(values)
    if whole is None or len(values) < 2 or any(v.shape != values[0].shape for v in values):
        return None
    if np.unique(joined).size != joined.size:
        return None
    shape = values[0].shape
    taken = rejoined(whole, functions).moved(lambda v, _: engine.take(v, axis, joined))
    apart = taken.moved(lambda v, tail: engine.reshape(v, (*shape[:axis], len(values), *shape[axis:], *tail)))
    order = [k for k in range(len(shape) + 1) if k != axis]
    return permuted(apart, [*order[:dim], axis, *order[dim:]])
