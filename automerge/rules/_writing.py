"""Writes at given positions: scatter, index_put, index_add, masked_scatter, writes to strided views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from automerge.rules._axes import Unruled
from automerge.rules._engine import MAX_BESIDE, Engine
from automerge.rules._indexing import constant_index, read_along, varies, whole_axes
from automerge.rules._movement import expanded, permuted, scattered
from automerge.rules._points import bare, coded, points_into, tie_axis, ties_noted
from automerge.rules._positions import gathered
from automerge.rules._registry import Context, rule, values_in
from automerge.rules._value import Value, copy_letters, plain


def scattered_to_points(context: Context, x: Value, dim: int, index: Value, others: Sequence[Value]) -> Value | None:
    """A write at positions that came from an axis with the very labels of the one written."""
    engine = context.engine
    sources = [v for v in others if len(v.axes) == len(x.axes)]
    whole = all(v.shape[k] == x.shape[k] for v in [index, *sources] for k in range(len(x.axes)) if k != dim)
    adds = context.node.target._schema.name.endswith("_add")
    if whole and coded(x, dim, index):
        return _scattered_by_code(engine, x, dim, index, sources, adds)
    points = points_into(engine, x, dim, index) if whole else None
    if points is None:
        return None
    x = tie_axis(engine, x, dim, points)
    parts = []
    for v in [bare(index), *sources]:
        parts.append(copy_letters(v))
    ranks = engine.elementwise(parts)
    gone = set(ranks.axes[dim])
    if sources and not adds:
        ranks = engine.pin_letters(ranks, gone, "the last of what is written to one position stays")
    return engine.elementwise([x, engine.reduce(ranks, gone)])


def _scattered_by_code(engine: Engine, x: Value, dim: int, index: Value, sources: Sequence[Value], adds: bool) -> Value:
    """The same where positions have an order for every place of the index tensor: a one-hot coding of them."""
    assert index.points is not None
    ties_noted(engine)
    wide = [copy_letters(v) for v in sources]
    code = engine.elementwise([copy_letters(index.points.code), *(v.with_axes((*v.axes, ())) for v in wide)])
    gone = set(code.axes[dim])
    if sources and not adds:
        code = engine.pin_letters(code, gone, "the last of what is written to one position stays")
    code = engine.reduce(code, gone)
    return engine.elementwise([x, code.with_axes((*code.axes[:dim], code.axes[-1], *code.axes[dim + 1 : -1]))])


def _scattered_to_first(context: Context, x: Value, dim: int, index: Value, others: Sequence[Value]) -> Value | None:
    """The same where the axis written goes on behind the positions that there are (a class for no expert)."""
    size = x.shape[dim]
    n = size if index.points is None else min(index.points.size, size)
    if n == size:
        return scattered_to_points(context, x, dim, index, others)
    engine = context.engine
    x = x.settle()
    made = scattered_to_points(context, engine.take(x, dim, np.arange(n)), dim, index, others)
    return made and engine.concatenate([made, engine.take(x, dim, np.arange(n, size))], dim, [0, 1])


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce", "index_put",
      "_index_put_impl", "_unsafe_index_put", carries=True)  # fmt: skip
def scatter(context: Context, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Writes at given positions: the axis written is pinned, and so is everything written."""
    name = context.node.target._schema.name.split("::")[1]
    engine = context.engine
    source = args[2] if len(args) > 2 else None
    replaces = name == "scatter" and "reduce" not in kwargs
    if replaces and isinstance(source, Value) and source.axes and args[1].data is not None:
        index = args[1].data.cpu()
        source = source.settle()
        for k, n in enumerate(index.shape):
            source = engine.take(source, k, np.arange(n))
        return _pushed(context, x.settle(), source, lambda a, b: a.scatter(args[0], index, b))
    if name in ("scatter", "scatter_add") and isinstance(args[0], int) and x.axes:
        rest = [v.settle() for v in values_in([x, *args[2:], *kwargs.values()])]
        made = _scattered_to_first(context, x, args[0] % len(x.axes), args[1], rest[1:])
        if made is not None:
            return made
    if name in ("index_put", "_index_put_impl", "_unsafe_index_put"):
        accumulate = bool(args[2:] and args[2]) or kwargs.get("accumulate", False)
        return _index_put(context, x.settle(), args[0], args[1].settle(), accumulate)
    for v in values_in([x, *args, *kwargs.values()]):
        v.settle()
    if not isinstance(args[0], int):
        raise Unruled("a write at data-dependent positions")
    dim = args[0] % max(len(x.axes), 1)
    others = values_in([*args, *kwargs.values()])
    if name in ("index_add", "index_copy", "index_fill", "index_reduce"):
        return _index_write(engine, name, x, dim, others)
    same = all(
        v.shape[k] == x.shape[k] for v in others if len(v.axes) == len(x.axes) for k in range(len(x.axes)) if k != dim
    )
    if not same:
        for v in others:
            engine.pin_all(v, "written at given positions")
        return engine.pin_all(x, "written at given positions")
    x = engine.pin_letters(x, set(x.axes[dim]), "written at given positions")
    count = args[1].shape[dim]
    parts = [engine.take(copy_letters(v), dim, np.arange(count)) for v in others if len(v.axes) == len(x.axes)]
    written = engine.elementwise(parts)
    if name == "scatter":
        written = engine.pin_letters(written, set(written.axes[dim]), "written at given positions")
    wide = engine.elementwise([x, engine.reduce(written, set(written.axes[dim]))])
    return engine.pin_letters(wide, set(wide.axes[dim]), "written at given positions")


