"""Sets of units whose exchanges are those of other sets, made together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from automerge._search import UnitSet


def without_composed(sets: Sequence[UnitSet]) -> list[int]:
    """The numbers of the sets that are left when those that others make up are taken out, one after the other.

    The search begins at every vertex that others resemble, and where the units of two sets meet in a third axis (a value for
    every pair of two keys) it may find the exchanges of both at once besides.

    Args:
        sets: of united vertices.
    """
    moved = [_moved(units) for units in sets]
    count = np.zeros(1 + max((int(m.max(initial=-1)) for m in moved), default=-1), np.int64)
    for of in moved:
        count[of] += 1
    left = set(range(len(sets)))
    for k in sorted(left, key=lambda k: -moved[k].size):
        if (count[moved[k]] > 1).all() and _is_composed(sets[k], [sets[i] for i in left if i != k], count.size):
            left.remove(k)
            count[moved[k]] -= 1
    return sorted(left)


def _moved(units: UnitSet) -> np.ndarray:
    return np.unique(np.concatenate([units.table.reshape(-1), *(pair[pair >= 0] for pair in units.pairs)]))


def _is_composed(whole: UnitSet, others: Sequence[UnitSet], vertices: int) -> bool:
    """Whether the exchange of any two neighbouring units is an element of one other set after that of another."""
    for u in range(whole.table.shape[0] - 1):
        order = np.arange(whole.table.shape[0])
        order[[u, u + 1]] = u + 1, u
        image = _image(whole, order, vertices)
        for other in others:
            found = _order(other, image)
            if found is not None:
                image = _image(other, np.argsort(found), vertices)[image]
        if (image != np.arange(vertices)).any():
            return False
    return True


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
