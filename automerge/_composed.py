"""Sets of units whose exchanges are those of other sets, made together."""

from __future__ import annotations

from collections.abc import Sequence

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
    left = set(range(len(sets)))
    for k in sorted(left, key=lambda k: -moved[k].size):
        if (count[moved[k]] > 1).all() and _is_composed(sets[k], [sets[i] for i in left if i != k], shown):
            left.remove(k)
            count[moved[k]] -= 1
    return sorted(left)


def _moved(units: UnitSet, shown: np.ndarray) -> np.ndarray:
    found = np.unique(np.concatenate([units.table.reshape(-1), *(pair[pair >= 0] for pair in units.pairs)]))
    return found[shown[found]]


def _is_composed(whole: UnitSet, others: Sequence[UnitSet], shown: np.ndarray) -> bool:
    """Whether the exchange of any two neighbouring units is made of elements of other sets, one after the other.

    Sought greedily: each brings the most vertices back to their places. A set that is not seen through is left.
    """
    for u in range(whole.table.shape[0] - 1):
        order = np.arange(whole.table.shape[0])
        order[[u, u + 1]] = u + 1, u
        image = _image(whole, order, shown.size)
        astray = _astray(image, shown)
        while astray:
            back = [
                _image(other, np.argsort(o), shown.size)[image]
                for other in others
                if (o := _order(other, image)) is not None
            ]
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