def _index_write(engine: Engine, name: str, x: Value, dim: int, others: Sequence[Value]) -> Value:
    """``x`` with slices along one axis written or added at positions given by a vector: that axis is pinned."""
    index, *sources = others
    constant = constant_index(index)
    if name in ("index_copy", "index_fill") and constant is not None and np.unique(constant).size == constant.size:
        source = sources[0] if sources and len(sources[0].axes) == len(x.axes) else plain([])
        shape = [constant.size if k == dim else m for k, m in enumerate(x.shape)]
        return scattered(engine, x, expanded(source, shape), dim, constant.reshape(-1) % x.shape[dim])
    if name == "index_add" and constant is not None and np.unique(constant).size == constant.size:
        spread = scattered(engine, plain(x.shape), sources[0], dim, constant.reshape(-1) % x.shape[dim])
        return engine.elementwise([x, spread])
    x = engine.pin_letters(x, set(x.axes[dim]), "written at given positions")
    n = len(x.axes)
    parts = [
        Value(
            tuple(index.axes[0] if k == dim and index.axes else () for k in range(n)),
            index.size,
            index.factors,
            index.pinned,
        )
    ]
    parts += [copy_letters(v) if len(v.axes) == n else v.with_axes(((),) * n) for v in sources]
    written = engine.elementwise(parts)
    if name == "index_copy":
        written = engine.pin_letters(
            written, set(written.axes[dim]), "the last of what is written to one position stays"
        )
    return engine.elementwise([x, engine.reduce(written, set(written.axes[dim]))])


def _index_put(context: Context, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool) -> Value:
    engine = context.engine
    axes = [k for k, v in enumerate(indices) if v is not None]
    covered = [v if v.points is not None else v.settle() for v in indices if v is not None]
    nodes = [n for n in context.node.args[1] if n is not None]
    if len(axes) == 1 and nodes[0].meta["val"].dtype is torch.bool and values.shape == ():
        mask = covered[0]
        tail = len(x.axes) - axes[0] - len(mask.axes)
        return engine.elementwise([x, mask.with_axes((*mask.axes, *((),) * tail)), values])
    made = _put_on_diagonal(engine, x, indices, values)
    if made is not None:
        return made
    if len(axes) == len(x.axes) and all(v.data is not None for v in covered) and np.prod(x.shape) <= MAX_BESIDE:
        made = _put_exactly(context, x, [v.data.cpu() for v in covered], values, accumulate)
        if made is not None:
            return made
    alike = None if accumulate else _put_alike(context, x, nodes, axes, covered, values)
    if alike is not None:
        return alike
    constant = _places(covered[0]) if len(axes) == 1 else None
    if constant is not None and constant.ndim == 1 and np.unique(constant).size == constant.size:
        shape = [constant.size if k == axes[0] else m for k, m in enumerate(x.shape)]
        base = plain(x.shape) if accumulate else x
        made = scattered(engine, base, expanded(values, shape), axes[0], constant % x.shape[axes[0]])
        return engine.elementwise([x, made]) if accumulate else made
    if accumulate and all(n.meta["val"].dtype is torch.int64 for n in nodes) and axes[-1] - axes[0] < len(axes):
        return _add_rows(engine, x, axes, covered, values)
    return _put_rows(engine, x, nodes, axes, covered, values)


