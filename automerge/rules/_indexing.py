"""Lookups, scatters, sorts, scans and transforms: operators that read positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from automerge.rules._axes import Unruled
from automerge.rules._contraction import repinned
from automerge.rules._lookup import chosen, constant_index, looked_up, read_along, read_beside, whole_axes
from automerge.rules._movement import expanded, permuted, without_axis
from automerge.rules._points import bare, labels_of, naming, points_into, relabelled, tie_axis
from automerge.rules._positions import gathered
from automerge.rules._reduction import axes_of, normalised
from automerge.rules._registry import Context, rule, values_in
from automerge.rules._value import Value, copy_letters, plain


@rule("embedding", carries=True)
def embedding(context: Context, weight: Value, index: Value, *_: Any, **__: Any) -> Value:
    return index_select(context, weight.settle(), 0, index, "index into an embedding")


@rule("embedding_renorm")
def embedding_renorm(context: Context, weight: Value, index: Value, *_: Any) -> Value:
    engine = context.engine
    engine.pin_all(index, "index into an embedding")
    weight = engine.pin_letters(weight, set(weight.axes[0]), "index into an embedding")
    return normalised(engine, weight, [1])


@rule("_embedding_bag", "_embedding_bag_forward_only", carries=True)
def embedding_bag(
    context: Context,
    weight: Value,
    index: Value,
    offsets: Value,
    _by_count: bool = False,
    _mode: int = 0,
    _sparse: bool = False,
    scale: Value | None = None,
    _last: bool = False,
    ignored: int = -1,
) -> tuple[Value | None, ...]:
    engine, count = context.engine, context.out(0).shape[0]
    others = (plain(context.out(i).shape, pinned=True) for i in range(1, 4))
    weight, scales = weight.settle(), [] if scale is None else [scale.settle()]
    if _equal_bags(constant_index(offsets), index.shape[0], count) and ignored < 0:
        bags = (count, index.shape[0] // count)
        index = index.moved(lambda v, tail: engine.reshape(v, (*bags, *tail)))
        rows = looked_up(engine, weight, 0, index, "index into an embedding")
        rows = engine.elementwise([rows.settle(), *(engine.reshape(s, (*bags, 1)) for s in scales)])
        return (without_axis(engine.reduce(rows, set(rows.axes[1])), 1), *others)
    for v in (index.settle(), offsets.settle(), *scales):
        engine.pin_all(v, "index into an embedding")
    weight = engine.pin_letters(weight, set(weight.axes[0]), "index into an embedding")
    rest = engine.reduce(weight, set(weight.axes[0]))
    bags_of = plain([count], pinned=True)
    out = Value((bags_of.axes[0], rest.axes[1]), rest.size | bags_of.size, rest.factors, rest.pinned | bags_of.pinned)
    return (out, *others)


def _equal_bags(starts: np.ndarray | None, total: int, count: int) -> bool:
    """Whether some bags are rows of a matrix, so that what holds for a sum over rows of a table holds for them."""
    return starts is not None and count > 0 and np.array_equal(starts[:count] * count, np.arange(count) * total)


@rule("index_select", carries=True)
def index_select(context: Context, x: Value, dim: int, index: Value, reason: str = "looked up by data") -> Value:
    dim %= max(len(x.axes), 1)
    if x.points is not None:
        return index_select(context, bare(x), dim, index, reason).carry(
            x, lambda v, _: index_select(context, v, dim, index, reason)
        )
    x.settle()
    constant = constant_index(index)
    if constant is None:
        return looked_up(context.engine, x, dim, index, reason)
    n = x.shape[dim]
    taken = context.engine.take(x, dim, np.where(constant < 0, constant + n, constant))
    shape = (*x.shape[:dim], *constant.shape, *x.shape[dim + 1 :])
    return context.engine.reshape(taken, shape)


@rule("index", "_unsafe_index", carries=True)
def index(context: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    """Some entries of a tensor; those of an index tensor are positions where they are read, too."""
    if x.points is not None:
        return _indexed(context, bare(x), indices).carry(x, lambda v, _: _indexed(context, v, indices))
    return _indexed(context, x.settle(), indices)


def _indexed(context: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    given = [(k, v) for k, v in enumerate(indices) if v is not None]
    if all(v.data is not None for _, v in given):
        shape = x.shape
        positions = torch.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
        if len(given) == 1 and given[0][1].data.dtype not in (torch.bool, torch.uint8):
            return index_select(context, x, given[0][0], given[0][1])
        moved = positions[tuple(slice(None) if v is None else v.data.cpu() for v in indices)]
        return gathered(context.engine, x, moved.numpy())
    if len(given) == 1 and given[0][1].shape != () and given[0][1] is not None:
        node = next(n for n in context.node.args[1] if n is not None)
        if node.meta["val"].dtype not in (torch.bool, torch.uint8):
            return looked_up(context.engine, x, given[0][0], given[0][1], "looked up by data")
    return _generic_index(context, x, given)


def _generic_index(context: Context, x: Value, given: Sequence[tuple[int, Value]]) -> Value:
    engine = context.engine
    nodes = [n for n in context.node.args[1] if n is not None]
    if any(n.meta["val"].dtype in (torch.bool, torch.uint8) for n in nodes):
        return _masked(context, x, [(k, v.settle()) for k, v in given])
    axes = [k for k, _ in given]
    if axes != list(range(axes[0], axes[0] + len(axes))):  # what separated axes are read to comes first
        x = permuted(x, [*axes, *(k for k in range(len(x.axes)) if k not in axes)])
        given = [(k, v) for k, (_, v) in enumerate(given)]
        axes = list(range(len(given)))
    kept = whole_axes(x, given)
    gone = [k for k in axes if k not in kept.values()]
    if kept and len(gone) == 1 and naming(x, gone[0], dict(given)[gone[0]]):
        (one,) = gone
        index = dict(given)[one]
        assert index.points is not None
        rank = max(len(v.axes) for _, v in given)
        return read_beside(engine, x, axes, {d - rank: k for d, k in kept.items()}, rank, index.points.code)
    read = []
    for k, v in given:
        if k in gone:
            x, v = read_along(engine, x, k, v, "looked up by data")
            read.append(copy_letters(v))
    rest = engine.reduce(x, {c for k in gone for c in x.axes[k]})
    where = engine.elementwise(read)
    rank = max(len(v.axes) for _, v in given)
    tail = len(rest.axes) - axes[-1] - 1
    middle = (rest.axes[kept[d]] if d in kept else () for d in range(rank))
    shaped = Value(
        (*rest.axes[: axes[0]], *middle, *rest.axes[axes[-1] + 1 :]),
        rest.size,
        rest.factors,
        rest.pinned,
    )
    wide = where.with_axes((*where.axes, *((),) * tail))
    return engine.elementwise([shaped, wide])


def _masked(context: Context, x: Value, given: Sequence[tuple[int, Value]]) -> Value:
    """Rows chosen by a mask: the axes along which it varies are pinned, and the result's rows are numbered.

    Where it is constant along its last axes, whole rows are chosen, and laid out one after another.
    """
    if len(given) != 1:
        raise Unruled("a data-dependent mask among other indices")
    engine = context.engine
    axis, mask = given[0]
    last = axis + len(mask.axes)
    while last > axis and not varies(mask, last - 1 - axis):
        last -= 1
    engine.pin_all(mask, "a data-dependent mask")
    gone = {c for k in range(axis, last) for c in x.axes[k]}
    rest = engine.reduce(engine.pin_letters(x, gone, "a data-dependent mask"), gone)
    tail = [c for k in range(last, axis + len(mask.axes)) for c in rest.axes[k]]
    rows = plain([context.shape[axis] // math.prod(rest.size[c] for c in tail)], pinned=True)
    out = (*rest.axes[:axis], (*rows.axes[0], *tail), *rest.axes[axis + len(mask.axes) :])
    return Value(out, rest.size | rows.size, rest.factors, rest.pinned | rows.pinned)


def varies(value: Value, axis: int) -> bool:
    """Whether a value may differ along an axis."""
    letters = set(value.axes[axis])
    return bool(letters & value.pinned) or any(letters & set(f.letters) for f in value.factors)


@rule("masked_select", carries=True)
def masked_select(context: Context, x: Value, mask: Value) -> Value:
    """The entries where a mask holds, in their order."""
    if x.points is not None:
        return relabelled(context.engine, x, masked_select(context, bare(x), mask))
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    x = x.settle()
    if mask.data is not None:
        where = torch.arange(int(np.prod(x.shape, dtype=np.int64))).reshape(x.shape)
        return gathered(context.engine, x, where.masked_select(mask.data.cpu()).numpy())
    return _masked(context, expanded(x, shape), [(0, expanded(mask.settle(), shape))])


@rule("gather", "take_along_dim", carries=True)
def gather(context: Context, x: Value, dim: int, index: Value, **_: Any) -> Value:
    """The axis read is pinned, unless the index came from that very axis; the others are paired with the index's."""
    if x.points is not None:
        return relabelled(context.engine, x, gather(context, bare(x), dim, index))
    dim %= max(len(x.axes), 1)
    engine = context.engine
    x.settle()
    beside = all(n == m for k, (n, m) in enumerate(zip(x.shape, index.shape, strict=True)) if k != dim)
    if index.data is not None:
        rows = index.data.cpu().movedim(dim, 0).reshape(index.shape[dim], -1) if x.axes else index.data
        if beside and x.axes and rows.numel() and (rows == rows[:, :1]).all():
            return engine.take(x, dim, rows[:, 0].numpy())
        where = torch.arange(int(np.prod(x.shape, dtype=np.int64))).reshape(x.shape)
        return gathered(engine, x, torch.gather(where, dim, index.data.cpu()).numpy())
    if beside and naming(x, dim, index):
        assert index.points is not None
        apart = x.with_axes((*x.axes[:dim], (), *x.axes[dim + 1 :], x.axes[dim]))
        return chosen(engine, apart, index.points.code)
    points = points_into(engine, x, dim, index)
    if points is not None and beside:
        x = tie_axis(engine, x, dim, points)
        return engine.elementwise([engine.reduce(x, set(x.axes[dim])), copy_letters(bare(index))])
    index.settle()
    others = [k for k in range(len(x.axes)) if k != dim]
    if beside and not any(varies(index, k) for k in others):
        for k in others:
            index = engine.take(index, k, np.zeros(1, np.int64))
        return looked_up(engine, x, dim, index.with_axes((index.axes[dim],)), "looked up by data")
    for k in others:
        x = engine.take(x, k, np.arange(index.shape[k]))
    x = engine.pin_letters(x, set(x.axes[dim]), "looked up by data")
    rest = engine.reduce(x, set(x.axes[dim]))
    return engine.elementwise([rest, copy_letters(index)])


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def scan(context: Context, x: Value, dim: int, *_: Any, **__: Any) -> Any:
    (axis,) = axes_of(x, dim)
    out = context.engine.pin_letters(x, set(x.axes[axis]), "a running sum along the axis")
    out = normalised(
        context.engine, out, [axis]
    )  # entries mix along the axis, so what is joint with it keeps one order
    return out if isinstance(context.node.meta["val"], torch.Tensor) else (out, out)


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fft(context: Context, x: Value, dims: Any, *_: Any) -> Value:
    axes = axes_of(x, dims)
    engine = context.engine
    for k in axes:
        x = engine.pin_letters(x, set(x.axes[k]), "a Fourier transform along the axis")
        x = repinned(engine, x, k, context.shape[k])
    return x


