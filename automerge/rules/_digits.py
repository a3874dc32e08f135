"""Positions computed from positions: ``choice + offsets``, ``expert * capacity + place``, ``flat // n``, ``flat % n``.

A sum in which one position counts in steps of the number of the others names positions of the product of both axes, and so
does one with a constant that walks in such steps along an axis (the offsets of several tables that are laid out one after
another). Quotient and remainder name them apart again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from automerge.rules._engine import Engine
from automerge.rules._value import Points, Value, copy_letters

_DIVISIONS = ("aten::floor_divide", "aten::div", "aten::remainder")


def computed(engine: Engine, name: str, args: Sequence[Any], kwargs: Any, dtype: torch.dtype | None) -> Value | None:
    """The positions that a sum, a product or a quotient of positions and whole numbers names; None if it names none."""
    if len(args) != 2 or dtype is None or dtype.is_floating_point or dtype.is_complex:
        return None
    if not any(isinstance(a, Value) and a.points is not None for a in args):
        return None
    if name == "aten::mul" and not kwargs:
        return _times(*args) or _times(*reversed(args))
    if name == "aten::add" and kwargs.get("alpha", 1) == 1:
        a, b = (_walking(engine, a) for a in args)
        return None if a is None or b is None else (_sum(engine, a, b) or _sum(engine, b, a))
    if name in _DIVISIONS and isinstance(args[0], Value) and (name != "aten::div" or kwargs.get("rounding_mode")):
        return _digit(engine, args[0], _whole(args[1]), name == "aten::remainder")
    return None


def _whole(value: Any) -> int:
    """A positive whole number that does not depend on the data; 0 for anything else."""
    if isinstance(value, Value):
        value = value.data.item() if value.data is not None and value.data.numel() == 1 else 0
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and value > 0 else 0


def _named(value: Value, points: Points, promises: Sequence[Any]) -> Value:
    value.points, value.promises = points, list(promises)
    return value


def _times(x: Any, factor: Any) -> Value | None:
    number = _whole(factor) if not isinstance(factor, Value) or factor.points is None else 0
    if not isinstance(x, Value) or x.points is None or not number:
        return None
    x.whole()
    points = replace(x.points, stride=x.points.stride * number, beside=None)
    return _named(x.with_axes(x.axes), points, x.promises)


def _walking(engine: Engine, value: Any) -> Value | None:
    """An index tensor; also a constant whose entries go up in equal steps along one axis, from zero."""
    if not isinstance(value, Value) or value.points is not None or value.data is None:
        return value if isinstance(value, Value) and value.points is not None else None
    entries = value.data.detach().cpu().numpy()
    long = [k for k, n in enumerate(entries.shape) if n > 1]
    if len(long) != 1 or entries.dtype.kind not in "iu":
        return None
    row = entries.reshape(-1).astype(np.int64)
    if row[1] < 1 or not np.array_equal(row, row[1] * np.arange(row.size)):
        return None
    eye = engine.constant(np.eye(row.size))
    axes = tuple(eye.axes[0] if k == long[0] else () for k in range(entries.ndim))
    out = eye.with_axes((*axes, eye.axes[1]))
    letters = {c for axis in axes for c in axis}
    own = [f for f in out.factors if set(f.letters) <= letters]
    plain = Value(axes, {c: out.size[c] for c in letters}, own)
    return _named(
        plain, Points(out, int(row[1]), walk=entries.ndim - long[0]), [_pinning(engine, out, set(out.letters))]
    )


def _sum(engine: Engine, outer: Value, inner: Value) -> Value | None:
    """Positions of a product of axes: those of the outer one in steps of the number of the inner ones."""
    a, b = outer.points, inner.points
    assert a is not None
    assert b is not None
    if a.stride != b.stride * b.size:
        return None
    one, two = a.code, copy_letters(b.code)
    both = engine.elementwise(
        [one.with_axes((*one.axes[:-1], one.axes[-1], ())), two.with_axes((*two.axes[:-1], (), two.axes[-1]))]
    )
    code = both.with_axes((*both.axes[:-2], (*both.axes[-2], *both.axes[-1])))
    promises = [*outer.promises, *inner.promises]
    value = engine.elementwise([v.whole().with_axes(v.axes) for v in (outer, inner)])
    beside = (a.walk, b) if a.walk and b.stride == 1 else None
    return _named(value.with_axes(value.axes), Points(code, b.stride, beside=beside), promises)


def _digit(engine: Engine, x: Value, number: int, rest: bool) -> Value | None:
    """Quotient or remainder of positions, where these are laid out in rows of that many."""
    points = x.points
    if points is None or not number:
        return None
    x.whole()
    if not rest and points.stride % number == 0:
        return _named(x.with_axes(x.axes), replace(points, stride=points.stride // number), x.promises)
    if points.stride != 1 or points.size % number or points.size == number:
        return None
    shape = (*points.code.shape[:-1], points.size // number, number)
    apart = engine.reshape(points.code, shape)
    lost = len(shape) - (2 if rest else 1)
    code = engine.reduce(apart, set(apart.axes[lost]))
    code = code.with_axes(axis for k, axis in enumerate(code.axes) if k != lost)
    return _named(x.with_axes(x.axes), Points(code), [_pinning(engine, code, set(code.axes[-1]))])


def _pinning(engine: Engine, code: Value, letters: set[int]) -> Callable[[], None]:
    """What a use of positions for their numbers comes to."""
    where = engine.axes.where

    def pin() -> None:
        now, engine.axes.where = engine.axes.where, where
        engine.pin_letters(code, letters, "numbers of positions are used")
        engine.axes.where = now

    return pin
