"""Operators that only move data: views, permutations, slices, joins, padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from automerge.rules._axes import Unruled
from automerge.rules._engine import Engine
from automerge.rules._points import holds
from automerge.rules._positions import by_index
from automerge.rules._registry import Context, function_name, rule
from automerge.rules._value import SELECTED, Factor, Value, new_letter, plain, widened


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten", "view_copy",
      carries=True)  # fmt: skip
def view(context: Context, x: Value, *_: Any, **__: Any) -> Value:
    before, after = context.node.args[0].meta["val"], context.node.meta["val"]
    if before.numel() != after.numel() or before.dtype.is_complex != after.dtype.is_complex:
        raise Unruled("a view that changes what an element is")
    if before.dtype != after.dtype:
        x.settle()  # other numbers, of the same bits
    out = x.moved(lambda v, tail: context.engine.reshape(v, (*context.shape, *tail)))
    if x.origin is not None and x.origin[2].size == 1 and x.origin[3][:1] != SELECTED:
        axis = x.origin[1]
        if context.shape == x.shape[:axis] + x.shape[axis + 1 :]:  # squeezed: what select would have given
            out.origin = (*x.origin[:3], (*SELECTED, *x.origin[3]))
    return out


@rule("clone", "contiguous", "alias", "detach", "_to_copy", "to", "lift_fresh", "lift_fresh_copy", "positive", "dropout",
      "conj", "_conj", "conj_physical", "resolve_conj", "resolve_neg", "_to_dense", carries=True)  # fmt: skip
def identity(context: Context, x: Value, *_: Any, **__: Any) -> Value:
    name = context.node.target.overloadpacket.__name__
    if x.origin is not None and name not in ("clone", "contiguous", "alias", "detach", "lift_fresh", "dropout"):
        return x.after(function_name(context.node))  # another type rounds, a conjugate differs
    if x.points is not None and not holds(context.node.meta["val"].dtype, x.points.size * x.points.stride):
        x.settle()
    out = x.with_axes(x.axes)
    out.origin = x.origin
    return out.carry(x)


def permuted(x: Value, order: Sequence[int]) -> Value:
    """The value with its axes in another order."""
    return x.moved(lambda v, _: v.with_axes((*(v.axes[d] for d in order), *v.axes[len(order) :])))


@rule("permute", carries=True)
def permute(context: Context, x: Value, dims: Sequence[int]) -> Value:
    return permuted(x, [d % len(x.axes) for d in dims])


@rule("t", carries=True)
def t(context: Context, x: Value) -> Value:
    return permuted(x, range(len(x.axes))[::-1])


@rule("transpose", "swapaxes", carries=True)
def transpose(context: Context, x: Value, a: int, b: int) -> Value:
    order = list(range(len(x.axes)))
    if order:
        order[a], order[b] = order[b], order[a]
    return permuted(x, order)


def expanded(x: Value, shape: Sequence[int]) -> Value:
    """Broadcast to a shape: new extents are constant letters."""
    return x.moved(lambda v, tail: _expanded(v, (*shape, *tail)))


def _expanded(x: Value, shape: Sequence[int]) -> Value:
    lead = len(shape) - len(x.axes)
    axes, size = [], dict(x.size)
    old = ((),) * lead + x.axes
    have = (1,) * lead + x.shape
    for letters, m, n in zip(old, have, shape, strict=True):
        if m == 1 and n > 1:
            letter = new_letter()
            size[letter] = int(n)
            letters = (letter,)
        axes.append(letters)
    return Value(tuple(axes), size, list(x.factors), set(x.pinned), chosen=x.chosen)


@rule("expand", "expand_as", "broadcast_to", carries=True)
def expand(context: Context, x: Value, *_: Any, **__: Any) -> Value:
    return expanded(x, context.shape)


@rule("repeat", "tile")
def repeat(context: Context, x: Value, repeats: Sequence[int]) -> Value:
    wide = expanded(x, (1,) * (len(repeats) - len(x.axes)) + x.shape)
    if 0 in repeats:
        raise Unruled("empty repeat")
    for axis, n in enumerate(repeats):
        wide = widened(wide, axis, int(n), 1)
    return wide


@rule("repeat_interleave")
def repeat_interleave(context: Context, x: Value, repeats: Any = None, dim: int | None = None, **_: Any) -> Value:
    if repeats is None:  # every position as often as ``x`` says
        context.engine.pin_all(x, "positions are read from it")
        return plain(context.shape, pinned=True)
    if not isinstance(repeats, int) or dim is None:
        raise Unruled("repeat_interleave by a tensor")
    return widened(x, dim % len(x.axes), 1, repeats)


def without_axis(x: Value, axis: int) -> Value:
    """Remove an axis of length one."""
    return x.with_axes(x.axes[:axis] + x.axes[axis + 1 :])


def with_axis(x: Value, axis: int) -> Value:
    """Insert an axis of length one."""
    return x.with_axes((*x.axes[:axis], (), *x.axes[axis:]))


def slice_index(n: int, start: int | None, stop: int | None, step: int | None) -> np.ndarray:
    """The positions that ``aten.slice`` keeps."""
    big = 2**62
    return np.arange(n)[slice(start, None if stop is None or stop > big else stop, step or 1)]


@rule("slice", "slice_copy", carries=True)
def slice_(context: Context, x: Value, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Value:
    dim %= len(x.axes)
    return context.engine.piece(x, dim, slice_index(x.shape[dim], start, stop, step))


@rule("select", "select_copy", carries=True)
def select(context: Context, x: Value, dim: int, index: int) -> Value:
    dim %= len(x.axes)
    taken = context.engine.piece(x, dim, np.array([index % x.shape[dim]]))
    out = taken.moved(lambda v, _: without_axis(v, dim))
    if taken is not x and taken.origin is not None:
        out.origin = (*taken.origin[:3], SELECTED)
    return out


@rule("flip", carries=True)
def flip(context: Context, x: Value, dims: Sequence[int]) -> Value:
    axes = [d % len(x.axes) for d in dims]

    def flipped(v: Value, _: tuple[int, ...]) -> Value:
        for d in axes:
            v = context.engine.take(v, d, np.arange(x.shape[d])[::-1])
        return v

    return x.moved(flipped) if any(x.shape[d] > 1 for d in axes) else x


@rule("roll")
def roll(context: Context, x: Value, shifts: Any, dims: Any = ()) -> Value:
    shifts = [shifts] if isinstance(shifts, int) else shifts
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        shape = x.shape
        flat = context.engine.reshape(x, [int(np.prod(shape))])
        n = flat.shape[0]
        return context.engine.reshape(context.engine.take(flat, 0, np.roll(np.arange(n), shifts[0])), shape)
    for s, d in zip(shifts, dims, strict=True):
        x = context.engine.take(x, d % len(x.axes), np.roll(np.arange(x.shape[d]), s))
    return x


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split",
      "split_copy", "split_with_sizes_copy", carries=True)  # fmt: skip
def split(context: Context, x: Value, sizes: Any, dim: int = 0) -> tuple[Value | None, ...]:
    dim %= len(x.axes)
    starts = np.cumsum([0, *(t.shape[dim] for t in context.node.meta["val"])])
    return tuple(
        context.engine.piece(x, dim, np.arange(a, b)) if i in context.used else None
        for i, (a, b) in enumerate(itertools.pairwise(starts))
    )


@rule("unbind", "unbind_copy", carries=True)
def unbind(context: Context, x: Value, dim: int = 0) -> tuple[Value | None, ...]:
    return tuple(select(context, x, dim, i) if i in context.used else None for i in range(x.shape[dim]))


def scattered(engine: Engine, x: Value, source: Value, dim: int, index: np.ndarray) -> Value:
    """``x`` with the positions ``index`` of one axis replaced by ``source``."""
    n = x.shape[dim]
    rest = np.setdiff1d(np.arange(n), index)
    if rest.size == 0:
        return engine.take(source, dim, np.argsort(index))
    left = engine.take(x, dim, rest)
    joined = engine.concatenate([left, source], dim, [object(), object()])
    return engine.take(joined, dim, np.argsort(np.concatenate([rest, index])))


@rule("slice_scatter")
def slice_scatter(
    context: Context, x: Value, source: Value, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Value:
    dim %= len(x.axes)
    index = slice_index(x.shape[dim], start, stop, step)
    return scattered(context.engine, x, expanded(source, context.node.args[1].meta["val"].shape), dim, index)


@rule("select_scatter")
def select_scatter(context: Context, x: Value, source: Value, dim: int, index: int) -> Value:
    dim %= len(x.axes)
    return scattered(context.engine, x, with_axis(source, dim), dim, np.array([index % x.shape[dim]]))


@rule("copy")
def copy(context: Context, x: Value, source: Value, *_: Any) -> Value:
    return expanded(source, context.shape)


def all_border(engine: Engine, x: Value, axis: int, length: int) -> Value:
    """The value with an axis that holds none of its positions, but may; the others keep their structure."""
    x = engine.reduce(x, set(x.axes[axis]))
    new = plain([length], pinned=True)
    axes = tuple(new.axes[0] if k == axis else a for k, a in enumerate(x.axes))
    return Value(axes, x.size | new.size, x.factors, x.pinned | new.pinned, chosen=x.chosen)


@rule("constant_pad_nd")
def constant_pad_nd(context: Context, x: Value, pad: Sequence[int], *_: Any) -> Value:
    for i in range(len(pad) // 2):
        axis = len(x.axes) - 1 - i
        low, high = pad[2 * i], pad[2 * i + 1]
        kept = np.arange(max(0, -low), x.shape[axis] - max(0, -high))
        if not kept.size:  # a shift by the whole length: nothing but border, and on longer inputs what it was cut from
            x = all_border(context.engine, x, axis, context.shape[axis])
            continue
        x = context.engine.take(x, axis, kept)
        if low <= 0 and high <= 0:
            continue
        parts, who = [x], [object()]
        border = object()
        for n, at in ((low, 0), (high, len(parts) + 1)):
            if n > 0:
                shape = [n if k == axis else m for k, m in enumerate(x.shape)]
                parts.insert(at, plain(shape))
                who.insert(at, border)
        # a mask over tokens, and in front of it places for learned ones (their number is asked for in a second run)
        learned = len(pad) == 2 and not context.out(0).is_floating_point()
        x = context.engine.concatenate(parts, axis, who, node=context.node if learned else None)
    return x


@rule("pixel_shuffle")
def pixel_shuffle(context: Context, x: Value, r: int) -> Value:
    *lead, c, h, w = x.shape
    n = len(lead)
    x = context.engine.reshape(x, [*lead, c // (r * r), r, r, h, w])
    return context.engine.reshape(permuted(x, [*range(n), n, n + 3, n + 1, n + 4, n + 2]), context.shape)


@rule("pixel_unshuffle")
def pixel_unshuffle(context: Context, x: Value, r: int) -> Value:
    *lead, c, h, w = x.shape
    n = len(lead)
    x = context.engine.reshape(x, [*lead, c, h // r, r, w // r, r])
    return context.engine.reshape(permuted(x, [*range(n), n, n + 2, n + 4, n + 1, n + 3]), context.shape)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(context: Context, x: Value, groups: int) -> Value:
    b, c, *rest = x.shape
    x = context.engine.reshape(x, [b, groups, c // groups, *rest])
    return context.engine.reshape(permuted(x, [0, 2, 1, *range(3, 3 + len(rest))]), context.shape)


@rule("diag_embed", "diag")
def diag_embed(context: Context, x: Value, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Value:
    """A vector on a diagonal: both axes carry its labels."""
    if offset or len(x.axes) + 1 != len(context.shape):
        return by_index(context, x, *context.node.args[1:])
    axis = x.axes[-1]
    if any(set(f.letters) & set(axis) and not set(f.letters) <= set(axis) for f in x.factors):
        raise Unruled("a diagonal of a joint axis")
    other = {c: new_letter() for c in axis}
    mine = list(x.factors)
    for i, f in enumerate(mine):
        if set(f.letters) <= set(axis):
            context.engine.make_injective(mine, i)
    twin = [Factor(tuple(other[c] for c in f.letters), f.labels) for f in mine if set(f.letters) <= set(axis)]
    size = x.size | {other[c]: x.size[c] for c in axis}
    pinned = x.pinned | {other[c] for c in axis if c in x.pinned}
    loose = set(axis) - pinned - {c for f in mine for c in f.letters}
    factors = [*mine, *twin]
    for c in loose:
        labels = context.engine.axes.fresh((x.size[c],))
        factors += [Factor((c,), labels), Factor((other[c],), labels)]
    axes = [*x.axes[:-1]]
    n = len(context.shape)
    for position, letters in sorted([(dim1 % n, axis), (dim2 % n, tuple(other[c] for c in axis))]):
        axes.insert(position, letters)
    return Value(tuple(axes), size, factors, pinned)


@rule("view_as_real")
def view_as_real(context: Context, x: Value) -> Value:
    pair = plain([2], pinned=True)
    return Value((*x.axes, *pair.axes), x.size | pair.size, list(x.factors), x.pinned | pair.pinned)


@rule("view_as_complex")
def view_as_complex(context: Context, x: Value) -> Value:
    last = set(x.axes[-1])
    x = context.engine.reduce(context.engine.pin_letters(x, last, "real and imaginary part"), last)
    return without_axis(x, len(x.axes) - 1)


@rule("im2col")
def im2col(context: Context, x: Value, kernel: Sequence[int], *_: Any) -> Value:
    """Patches: channels by kernel positions, and the pinned window index."""
    engine = context.engine
    spatial = set(x.axes[-1]) | set(x.axes[-2])
    x = engine.reduce(engine.pin_letters(x, spatial, "spatial axis of a window operator"), spatial)
    new = plain([int(kernel[0]), int(kernel[1]), context.shape[-1]], pinned=True)
    channels = (*x.axes[-3], *new.axes[0], *new.axes[1])
    return Value((*x.axes[:-3], channels, new.axes[2]), x.size | new.size, x.factors, x.pinned | new.pinned)


@rule("col2im")
def col2im(context: Context, x: Value, _size: Any, kernel: Sequence[int], *_: Any) -> Value:
    """Overlapping patches summed into an image."""
    engine = context.engine
    *lead, patch, windows = x.shape
    x = engine.reshape(x, [*lead, patch // (kernel[0] * kernel[1]), kernel[0], kernel[1], windows])
    gone = {c for axis in x.axes[-3:] for c in axis}
    x = engine.reduce(engine.pin_letters(x, gone, "spatial axis of a window operator"), gone)
    new = plain(context.shape[-2:], pinned=True)
    return Value((*x.axes[:-3], *new.axes), x.size | new.size, x.factors, x.pinned | new.pinned)
