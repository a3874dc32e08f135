"""What a join along an axis asks of its operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import fx

from automerge.rules._value import Factor, Value


@dataclass(frozen=True)
class Join:
    """An operand of a join that stands beside coordinates.

    Attributes:
        labels: of its positions.
        place: the axis, the lengths, which operands hold coordinates, and the number of this one.
        node: the node that joins.
        operand: the node that is joined.
        where: for the report.
    """

    labels: np.ndarray
    place: tuple[Any, ...]
    node: fx.Node
    operand: fx.Node
    where: str


def own_orders(values: Sequence[Value], own: Sequence[tuple[int, ...]]) -> tuple[list[Value], list[Factor]]:
    """Of operands of a join whose joined positions have an order each along other axes (dimensions of heads), what says so.

    These orders have nothing to do with those at the positions of another operand.
    """
    found: list[Factor] = []
    for v, letters in zip(values, own, strict=True):
        joint = [f for f in v.factors if len(letters) == 1 and set(f.letters) > set(letters)]
        inner = {c for f in joint for c in f.letters} - set(letters)
        touching = [f for f in v.factors if inner & set(f.letters)]
        units = any(f.letters == letters for f in v.factors)
        if len(joint) != 1 or touching != joint or not units or (inner | set(letters)) & v.pinned or v.chosen:
            return list(values), []
        found += joint
    if len({frozenset(f.letters) - {c} for f, (c,) in zip(found, own, strict=True)}) > 1:
        return list(values), []
    return [replace(v, factors=[f for f in v.factors if f is not g]) for v, g in zip(values, found, strict=True)], found


def filled(
    own: Sequence[tuple[int, ...]], parts: Sequence[Sequence[Factor]], pinned: set[int], coordinates: Sequence[bool]
) -> list[bool]:
    """Which operands of a join are constants beside coordinates: on a longer input they are coordinates, too.

    Args:
        own: the letters that are joined, for every operand.
        parts: its factors over them.
        pinned: the pinned letters.
        coordinates: whether some of what was joined to its letters is pinned.
    """
    beside = any(coordinates) or (not any(parts) and not all(own))
    return [beside and bool(a) and not f and not pinned & set(a) for a, f in zip(own, parts, strict=True)]