def _put_on_diagonal(engine: Engine, x: Value, indices: Sequence[Value | None], values: Value) -> Value | None:
    """What is written over, or added to, one entry of every row and column of a square; None for other places."""
    given = [(k, v.data.cpu()) for k, v in enumerate(indices) if v is not None and v.data is not None]
    if len(given) == 1 and given[0][1].dtype is torch.bool and given[0][1].dim() == 2:
        given = [(given[0][0] + k, column) for k, column in enumerate(given[0][1].nonzero().unbind(1))]
    if len(given) != 2 or sum(v is not None for v in indices) > 2:
        return None
    (a, rows), (b, columns) = given
    n = x.shape[a]
    if x.shape[b] != n or n < 2 or any(i.dtype is not torch.int64 or i.shape != (n,) for i in (rows, columns)):
        return None
    columns = columns % n
    if not (rows % n).equal(torch.arange(n)) or len(columns.unique()) < n:
        return None
    at = a if b == a + 1 else 0  # where the places are among the axes of what is written
    shape = [m for k, m in enumerate(x.shape) if k not in (a, b)]
    source = expanded(values, (*shape[:at], n, *shape[at:]))
    source = permuted(source, [k for k in range(len(shape) + 1) if k != at] + [at])
    return on_diagonal(engine, x, source, a, b, columns.numpy())


def on_diagonal(engine: Engine, x: Value, source: Value, a: int, b: int, columns: np.ndarray | None = None) -> Value:
    """A tensor with another one, whose last axis is along ``a``, on the diagonal of two axes: chosen by the unit matrix.

    Args:
        engine: the engine.
        x, source: the tensors.
        a, b: the axes of the square, the rows first.
        columns: the column in which the entry of every row is; from left to right without.
    """
    n = x.shape[a]
    unit = np.eye(n) if columns is None else np.eye(n)[columns]
    chosen = engine.constant(unit.reshape([n if k in (a, b) else 1 for k in range(len(x.axes))]))
    others = iter(source.axes[:-1])
    axes = (source.axes[-1] if k == a else () if k == b else next(others) for k in range(len(x.axes)))
    return engine.elementwise([x, chosen, copy_letters(source.with_axes(axes))])


def _places(index: Value) -> np.ndarray | None:
    """The positions that a constant names, or that are under a constant mask of one axis."""
    if index.data is not None and index.data.dtype is torch.bool and index.data.dim() == 1:
        return np.flatnonzero(index.data.detach().cpu().numpy())
    return constant_index(index)


def _add_rows(engine: Engine, x: Value, axes: Sequence[int], covered: list[Value], values: Value) -> Value:
    """Rows added at places that data choose: of the rows with their places the order does not count."""
    kept = whole_axes(x, list(zip(axes, covered, strict=True)))
    where = []
    for k, index in zip(axes, covered, strict=True):
        if k not in kept.values():
            x, one = read_along(engine, x, k, index, "written at given positions")
            where.append(one)
    places, lead, tail = max(len(v.axes) for v in covered), axes[0], len(x.axes) - axes[-1] - 1
    wide = [copy_letters(v.with_axes((*v.axes, *((),) * tail))) for v in where]
    rows = engine.elementwise([copy_letters(values), *wide])
    rows = rows.with_axes(((),) * (lead + places + tail - len(rows.axes)) + rows.axes)
    rows = engine.reduce(rows, {c for d in range(places) if d not in kept for c in rows.axes[lead + d]})
    along = {k: rows.axes[lead + d] for d, k in kept.items()}
    between = (along.get(k, ()) for k in axes)
    return engine.elementwise([x, rows.with_axes((*rows.axes[:lead], *between, *rows.axes[lead + places :]))])


