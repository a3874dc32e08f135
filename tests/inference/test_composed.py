"""Sets of units that other sets make up are left out, and no others."""

from __future__ import annotations

import numpy as np

from automerge import _composed
from automerge._search import UnitSet


def _sets(*tables: list[list[int]]) -> list[UnitSet]:
    return [UnitSet(np.array(table)) for table in tables]


def without_composed(sets: list[UnitSet]) -> list[int]:
    return _composed.without_composed(sets, np.ones(20, bool))


ROWS = [[0, 6, 7, 8], [1, 9, 10, 11], [2, 12, 13, 14]]  # three keys, and a value for every pair of keys
COLUMNS = [[3, 6, 9, 12], [4, 7, 10, 13], [5, 8, 11, 14]]


def test_exchanges_of_two_sets_at_once_are_no_set() -> None:
    # keys 1 and 2 of both: values (1, 1) and (2, 2), (1, 2) and (2, 1), (1, 0) and (2, 0), (0, 1) and (0, 2)
    both = [[1, 4, 9, 7, 10, 11], [2, 5, 12, 8, 14, 13]]
    assert without_composed(_sets(ROWS, COLUMNS, both)) == [0, 1]
    assert without_composed(_sets(both, ROWS, COLUMNS)) == [1, 2]


def test_what_moves_something_else_as_well_is_left() -> None:
    both = [[1, 4, 9, 7, 10, 11, 15], [2, 5, 12, 8, 14, 13, 16]]
    assert without_composed(_sets(ROWS, COLUMNS, both)) == [0, 1, 2]


def test_what_moves_the_same_otherwise_is_left() -> None:
    half = [[1, 9, 10, 11], [2, 12, 14, 13]]  # the rows exchanged, and what is in them in another order
    assert without_composed(_sets(ROWS, COLUMNS, half)) == [0, 1, 2]


def test_sets_that_share_nothing_are_left() -> None:
    assert without_composed(_sets([[0], [1]], [[2], [3]], [[4, 5], [6, 7]])) == [0, 1, 2]
    assert without_composed([]) == []
