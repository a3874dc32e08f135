"""Operators that order the entries of an axis: sorted values, extrema, and the positions where they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from automerge.rules._engine import Engine
from automerge.rules._reduction import axes_of, fits
from automerge.rules._registry import Context, rule
from automerge.rules._unsorted import order_matters
from automerge.rules._value import Factor, Value, plain


@rule("sort", "topk", "argsort", "msort")
def sort(context: Context, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Sorted values are symmetric functions of the axis, numbered by rank; the order itself pins it, if anyone reads it."""
    name = context.node.target._schema.name.split("::")[1]
    arguments = [a.name for a in context.node.target._schema.arguments]
    given = dict(zip(arguments, (x, *args), strict=False)) | kwargs
    (axis,) = axes_of(x, 0 if name == "msort" else given.get("dim", -1))
    value = context.node.meta["val"]
    if name == "topk" and not given.get("sorted", True) and order_matters(context.node, axis):
        x = context.engine.pin_letters(x, set(x.axes[axis]), "chosen in no particular order")
    points = None
    if name == "argsort" or 1 in context.used:
        x, points = pointing(context.engine, x, axis, "the order of a sort is used")
    out = context.engine.reduce(x, set(x.axes[axis]))
    length = (value if isinstance(value, torch.Tensor) else value[0]).shape[axis]
    rank = plain([length], pinned=True)
    out = Value(
        tuple(rank.axes[0] if k == axis else a for k, a in enumerate(out.axes)),
        out.size | rank.size,
        out.factors,
        out.pinned | rank.pinned,
    )
    if isinstance(value, torch.Tensor):
        return promise(context.engine, out, points, "the order of a sort is used") if name == "argsort" else out
    return out, promise(context.engine, out, points, "the order of a sort is used")


def pointing(engine: Engine, x: Value, axis: int, reason: str) -> tuple[Value, np.ndarray | None]:
    """The labels of an axis whose positions an index will name; the axis is pinned where it has no labels.

    Where it has an order for every position of other axes (the classes of several categorical variables), they share one
    from there on.
    """
    x, letter = engine.merge_axis(x, axis)
    mine = x.touching(letter) if letter is not None and letter not in x.pinned else []
    alone = [f for f in mine if f.letters == (letter,)]
    if letter is not None and mine and not alone:
        common = Factor((letter,), engine.axes.fresh((x.size[letter],)))
        axes = tuple((letter,) if k == axis else () for k in range(len(x.axes)))
        return engine.elementwise([x, Value(axes, {letter: x.size[letter]}, [common])]), common.labels
    if len(alone) == 1 and engine.axes.injective(alone[0].labels):
        return x, alone[0].labels
    return engine.pin_letters(x, set(x.axes[axis]), reason), None


def promise(engine: Engine, value: Value, points: np.ndarray | None, reason: str) -> Value:
    """An index tensor that pins the axis it points into, unless it is only used to read or write along that axis."""
    out = Value(value.axes, dict(value.size), list(value.factors), set(value.pinned), points=points)
    if points is not None:
        where = engine.axes.where

        def pin() -> None:
            now, engine.axes.where = engine.axes.where, where
            engine.axes.pin(points, reason)
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
    points = None
    if 1 in context.used and len(axes) == 1:
        x, points = pointing(context.engine, x, axes[0], "the position of an extremum is used")
    value = fits(context.engine, x, axes, tuple(context.out(0).shape))
    return value, promise(context.engine, value, points, "the position of an extremum is used")


@rule("argmax", "argmin")
def argument(context: Context, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    axes = axes_of(x, dim)
    reason = "the position of an extremum is used"
    if len(axes) != 1 or dim is None:
        return fits(context.engine, context.engine.pin_all(x, reason), axes, context.shape)
    x, points = pointing(context.engine, x, axes[0], reason)
    return promise(context.engine, fits(context.engine, x, axes, context.shape), points, reason)