@rule("tril", "triu")
def triangle(context: Context, x: Value, diagonal: int = 0) -> Value:
    """A mask by the difference of two coordinates."""
    keep = np.tril if "tril" in context.node.target._schema.name else np.triu
    mask = keep(np.ones(x.shape[-2:], np.int64), diagonal)
    return context.engine.elementwise([x, context.engine.constant(mask)])


@rule("grid_sampler_2d", "grid_sampler_3d", "grid_sampler", "cudnn_grid_sampler")
def grid_sample(context: Context, x: Value, grid: Value, *_: Any) -> Value:
    engine = context.engine
    n = len(x.axes) - 2
    for k in range(2, len(x.axes)):
        x = engine.pin_letters(x, set(x.axes[k]), "sampled at given coordinates")
    x = engine.reduce(x, {c for k in range(2, n + 2) for c in x.axes[k]})
    grid = engine.pin_letters(grid, set(grid.axes[-1]), "coordinates")
    where = engine.reduce(grid, set(grid.axes[-1]))
    where = without_axis(where, len(where.axes) - 1)
    where = where.with_axes((where.axes[0], (), *where.axes[1:]))
    return engine.elementwise([x, copy_letters(where)])


@rule("_pack_padded_sequence")
def pack_padded(context: Context, x: Value, lengths: Value, batch_first: bool) -> tuple[Value, Value]:
    """Time and batch are packed into numbered rows; the features stay."""
    engine = context.engine
    gone = {c for axis in x.axes[:2] for c in axis}
    rest = engine.reduce(engine.pin_letters(x, gone, "a packed sequence"), gone)
    rows = plain([context.out(0).shape[0]], pinned=True)
    data = Value((*rows.axes, *rest.axes[2:]), rest.size | rows.size, rest.factors, rest.pinned | rows.pinned)
    return data, plain(context.out(1).shape, pinned=True)


