"""Operators that are asked where positions go: views and windows of memory, and tensors built position by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from automerge.rules._axes import Unruled
from automerge.rules._engine import Engine
from automerge.rules._registry import Context, rule
from automerge.rules._value import Factor, Value, drop_constant, plain

_INDEXED = (
    "unfold unfold_copy as_strided rot90 diagonal diagonal_copy reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
)


@rule(*_INDEXED.split())
def by_index(context: Context, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Ask the operator itself: push positions through it and read where they went."""
    if any(isinstance(a, Value) for a in args):
        raise Unruled("a scatter with a strided view")
    shape = x.shape
    total = int(np.prod(shape, dtype=np.int64))
    positions = torch.arange(1, total + 1, dtype=torch.float64).reshape(shape)
    if "as_strided" in context.node.target._schema.name:
        real = context.node.args[0].meta["val"]
        if real.storage_offset() or real.untyped_storage().nbytes() != total * real.element_size():
            raise Unruled("as_strided over memory outside its operand")
        positions = torch.empty_strided(real.shape, real.stride(), dtype=torch.float64).copy_(positions)
    moved = context.node.target(positions, *args, **kwargs)
    if tuple(moved.shape) != context.shape:
        raise Unruled("the operator depends on memory layout")
    return gathered(context.engine, x, moved.numpy().astype(np.int64) - 1)


def gathered(engine: Engine, x: Value, positions: np.ndarray) -> Value:
    """A tensor whose entry i is ``x.flat[positions[i]]`` (-1: a constant)."""
    out = _laid_out(x, positions)
    letters = tuple(c for axis in out.axes for c in axis)
    inside = positions >= 0
    flat = np.where(inside, positions, 0).reshape([out.size[c] for c in letters])
    full = tuple(x.letters)
    coordinates = dict(zip(full, np.unravel_index(flat, [x.size[c] for c in full]), strict=True)) if full else {}
    border = engine.axes.fresh((1,)) if not inside.all() else None
    hole = ~inside.reshape(flat.shape)
    for f in x.factors:
        labels = f.labels[tuple(coordinates[c] for c in f.letters)]
        engine.axes.select(labels[~hole], f.labels)
        if border is not None:
            labels = np.where(hole, border[0], labels)
        reduced = drop_constant(Factor(letters, labels))
        if reduced is not None:
            out.factors.append(reduced)
    for c in x.pinned:
        reduced = drop_constant(Factor(letters, np.where(hole, -1, coordinates[c])))
        if reduced is not None:
            out.pinned |= set(reduced.letters)
    if border is not None and not x.factors:
        reduced = drop_constant(Factor(letters, hole.astype(np.int64)))
        out.pinned |= set(reduced.letters) if reduced else set()
    return settle(engine, out)


def _laid_out(x: Value, positions: np.ndarray) -> Value:
    """An empty value for some positions; an axis that stays what it was remains the same product (of a batch and heads)."""
    inside, sizes = positions >= 0, [[n] for n in positions.shape]
    for axis in [a for a, letters in enumerate(x.axes) if len(letters) > 1]:
        of = np.unravel_index(np.where(inside, positions, 0), x.shape)[axis]
        for k in [k for k, n in enumerate(positions.shape) if n == x.shape[axis]]:
            own = np.arange(x.shape[axis]).reshape([-1 if i == k else 1 for i in range(positions.ndim)])
            if ((of == own) | ~inside).all():
                sizes[k] = [x.size[c] for c in x.axes[axis]]
    whole = plain([n for axis in sizes for n in axis])
    letters = iter(whole.axes)
    return whole.with_axes([[c for _ in axis for c in next(letters)] for axis in sizes])


def settle(engine: Engine, value: Value) -> Value:
    """Make the factors of a value built by hand agree with each other and with its pins."""
    empty = Value(value.axes, value.size, [], value.pinned)
    parts = [Value(value.axes, value.size, [f], set()) for f in value.factors]
    return engine.combine([empty, *parts], value.axes, value.size)