def _put_rows(
    engine: Engine, x: Value, nodes: Sequence[Any], axes: Sequence[int], covered: list[Value], values: Value
) -> Value:
    """Rows written at places that data choose: these axes stay, but for those that are walked along or move as the index."""
    masks = [n.meta["val"].dtype in (torch.bool, torch.uint8) for n in nodes]
    first, span = axes[0], len(covered[0].axes) if masks == [True] else len(axes)
    if (any(masks) and masks != [True]) or axes != list(range(first, first + len(axes))):
        for v in [*covered, values]:
            engine.pin_all(v.settle(), "written at given positions")
        return engine.pin_all(x, "written at given positions")
    places = 1 if any(masks) else max(len(v.axes) for v in covered)
    kept = {} if any(masks) else whole_axes(x, list(zip(axes, covered, strict=True)))
    fixed = [k for k in range(first, first + span) if k not in kept.values()]
    moving = [k for k, v in zip(axes, covered, strict=True) if k in fixed and points_into(engine, x, k, v) is not None]
    for i, (k, v) in enumerate(zip(axes, covered, strict=True)):
        if k in moving:
            x, covered[i] = read_along(engine, x, k, v, "")
        index = covered[i].settle()
        rows = places - len(index.axes)  # along a kept axis the places move with what is written
        loose = {c for j, letters in enumerate(index.axes) if j + rows not in kept for c in letters}
        covered[i] = engine.pin_letters(index, loose, "written at given positions")
    fixed = [k for k in fixed if k not in moving]
    x = engine.pin_letters(x, {c for k in fixed for c in x.axes[k]}, "written at given positions")
    # where along the kept axes depends on the other indices
    where = engine.elementwise(
        [v.with_axes(v.axes) for k, v in zip(axes, covered, strict=True) if k not in kept.values()]
    )
    where = where.with_axes(((),) * (places - len(where.axes)) + where.axes) if kept else plain([])
    rank = len(x.axes) - span + places
    values = values.with_axes(((),) * (rank - len(values.axes)) + values.axes)
    given = {c for d in range(places) if d not in kept for c in values.axes[first + d]}
    values = engine.reduce(engine.pin_letters(values, given, "written at given positions"), given)
    middle: dict[int, tuple[int, ...]] = {k: values.axes[first + d] for d, k in kept.items()}
    between = (middle.get(k, ()) for k in range(first, first + span))
    values = values.with_axes((*values.axes[:first], *between, *values.axes[first + places :]))
    if kept:
        where = engine.reduce(where, {c for d in range(places) if d not in kept for c in where.axes[d]})
        laid = {k: where.axes[d] for d, k in kept.items()}
        where = where.with_axes(laid.get(k, ()) for k in range(len(x.axes)))
    out = engine.elementwise([x, values, where])
    return engine.pin_letters(out, {c for k in fixed for c in out.axes[k]}, "written at given positions")


def _put_alike(
    context: Context, x: Value, nodes: Sequence[Any], axes: Sequence[int], covered: Sequence[Value], values: Value
) -> Value | None:
    """The same written at all of some constant places of several axes (a filter for every channel): a choice by a mask."""
    count = len(axes)
    known = all(v.data is not None and n.meta["val"].dtype is torch.int64 for v, n in zip(covered, nodes, strict=True))
    if count < 2 or list(axes) != list(range(count)) or not known or min(x.shape[:count]) < 2:
        return None
    at = torch.broadcast_tensors(*(v.data.cpu() for v in covered))
    tail = len(x.axes) - count
    lead = len(values.axes) - tail
    if any(varies(values, k) for k in range(lead)):
        return None
    for k in range(lead):
        values = context.engine.take(values, k, np.zeros(1, np.int64))
    mask = torch.zeros(x.shape[:count], dtype=torch.bool).index_put(at, torch.tensor(True))
    chosen = context.engine.constant(mask.numpy())
    rest = values.with_axes(((),) * (len(x.axes) - len(values.axes[max(lead, 0) :])) + values.axes[max(lead, 0) :])
    return context.engine.elementwise([x, chosen.with_axes(chosen.axes + ((),) * tail), rest])


