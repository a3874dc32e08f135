"""Commutative functions of pieces of one tensor: ``a + b`` of two chunks is a sum over which chunk it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from automerge.rules._engine import Engine
from automerge.rules._value import Factor, Value

_FOLDS = frozenset(
    f"aten::{name}" for name in ("add", "mul", "maximum", "minimum", "fmax", "fmin", "logaddexp", "logaddexp2", "hypot")
)


class FoldedValue(Value):
    """A fold of pieces, worked out when a rule first asks for it: until then further pieces may join.

    Args:
        engine: works it out.
        function: the operator.
        parts: pieces of one tensor, cut along one axis, after the same functions.
    """

    def __init__(self, engine: Engine, function: str, parts: Sequence[Value]) -> None:
        self.engine, self.function, self.parts = engine, function, tuple(parts)
        self.data, self.origin, self.points, self.obligations = None, None, None, []
        self._made: Value | None = None

    @property
    def made(self) -> Value:
        """The reduction over which of the pieces a position is in."""
        if self._made is None:
            origins = [v.origin for v in self.parts]
            assert origins[0] is not None
            whole, axis = origins[0][:2]
            index = np.concatenate([o[2] for o in origins if o is not None])
            taken = self.engine.take(whole.settle(), axis, index)
            shape = taken.shape
            apart = self.engine.reshape(
                taken, (*shape[:axis], len(self.parts), -(-shape[axis] // len(self.parts)), *shape[axis + 1 :])
            )
            value = self.engine.reduce(apart, set(apart.axes[axis]))
            self._made = value.with_axes(value.axes[:axis] + value.axes[axis + 1 :])
        return self._made

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.parts[0].shape

    @property
    def axes(self) -> tuple[tuple[int, ...], ...]:  # type: ignore[override]
        """See `Value`."""
        return self.made.axes

    @property
    def size(self) -> dict[int, int]:  # type: ignore[override]
        """See `Value`."""
        return self.made.size

    @property
    def factors(self) -> list[Factor]:  # type: ignore[override]
        """See `Value`."""
        return self.made.factors

    @property
    def pinned(self) -> set[int]:  # type: ignore[override]
        """See `Value`."""
        return self.made.pinned

    @property
    def chosen(self) -> dict[int, tuple[int, ...]]:  # type: ignore[override]
        """See `Value`."""
        return self.made.chosen


def folded(engine: Engine, function: str, args: Sequence[Any], plain: bool) -> Value | None:
    """The fold of two operands, or None if they are no pieces of one tensor.

    Args:
        engine: the engine.
        function: the operator's name.
        args: its positional arguments.
        plain: whether it has no others.
    """
    if function not in _FOLDS or not plain or len(args) != 2:
        return None
    first, second = args
    if function == "aten::add" and isinstance(first, Value) and not isinstance(second, Value) and second == 0:
        return (
            first if first.origin is not None or isinstance(first, FoldedValue) else None
        )  # python's sum begins with 0
    parts: list[Value] = []
    for value in args:
        if isinstance(value, FoldedValue) and value.function == function:
            parts += value.parts
        elif isinstance(value, Value) and value.origin is not None:
            parts.append(value)
        else:
            return None
    origins = [v.origin for v in parts if v.origin is not None]
    whole, axis, index, functions = origins[0]
    alike = all(o[0] is whole and o[1] == axis and o[2].size == index.size and o[3] == functions for o in origins)
    if not alike or np.unique(np.concatenate([o[2] for o in origins])).size != index.size * len(origins):
        return None
    return FoldedValue(engine, function, parts)