@rule("_pad_packed_sequence")
def pad_packed(context: Context, x: Value, sizes: Value, *_: Any) -> tuple[Value, Value]:
    """The inverse of packing."""
    engine = context.engine
    rest = engine.reduce(engine.pin_letters(x, set(x.axes[0]), "a packed sequence"), set(x.axes[0]))
    rows = plain(context.out(0).shape[:2], pinned=True)
    data = Value((*rows.axes, *rest.axes[1:]), rest.size | rows.size, rest.factors, rest.pinned | rows.pinned)
    return data, plain(context.out(1).shape, pinned=True)


@rule("bincount", "histc", carries=True)
def counts(context: Context, x: Value, *args: Any, **kwargs: Any) -> Value:
    """A symmetric function of the entries (with their weights), for every bin; bins of positions are those positions."""
    engine = context.engine
    points = labels_of(engine, x) if x.points is not None and _each_counted(context.node, x.points.size) else None
    rest = [v.settle() for v in values_in([*args, *kwargs.values()])]
    both = engine.elementwise([x.settle() if points is None else bare(x), *rest])
    total = engine.reduce(both, {c for axis in both.axes for c in axis}).with_axes(((),))
    if points is None or points.size != context.shape[0]:
        x.settle()
        return engine.elementwise([total, plain(context.shape, pinned=True)])
    return engine.elementwise([total, tie_axis(engine, plain(context.shape), 0, points)])


