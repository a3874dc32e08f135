"""What may be permuted in a constant tensor, from its values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

_MAX_ENTRIES = 1_000_000
_MAX_LINKS = 4_096


@dataclass(frozen=True, eq=False)
class Pattern:
    """Two axes of a constant that can be permuted together (an identity, blocks on a diagonal).

    Positions with equal slices are one class; the pattern is one of classes.

    Attributes:
        axes: the two axes.
        classes: for each of them, the class of every position.
        rows: the class along the first axis of every entry that is not the background.
        columns: its class along the second axis.
        kinds: a number for its value (its slice along all other axes).
    """

    axes: tuple[int, int]
    classes: tuple[np.ndarray, np.ndarray]
    rows: np.ndarray
    columns: np.ndarray
    kinds: np.ndarray

    @property
    def one_to_one(self) -> bool:
        """Whether every row and every column has exactly one entry, all of a kind."""
        return all(np.unique(a).size == a.size for a in (self.rows, self.columns)) and np.unique(self.kinds).size == 1


def slice_classes(array: np.ndarray, axis: int) -> np.ndarray:
    """Number the distinct slices along an axis: equal slices get equal numbers."""
    n = array.shape[axis]
    rows = np.moveaxis(array, axis, 0).reshape(n, -1)
    if rows.dtype.kind in "fc":
        rows = rows + 0.0  # one zero
    if bool((rows == rows[:1]).all()):
        return np.zeros(n, np.int64)
    rows = np.ascontiguousarray(rows)
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.int64)


def pattern(array: np.ndarray) -> Pattern | None:
    """The first two axes of which distinct slices can be permuted together; None if there are none."""
    if array.ndim < 2 or array.size > _MAX_ENTRIES or min(array.shape) == 0:
        return None
    classes = {k: slice_classes(array, k) for k, n in enumerate(array.shape) if n > 1}
    several = {k: c for k, c in classes.items() if c.max() > 0}
    for a, b in itertools.combinations(several, 2):
        first, second = (np.unique(several[k], return_index=True)[1] for k in (a, b))
        cells = array.take(first, axis=a).take(second, axis=b)
        n, m = first.size, second.size
        kinds = _kinds(np.moveaxis(cells, (a, b), (0, 1)).reshape(n * m, -1)).reshape(n, m)
        background = int(np.bincount(kinds.reshape(-1)).argmax())
        rows, columns = np.nonzero(kinds != background)
        if 0 < rows.size <= _MAX_LINKS and not _rigid(kinds):
            return Pattern((a, b), (several[a], several[b]), rows, columns, kinds[rows, columns])
    return None


def _kinds(cells: np.ndarray) -> np.ndarray:
    cells = np.ascontiguousarray(cells + 0.0 if cells.dtype.kind in "fc" else cells)
    one = cells.view(np.dtype((np.void, cells.dtype.itemsize * cells.shape[1]))).reshape(-1)
    return np.unique(one, return_inverse=True)[1].reshape(-1)


def _rigid(kinds: np.ndarray) -> bool:
    """Whether colour refinement tells all rows and columns apart."""
    rows, columns = np.zeros(kinds.shape[0], np.int64), np.zeros(kinds.shape[1], np.int64)
    while True:
        before = int(rows.max()) + int(columns.max())
        rows = _refined(kinds, rows, columns)
        columns = _refined(kinds.T, columns, rows)
        if int(rows.max()) + 1 == rows.size or int(columns.max()) + 1 == columns.size:
            return True
        if int(rows.max()) + int(columns.max()) == before:
            return False


def _refined(kinds: np.ndarray, mine: np.ndarray, others: np.ndarray) -> np.ndarray:
    table = np.sort(kinds * (int(others.max()) + 1) + others, axis=1)
    return np.unique(np.column_stack([mine, table]), axis=0, return_inverse=True)[1].reshape(-1)
