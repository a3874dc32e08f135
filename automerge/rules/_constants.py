"""What may be permuted in a constant tensor, from its values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

_MAX_ENTRIES = 5_000_000


@dataclass(frozen=True, eq=False)
class Pattern:
    """Two axes of a constant that can be permuted together: an identity, a permutation, blocks on a diagonal.

    Positions with equal slices are one class; besides a background, every class has one entry at most.

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
    def of_a_kind(self) -> bool:
        """Whether all entries have the same value."""
        return bool((self.kinds == self.kinds[0]).all())


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
        one_to_one = np.unique(rows).size == rows.size == np.unique(columns).size
        found = kinds[rows, columns]
        if one_to_one and np.unique(found).size < found.size:
            return Pattern((a, b), (several[a], several[b]), rows, columns, found)
    return None


def _kinds(cells: np.ndarray) -> np.ndarray:
    """Number the distinct rows of a table."""
    if cells.shape[1] == 1:
        return np.unique(cells, return_inverse=True)[1].reshape(-1)
    cells = np.ascontiguousarray(cells + 0.0 if cells.dtype.kind in "fc" else cells)
    one = cells.view(np.dtype((np.void, cells.dtype.itemsize * cells.shape[1]))).reshape(-1)
    return np.unique(one, return_inverse=True)[1].reshape(-1)
