"""Sets of units whose exchanges are those of other sets, made together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from automerge._search import UnitSet


def without_composed(sets: Sequence[UnitSet], shown: np.ndarray) -> list[int]:
    """The numbers of the sets that are left when those that others make up are taken out, one after the other.

    The search begins at every vertex that others resemble, and where the units of two sets meet in a third axis (a value for
    every pair of two keys) it may find the exchanges of both at once besides.

    Args:
        sets: of united vertices.
        shown: bool per vertex, whether it stands for a position of a parameter; only these are in all tables.
    """
    moved = [_moved(units, shown) for units in sets]
    count = np.zeros(shown.size, np.int64)
    for of in moved:
        count[of] += 1
    movers = _movers(moved, shown.size)
    left = set(range(len(sets)))
    for k in sorted(left, key=lambda k: -moved[k].size):
        if (count[moved[k]] > 1).all():
            near = {*movers(moved[k]).tolist()} & left - {k}
            if len(near) > 1 and _is_composed(*_numbered([sets[k], *(sets[i] for i in sorted(near))], shown)):
                left.remove(k)
                count[moved[k]] -= 1
    return sorted(left)


def _moved(units: UnitSet, shown: np.ndarray) -> np.ndarray:
    found = np.unique(np.concatenate([units.table.reshape(-1), *(pair[pair >= 0] for pair in units.pairs)]))
    return found[shown[found]]


def _movers(moved: Sequence[np.ndarray], vertices: int) -> Callable[[np.ndarray], np.ndarray]:
    """The numbers of the sets that move any of some vertices."""
    at = np.concatenate([np.empty(0, np.int64), *moved])
    numbers = np.repeat(np.arange(len(moved)), [m.size for m in moved])[np.argsort(at, kind="stable")]
    start = np.searchsorted(np.sort(at), np.arange(vertices + 1))

    def of(some: np.ndarray) -> np.ndarray:
        counts = start[some + 1] - start[some]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.unique(numbers[np.repeat(start[some], counts) + within])

    return of


def _numbered(sets: Sequence[UnitSet], shown: np.ndarray) -> tuple[list[UnitSet], np.ndarray]:
    """The same sets over the vertices that they have, and which of these are shown."""
    known = np.unique(np.concatenate([a.reshape(-1) for units in sets for a in (units.table, *units.pairs)]))
    known = known[known >= 0]

    def new(array: np.ndarray) -> np.ndarray:
        return np.where(array < 0, -1, np.searchsorted(known, array))

    return [UnitSet(new(units.table), tuple(map(new, units.pairs))) for units in sets], shown[known]


def _is_composed(sets: Sequence[UnitSet], shown: np.ndarray) -> bool:
    """Whether the exchange of any two neighbouring units of the first set is made of elements of the others, in turn.

    Sought greedily: each brings the most vertices back to their places. A set that is not seen through is left.
    """
    whole, *others = sets
    for u in range(whole.table.shape[0] - 1):
        order = np.arange(whole.table.shape[0])
        order[[u, u + 1]] = u + 1, u
        image = _image(whole, order, shown.size)
        astray = _astray(image, shown)
        while astray:
            orders = ((other, _order(other, image)) for other in others)
            back = [_image(other, np.argsort(order), shown.size)[image] for other, order in orders if order is not None]
            image = min(back, key=lambda i: _astray(i, shown), default=image)
            before, astray = astray, _astray(image, shown)
            if astray >= before:
                return False
    return True


def _astray(image: np.ndarray, shown: np.ndarray) -> int:
    """How many vertices of parameters a permutation moves."""
    return int(np.count_nonzero((image != np.arange(shown.size)) & shown))


def _order(units: UnitSet, image: np.ndarray) -> np.ndarray | None:
    """The order in which a permutation of the vertices puts some column of a set; None if it leaves all in place."""
    to = image[units.table]
    inside = (np.sort(to, 0) == np.sort(units.table, 0)).all(0) & (to != units.table).any(0)
    if not inside.any():
        return None
    column, moved = units.table[:, inside.argmax()], to[:, inside.argmax()]
    place = np.argsort(column)
    order: np.ndarray = place[np.searchsorted(column, moved, sorter=place)]
    return order


def _image(units: UnitSet, order: np.ndarray, vertices: int) -> np.ndarray:
    """Where every vertex goes when unit u goes to unit ``order[u]``."""
    image = np.arange(vertices)
    image[units.table] = units.table[order]
    for pair in units.pairs:
        there = pair[order][:, order]
        image[pair[pair >= 0]] = there[pair >= 0]
    return image