def _put_exactly(
    context: Context, x: Value, indices: Sequence[torch.Tensor], values: Value, accumulate: bool
) -> Value | None:
    """Single entries written at constant places, none of them twice (a diagonal)."""
    places = torch.arange(int(np.prod(x.shape))).reshape(x.shape)[tuple(indices)]
    if places.unique().numel() != places.numel():
        return None
    written = expanded(values, tuple(places.shape))
    base = plain(x.shape) if accumulate else x
    made = _pushed(context, base, written, lambda a, b: a.index_put(tuple(indices), b))
    return context.engine.elementwise([x, made]) if accumulate else made


@rule("masked_scatter", carries=True)
def masked_scatter(context: Context, x: Value, mask: Value, source: Value) -> Value:
    """Entries under a mask replaced in order; where the mask is constant along trailing axes, whole rows are."""
    engine = context.engine
    x, source = x.settle(), source.settle()
    if mask.data is not None and np.prod(x.shape) <= MAX_BESIDE:
        fixed = mask.data.cpu()
        return _pushed(context, x, source, lambda a, b: a.masked_scatter(fixed, b))
    full = expanded(mask.settle(), x.shape)
    tail = 0
    while tail < len(x.axes) and not varies(full, len(x.axes) - 1 - tail):
        tail += 1
    lead = len(x.axes) - tail
    row, entries = math.prod(x.shape[lead:]), math.prod(source.shape)
    if tail and source.shape[-tail:] != x.shape[lead:] and row and not entries % row:
        source = engine.reshape(source, [entries // row, *x.shape[lead:]])  # its entries are read in order
    if not tail or source.shape[-tail:] != x.shape[lead:]:
        raise Unruled("entries written in order under a mask")
    engine.pin_all(mask, "written at given positions")
    x = engine.pin_letters(x, {c for axis in x.axes[:lead] for c in axis}, "written at given positions")
    gone = {c for axis in source.axes[: len(source.axes) - tail] for c in axis}
    rows = engine.reduce(engine.pin_letters(source, gone, "written at given positions"), gone)
    rows = rows.with_axes(rows.axes[len(source.axes) - tail :])
    return engine.elementwise([x, copy_letters(rows)])


@rule("diagonal_scatter")
def diagonal_scatter(context: Context, x: Value, source: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    a, b = sorted(d % len(x.axes) for d in (dim1, dim2))
    if offset or x.shape[a] != x.shape[b] or x.shape[a] < 2:
        return view_scatter(context, x, source, offset, dim1, dim2)
    return on_diagonal(context.engine, x, source, a, b)


@rule("as_strided_scatter")
def view_scatter(context: Context, x: Value, source: Value, *args: Any, **kwargs: Any) -> Value:
    """Ask the operator itself where the entries of both operands go."""
    return _pushed(context, x, source, lambda a, b: context.node.target(a, b, *args, **kwargs))


def _pushed(context: Context, x: Value, source: Value, operator: Callable[..., torch.Tensor]) -> Value:
    """A tensor each of whose entries is one of ``x`` or of ``source``, as pushing positions through the operator shows."""
    engine = context.engine
    total, more = (int(np.prod(v.shape, dtype=np.int64)) for v in (x, source))
    where = torch.arange(1, total + 1, dtype=torch.float64).reshape(x.shape)
    other = torch.arange(total + 1, total + more + 1, dtype=torch.float64).reshape(source.shape)
    moved = operator(where, other)
    flat = [engine.reshape(x, [total]), engine.reshape(source, [more])]
    joined = engine.concatenate(flat, 0, [object(), object()])
    return gathered(engine, joined, moved.numpy().astype(np.int64) - 1)
