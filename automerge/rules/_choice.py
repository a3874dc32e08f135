"""Rules that use positions as numbers, and keep to their meaning: they move with their axis."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from automerge.rules._axes import Unruled
from automerge.rules._engine import Engine
from automerge.rules._nodes import schema_name
from automerge.rules._points import alike, bare, common_labels, labels_of, tie_axis, ties_noted
from automerge.rules._registry import Context, pointwise, rule
from automerge.rules._value import Points, Value, copy_letters, plain


@rule("eq", "ne", carries=True)
def compared(context: Context, *args: Any, **kwargs: Any) -> Value:
    """Two positions along one axis; or positions with some of the axis, each once, which makes one-hot rows."""
    a, b = args
    engine = context.engine
    for index, other in ((a, b), (b, a)):
        number = _number(other)
        if isinstance(index, Value) and index.points is not None and index.points.stride == 1 and number is not None:
            never = _always(index, schema_name(context.node) == "aten::ne")
            return _compared_with(engine, index.points, number, "compared with a number") or never
    if isinstance(a, Value) and isinstance(b, Value):
        if alike([a, b]):
            assert a.points is not None
            assert b.points is not None
            both = engine.elementwise([a.points.code, copy_letters(b.points.code)])
            return _without_last(engine.reduce(both, set(both.axes[-1])))
        for index, other in ((a, b), (b, a)):
            found = _counted(index, other)
            if found is not None:
                return _listed(engine, index, other, *found)
    return pointwise(context, *args, **kwargs)


def _compared_with(engine: Engine, points: Points, number: float, reason: str) -> Value | None:
    """Where an index tensor holds a certain position, which stays; None if it is not among those that it may hold."""
    if number not in range(points.size):
        return None
    labels = common_labels(points)
    if labels is not None:
        engine.axes.pin(labels[[int(number)]], reason)
    return _without_last(engine.take(points.code, len(points.code.axes) - 1, np.array([int(number)])))


def _always(index: Value, truth: bool) -> Value:
    """The answer to what is asked of every entry alike."""
    out = plain(index.shape)
    out.data = torch.full(index.shape, truth)
    return out


def _without_last(x: Value) -> Value:
    return x.with_axes(x.axes[:-1])


def _listed(engine: Engine, index: Value, other: Value, dim: int, some: np.ndarray) -> Value:
    """Which of some positions, listed along an axis, an index tensor holds."""
    assert index.points is not None
    rank = max(len(index.axes), len(other.axes))
    dim += rank - len(other.axes)
    code = index.points.code
    lead: tuple[tuple[int, ...], ...] = ((),) * (rank - len(index.axes))
    axes = (*lead, *code.axes[:-1])
    if not axes[dim]:
        ties_noted(engine)
        taken = engine.take(code, len(code.axes) - 1, some)
        axes = (*lead, *taken.axes[:-1])
        return taken.with_axes((*axes[:dim], taken.axes[-1], *axes[dim + 1 :]))
    labels = labels_of(engine, index)
    if labels is None:
        return engine.elementwise([index.settle(), other])
    engine.axes.select(labels[some], labels)
    return engine.elementwise(
        [bare(index), tie_axis(engine, plain(other.shape), dim - rank + len(other.axes), labels[some])]
    )


@rule("lt", "le", "gt", "ge", carries=True)
def ordered(context: Context, x: Any, other: Any, **kwargs: Any) -> Value:
    """Positions compared with a bound that all of them keep, or none: whether an index is in range says nothing of it."""
    number = _number(other)
    if isinstance(x, Value) and x.points is not None and number is not None:
        holds = getattr(operator, schema_name(context.node).removeprefix("aten::"))
        largest = (x.points.size - 1) * x.points.stride
        if holds(0, number) == holds(largest, number):
            return _always(x, bool(holds(0, number)))
    return pointwise(context, x, other, **kwargs)


def _number(value: Any) -> float | None:
    """A number that does not depend on the data, or None."""
    if isinstance(value, Value):
        return float(value.data) if value.data is not None and value.data.numel() == 1 else None
    return float(value) if isinstance(value, (bool, int, float)) else None


@rule("masked_fill", carries=True)
def filled(context: Context, x: Value, mask: Value, value: Any) -> Value:
    """Positions some of which become a certain one: that one stays, the others move with their axis."""
    engine, number = context.engine, _number(value)
    if x.points is None or x.points.stride != 1 or number is None or number not in range(x.points.size):
        return pointwise(context, x.settle(), mask.settle(), value)
    _compared_with(engine, x.points, number, "put in the place of other positions")
    mask = mask.settle()
    return engine.elementwise([bare(x), mask]).carry(
        x, lambda code, _: engine.elementwise([code, mask.with_axes((*mask.axes, ()))])
    )


@rule("where", carries=True)
def either(context: Context, mask: Value, x: Any = None, other: Any = None) -> Value:
    """Positions from one index tensor or another one, or a certain position in the place of some."""
    if x is None:
        raise Unruled("positions are read from a mask")
    if isinstance(x, Value) and mask.data is not None and mask.shape == x.shape == context.shape and mask.data.all():
        return x.with_axes(x.axes).carry(x)
    for index, number in ((x, _number(other)), (other, _number(x))):
        if isinstance(index, Value) and index.points is not None and number is not None:
            return filled(context, index, mask, number)
    if isinstance(x, Value) and isinstance(other, Value) and alike([x, other]):
        engine, mask = context.engine, mask.settle()
        assert other.points is not None
        code = other.points.code
        out = engine.elementwise([bare(x), bare(other), mask]).carry(
            x, lambda one, _: engine.elementwise([one, copy_letters(code), mask.with_axes((*mask.axes, ()))])
        )
        out.promises = [*x.promises, *other.promises]
        return out
    return pointwise(context, mask, x, other)


def _counted(index: Value, other: Value) -> tuple[int, np.ndarray] | None:
    """The axis of a constant that lists positions which an index tensor may hold, each once, and these positions."""
    if index.points is None or index.points.stride != 1 or other.data is None:
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
        largest = (x.points.size - 1) * x.points.stride
        low, high = _range(name, largest + 1, *args, **kwargs)
        if low <= 0 and high >= largest:
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
