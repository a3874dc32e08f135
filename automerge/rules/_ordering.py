"""Operators that order the entries of an axis: sorted values, extrema, and the positions where they were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from automerge.rules._axes import distinct
from automerge.rules._engine import Engine
from automerge.rules._reduction import axes_of, fits, normalised
from automerge.rules._registry import Context, rule
from automerge.rules._ties import tied
from automerge.rules._unsorted import order_matters
from automerge.rules._value import Factor, Points, Value, plain


@rule("sort", "topk", "argsort", "msort", carries=True)
def sort(context: Context, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Sorted values are symmetric functions of the axis, numbered by rank; the order itself pins it, if anyone reads it.

    An order that is sorted itself gives the rank of every position.
    """
    name = context.node.target._schema.name.split("::")[1]
    arguments = [a.name for a in context.node.target._schema.arguments]
    given = dict(zip(arguments, (x, *args), strict=False)) | kwargs
    (axis,) = axes_of(x, 0 if name == "msort" else given.get("dim", -1))
    value = context.node.meta["val"]
    ranks = None if name == "topk" or given.get("descending") else _ranks(context.engine, x, axis)
    if ranks is not None:
        alike = plain([1 if k == axis else n for k, n in enumerate(x.shape)])
        return ranks if name == "argsort" else (_with_letters(alike, axis, plain([x.shape[axis]], pinned=True)), ranks)
    x = x.settle()
    if (name == "argsort" or 1 in context.used) and tied(context.node, axis):
        x = context.engine.pin_letters(x, set(x.axes[axis]), _TIED)
    if name == "topk" and not given.get("sorted", True) and order_matters(context.node, axis):
        x = context.engine.pin_letters(x, set(x.axes[axis]), "chosen in no particular order")
    code = None
    if name == "argsort" or 1 in context.used:
        x, code = pointing(context.engine, x, axis, "the order of a sort is used")
    out = context.engine.reduce(x, set(x.axes[axis]))
    length = (value if isinstance(value, torch.Tensor) else value[0]).shape[axis]
    rank = plain([length], pinned=True)
    out = _with_letters(out, axis, rank)
    if code is not None:
        code = _with_letters(code.with_axes((*code.axes[:axis], (), *code.axes[axis:])), axis, rank)
    if name == "msort":
        return out
    found = promise(context.engine, out, code, "the order of a sort is used")
    if found.points is not None and length == found.points.size:
        found.points = replace(found.points, order=len(x.axes) - axis)
    return found if name == "argsort" else (out, found)


def _ranks(engine: Engine, order: Value, axis: int) -> Value | None:
    """Which place in an order every position has; None for what is no order of all positions along an axis."""
    points = order.points
    if points is None or points.order != len(order.axes) - axis:
        return None
    found = engine.reduce(points.code, set(points.code.axes[axis]))
    return found.with_axes((*found.axes[:axis], found.axes[-1], *found.axes[axis + 1 : -1]))


_TIED = "the first of scores that are equal by the way they are made"


def _with_letters(x: Value, axis: int, vector: Value) -> Value:
    """The value with another axis, which is that of a vector, in the place of one."""
    axes = (vector.axes[0] if k == axis else a for k, a in enumerate(x.axes))
    return Value(tuple(axes), x.size | vector.size, x.factors, x.pinned | vector.pinned, chosen=x.chosen)


def pointing(engine: Engine, x: Value, axis: int, reason: str) -> tuple[Value, Value | None]:
    """The coding of positions along an axis that an index will name; the axis is pinned where it has no labels.

    The axis may have an order for every position of other axes (the classes of several categorical variables).

    Returns:
        The value, and a one-hot coding of one position: the other axes, then that one.
    """
    if not any(_named(x, letter) for letter in x.axes[axis]):
        x, _ = engine.merge_axis(x, axis)
    if not all(_named(x, letter) or (x.axes[axis][1:] and letter in x.pinned) for letter in x.axes[axis] or (None,)):
        return engine.pin_letters(x, set(x.axes[axis]), reason), None
    code = normalised(engine, x, [axis])
    return x, code.with_axes((*code.axes[:axis], *code.axes[axis + 1 :], code.axes[axis]))


def _named(x: Value, letter: int | None) -> bool:
    """Whether something says which position along a letter is which, though they may move."""
    return letter not in x.pinned and any(_tells(f, letter) for f in x.factors if letter in f.letters)


def _tells(factor: Factor, letter: Any) -> bool:
    """Whether the positions along a letter differ at every place of the others."""
    rows = np.moveaxis(factor.labels, factor.letters.index(letter), -1)
    return all(distinct(row) for row in rows.reshape(-1, rows.shape[-1]))


def promise(engine: Engine, value: Value, code: Value | None, reason: str) -> Value:
    """An index tensor that pins the axis it points into, unless it is only used to read or write along that axis."""
    out = Value(value.axes, dict(value.size), list(value.factors), set(value.pinned))
    if code is not None:
        where = engine.axes.where
        out.points = Points(code)

        def pin() -> None:
            now, engine.axes.where = engine.axes.where, where
            engine.pin_letters(code, set(code.axes[-1]), reason)
            engine.axes.where = now

        out.promises = [pin]
    return out


@rule("max", "min", "median", "nanmedian", "mode", "kthvalue")
def extremum(context: Context, x: Value, *args: Any, **kwargs: Any) -> Any:
    """The value is a symmetric function; the index names a position, so it pins the axis if anyone reads it."""
    if args and isinstance(args[0], Value):
        return context.engine.elementwise([x, args[0]])
    arguments = [a.name for a in context.node.target._schema.arguments]
    dim = (dict(zip(arguments, (x, *args), strict=False)) | kwargs).get("dim")
    if isinstance(context.node.meta["val"], torch.Tensor):
        return fits(context.engine, x, axes_of(x, None), context.shape)
    axes = axes_of(x, -1 if dim is None else dim)
    code = None
    if 1 in context.used and len(axes) == 1:
        if tied(context.node, axes[0]):
            x = context.engine.pin_letters(x, set(x.axes[axes[0]]), _TIED)
        x, code = pointing(context.engine, x, axes[0], "the position of an extremum is used")
    value = fits(context.engine, x, axes, tuple(context.out(0).shape))
    return value, promise(context.engine, value, _shaped(context, code, value), "the position of an extremum is used")


@rule("argmax", "argmin")
def argument(context: Context, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    axes = axes_of(x, dim)
    reason = "the position of an extremum is used"
    if len(axes) != 1 or dim is None:
        return fits(context.engine, context.engine.pin_all(x, reason), axes, context.shape)
    if tied(context.node, axes[0]):
        x = context.engine.pin_letters(x, set(x.axes[axes[0]]), _TIED)
    x, code = pointing(context.engine, x, axes[0], reason)
    value = fits(context.engine, x, axes, context.shape)
    return promise(context.engine, value, _shaped(context, code, value), reason)


def _shaped(context: Context, code: Value | None, value: Value) -> Value | None:
    """A coding of one position for every entry, with the axes that the index tensor has."""
    return None if code is None else context.engine.reshape(code, (*value.shape, code.shape[-1]))
