"""Linear assignment: scipy's solver, or lapx's where it is installed, behind one function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.optimize import linear_sum_assignment

from automerge._errors import MatchingError

_SMALL = 64  # units from which lapx is asked
_LARGE = 128  # from which potentials may pay
_TINY = np.float32(1e-30)
_CLEAR, _CLEAR_TO_LAPX = 0.85, 0.55  # the share of columns that are some row's best, from which they do not


def assign(gain: np.ndarray) -> np.ndarray:
    """The permutation p that maximises ``sum_i gain[i, p[i]]``.

    What depends on the row or on the column alone is no matter of the assignment. So minima of rows and columns (of the
    costs) are subtracted first, and before them, where many rows want the same columns, the `potentials` of a smoothed
    problem: the optimum stays as it is, and scipy's solver finds most rows assigned at once. On gradients that say little
    (the first of a search) that takes a quarter of the time. The Jonker-Volgenant solver of the package lapx subtracts
    minima itself; it is used if installed (n = 1024, gradients of trained networks: 40 % of scipy's time).

    Args:
        gain: float, ``(n, n)``; finite.

    Returns:
        int64, ``(n,)``.

    Raises:
        MatchingError: for gains that are not finite: weights are, so their products left the range of the numbers.

    Examples:
        >>> assign(np.array([[0.0, 2.0], [1.0, 0.0]]))
        array([1, 0])
    """
    n = gain.shape[0]
    if n <= 1:
        return np.zeros(n, dtype=np.int64)
    if not np.isfinite(gain).all():
        raise MatchingError(
            "the products of weights (or activations) exceed the range of the numbers that are matched in; did a training "
            "diverge? else give the matcher dtype='float64'"
        )
    solver = lapx_solver() if n >= _SMALL else None
    hard = n >= _LARGE and _wanted(gain) < (_CLEAR if solver is None else _CLEAR_TO_LAPX)
    cost = np.subtract(potentials(gain) if hard else 0.0, gain, dtype=np.float64)
    cost -= cost.min(axis=1, keepdims=True)
    if solver is not None:
        return np.asarray(solver(cost, return_cost=False)[1], dtype=np.int64)
    cost -= cost.min(axis=0)
    return linear_sum_assignment(cost)[1].astype(np.int64)


def _wanted(gain: np.ndarray) -> float:
    """The share of the columns that are some row's best."""
    return np.unique(gain.argmax(axis=1)).size / gain.shape[0]


def potentials(gain: np.ndarray, softness: float = 0.03, sweeps: int = 20) -> np.ndarray:
    """Prices of the columns at which hardly two rows want the same one: those of the entropic assignment.

    Sinkhorn's iteration (Cuturi, "Sinkhorn distances", 2013): with ``K = exp(gain / T)`` the row and column scalings of
    K are multiplied into it in turn. The dual prices of the assignment are the limit of ``T log(column scaling)`` for
    T to 0; for a solver that goes on from them a few sweeps at a moderate T do.

    Args:
        gain: ``(n, n)``; finite.
        softness: T as a share of the mean distance of an entry from the largest of its row.
        sweeps: the number of iterations.

    Returns:
        float64, ``(n,)``; finite. Zero if every row is constant.
    """
    below = np.subtract(gain, gain.max(axis=1, keepdims=True), dtype=np.result_type(gain, np.float32))
    temperature = -softness * float(below.mean(dtype=np.float64))
    if not temperature > 0:
        return np.zeros(gain.shape[1])
    kernel = np.exp(np.divide(below, temperature, out=below), out=below).astype(np.float32, copy=False)
    column = np.ones(gain.shape[1], dtype=np.float32)
    for _ in range(sweeps):
        row = 1 / np.maximum(kernel @ column, _TINY)
        column = 1 / np.maximum(row @ kernel, _TINY)
    return -temperature * np.log(column, dtype=np.float64)


@cache
def lapx_solver() -> Callable[..., tuple[np.ndarray, np.ndarray]] | None:
    """Lapx's solver, or None. Its import name, ``lap``, is that of another package too, which lacks ``lapjvr``."""
    try:
        return getattr(importlib.import_module("lap"), "lapjvr", None)
    except ImportError:
        return None