def _each_counted(node: Any, count: int) -> bool:
    """Whether every number from 0 to ``count - 1`` has a bin of its own, be it in use or not."""
    if node.target._schema.name == "aten::bincount":
        return bool(dict(enumerate(node.args)).get(2, node.kwargs.get("minlength", 0)) >= count)
    bins, low, high = (dict(enumerate(node.args)).get(k, node.kwargs.get(name)) for k, name in
                       ((1, "bins"), (2, "min"), (3, "max")))  # fmt: skip
    return low == 0 and high in (bins - 1, bins)


@rule("searchsorted")
def searchsorted(context: Context, edges: Value, x: Value, *_: Any, sorter: Any = None, **__: Any) -> Value:
    """Between which of the edges, whose order is what they mean, every entry lies."""
    if sorter is not None:
        raise Unruled("edges in another order")
    engine = context.engine
    last = set(edges.axes[-1])
    edges = engine.reduce(engine.pin_letters(edges, last, "edges in their order"), last)
    return engine.elementwise([edges if len(edges.axes) > 1 else edges.with_axes(()), x])


@rule("nonzero", "unique_dim", "_unique2", "_ctc_loss", "linalg_householder_product")
def positions(context: Context, *args: Any, **_: Any) -> Any:
    """All positions have a meaning: those of steps and symbols, of the first entries of reflections."""
    for x in values_in(args):
        context.engine.pin_all(x, "positions are read from it")
    value = context.node.meta["val"]
    if isinstance(value, torch.Tensor):
        return plain(value.shape, pinned=True)
    return tuple(plain(v.shape, pinned=True) for v in value)
