"""Commutative functions of pieces of one tensor: ``a + b`` of two chunks is a sum over which chunk it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from automerge.rules._engine import Engine
from automerge.rules._value import Factor, Value

_FOLDS = frozenset(
    f"aten::{name}" for name in ("add", "mul", "maximum", "minimum", "fmax", "fmin", "logaddexp", "logaddexp2", "hypot")
)


@dataclass(frozen=True, eq=False)
class _Piece:
    """Where a piece was cut from; a value forgets it as soon as something else uses it."""

    whole: Value
    axis: int
    index: np.ndarray
    functions: tuple[str, ...]

    def fits(self, other: _Piece) -> bool:
        """Whether both are equally long, cut from one tensor along one axis, after the same functions."""
        same = self.whole is other.whole and self.axis == other.axis and self.functions == other.functions
        return same and self.index.size == other.index.size


class FoldedValue(Value):
    """A fold of pieces, worked out when a rule first asks for it: until then further pieces may join.

    Args:
        engine: works it out.
        function: the operator.
        pieces: disjoint pieces of one tensor that fit each other.
        shape: of each of them.
    """

    def __init__(self, engine: Engine, function: str, pieces: Sequence[_Piece], shape: tuple[int, ...]) -> None:
        self.engine, self.function, self.pieces, self._shape = engine, function, tuple(pieces), shape
        self.data, self.origin, self.points, self.promises, self.obligations = None, None, None, [], []
        self._made: Value | None = None

    @property
    def made(self) -> Value:
        """The reduction over which of the pieces a position is in."""
        if self._made is None:
            whole, axis = self.pieces[0].whole, self.pieces[0].axis
            taken = self.engine.take(whole.settle(), axis, np.concatenate([p.index for p in self.pieces]))
            apart = (*self._shape[:axis], len(self.pieces), *self._shape[axis:])
            value = self.engine.reshape(taken, apart)
            value = self.engine.reduce(value, set(value.axes[axis]))
            self._made = value.with_axes(value.axes[:axis] + value.axes[axis + 1 :])
        return self._made

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._shape

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
    pieces: list[_Piece] = []
    for value in args:
        if isinstance(value, FoldedValue) and value.function == function:
            pieces += value.pieces
        elif isinstance(value, Value) and value.origin is not None:
            pieces.append(_Piece(*value.origin))
        else:
            return None
    joined = np.concatenate([p.index for p in pieces])
    if not all(p.fits(pieces[0]) for p in pieces) or np.unique(joined).size != joined.size:
        return None
    return FoldedValue(engine, function, pieces, first.shape)
