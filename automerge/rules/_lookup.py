"""Tables read, and tensors written to, at positions that an index tensor names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from automerge.rules._engine import Engine
from automerge.rules._points import as_one, bare, coded, common_labels, points_into, tie_axis, ties_noted
from automerge.rules._value import Value, copy_letters, rename

_MOST_VECTORS = 512  # more of them are a vocabulary, whose words do not have an order of features each


def looked_up(engine: Engine, table: Value, axis: int, index: Value, reason: str) -> Value:
    """``table`` read along one axis at data-dependent positions; the index's axes take its place.

    That axis is pinned, unless the index points into exactly it (a codebook and its nearest entry; experts and the best
    of their scores). What is read stays joint with the choice, so that every entry may have an order of its own.
    """
    if coded(table, axis, index):
        read = _read_rows(engine, table, axis, index) or _read_by_code(engine, table, axis, index)
        if read is not None:
            return read
    points = points_into(engine, table, axis, index)
    source = index
    if points is not None:
        table, index = tie_axis(engine, table, axis, points), bare(index)
    else:
        index.settle()
    table, letter = engine.merge_axis(table, axis)
    if points is None and letter is not None:
        table = engine.fix_letter(table, letter, reason)
    if letter is not None and not _worth_a_choice(engine, table, letter, source, points):
        table, letter = engine.reduce(table, {letter}), None
    lead, tail = table.axes[:axis], table.axes[axis + 1 :]
    where = copy_letters(index)
    where = where.with_axes((*((),) * len(lead), *where.axes, *((),) * len(tail)))
    if letter is None:
        return engine.elementwise([table.with_axes((*lead, *((),) * len(index.axes), *tail)), where])
    table = rename(table, {letter: engine.choice(source)})
    axes = (*lead, *where.axes[len(lead) : len(where.axes) - len(tail)], *tail)
    size = table.size | where.size
    chosen = {engine.choice(source): tuple(c for axis in where.axes for c in axis)}
    read = Value(axes, size, table.factors, table.pinned, chosen=chosen)
    return engine.combine([read, where], axes, {c: size[c] for a in axes for c in a})


def _read_by_code(engine: Engine, table: Value, axis: int, index: Value) -> Value | None:
    """A table read where positions have an order for every place of an index tensor: the sum over a one-hot coding.

    (None where the table's own rows have one order: then the positions have to have one, too.)
    """
    assert index.points is not None
    several = len(index.points.code.axes[-1]) > 1
    if several and common_labels(as_one(engine, index.points)) is not None:
        return None
    if not several and any(f.letters == table.axes[axis] for f in table.factors):
        return None
    code, between = index.points.code, ((),) * len(index.axes)
    tail = ((),) * (len(table.axes) - axis - 1)
    apart = table.with_axes((*table.axes[:axis], *between, *table.axes[axis + 1 :], table.axes[axis]))
    where = code.with_axes((*((),) * axis, *code.axes[:-1], *tail, code.axes[-1]))
    return chosen(engine, apart, where)


def _read_rows(engine: Engine, table: Value, axis: int, index: Value) -> Value | None:
    """Tables laid out one after another, of which every place along an axis of the index reads one of its own."""
    points = index.points
    if points is None or points.beside is None:
        return None
    walk, inner = points.beside
    shape = table.shape
    apart = engine.reshape(table, (*shape[:axis], points.size // inner.size, inner.size, *shape[axis + 1 :]))
    return read_beside(engine, apart, [axis, axis + 1], {-walk: axis}, len(index.axes), inner.code)


def chosen(engine: Engine, apart: Value, code: Value) -> Value:
    """The sum over the last axis of what is read, times a one-hot coding of the positions."""
    ties_noted(engine)
    (apart, code), axes, _ = engine.align([apart, copy_letters(code)])
    batch = {c for axis in axes[:-1] for c in axis if all(c in v.pinned or v.touching(c) for v in (apart, code))}
    return engine.contract(apart, code, axes[:-1], batch)


def _worth_a_choice(engine: Engine, table: Value, letter: int, index: Value, points: np.ndarray | None) -> bool:
    """Whether the entries of a table may have orders of their own: weights, or what is read where weights were."""
    others = {c for f in table.factors for c in f.letters if letter not in f.letters}
    joint = any(letter in f.letters and len(f.letters) > 1 for f in table.factors)
    few = points is not None and table.size[letter] <= _MOST_VECTORS
    return joint or id(index) in engine.choices or len(others) >= (1 if few else 2)


def constant_index(value: Any) -> np.ndarray | None:
    """The entries of a constant integer tensor, or None."""
    if isinstance(value, Value) and value.data is not None and value.data.dtype not in (torch.bool, torch.uint8):
        return value.data.detach().cpu().numpy().astype(np.int64)
    return None


def read_beside(engine: Engine, x: Value, axes: Sequence[int], kept: dict[int, int], rank: int, code: Value) -> Value:
    """One axis read where positions have an order of their own for the places along others, which are walked along.

    Args:
        engine: the engine.
        x: what is read.
        axes: its adjacent axes that indices are given for: those kept, and one that is read.
        kept: dimension of the index, counted from its end -> the axis of ``x`` that it walks along.
        rank: of the broadcast index.
        code: a one-hot coding of the positions along the axis that is read.
    """
    (gone,) = (k for k in axes if k not in kept.values())
    middle = (x.axes[kept[d]] if d in kept else () for d in range(-rank, 0))
    lead, tail = x.axes[: axes[0]], x.axes[axes[-1] + 1 :]
    apart = x.with_axes((*lead, *middle, *tail, x.axes[gone]))
    before = ((),) * (len(lead) + rank + 1 - len(code.axes))
    return chosen(engine, apart, code.with_axes((*before, *code.axes[:-1], *((),) * len(tail), code.axes[-1])))


def read_along(engine: Engine, x: Value, dim: int, index: Value, reason: str) -> tuple[Value, Value]:
    """A value and an index tensor that names positions of one of its axes: it is pinned, or moves as the index does."""
    points = points_into(engine, x, dim, index)
    if points is None:
        return engine.pin_letters(x, set(x.axes[dim]), reason), index.settle()
    return tie_axis(engine, x, dim, points), bare(index)


def whole_axes(x: Value, given: Sequence[tuple[int, Value]]) -> dict[int, int]:
    """Of several indices, those that only walk along their axis: dimension of the broadcast index -> axis of ``x``.

    (``q[arange(batch)[:, None, None], arange(heads)[:, None], best]`` reads every head at places of its own.)
    """
    rank = max(len(v.axes) for _, v in given)
    kept: dict[int, int] = {}
    for k, v in given:
        constant = constant_index(v)
        long = [d for d, n in enumerate(v.shape) if n > 1]
        if constant is None or len(long) != 1 or not np.array_equal(constant.reshape(-1), np.arange(x.shape[k])):
            continue
        dim = rank - len(v.axes) + long[0]
        if dim not in kept and len(kept) + 1 < len(given):
            kept[dim] = k
    return kept
