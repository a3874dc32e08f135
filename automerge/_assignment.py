"""Linear assignment: scipy's solver, or lapx's where it is installed, behind one function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.optimize import linear_sum_assignment

_SMALL = 64


def assign(gain: np.ndarray) -> np.ndarray:
    """The permutation p that maximises ``sum_i gain[i, p[i]]``.

    The minima of rows and columns (of the costs) are subtracted first: that leaves the optimum as it is, and gives
    scipy's solver a feasible start from which most rows are assigned at once. The Jonker-Volgenant solver of the package
    lapx takes that step itself; it is used if installed, and finds the same optimum in about 40 % of the time (n = 1024,
    gradients of trained networks).

    Args:
        gain: float, ``(n, n)``; finite.

    Returns:
        int64, ``(n,)``.

    Examples:
        >>> assign(np.array([[0.0, 2.0], [1.0, 0.0]]))
        array([1, 0])
    """
    n = gain.shape[0]
    if n <= 1:
        return np.zeros(n, dtype=np.int64)
    cost = np.subtract(gain.max(axis=1, keepdims=True), gain, dtype=np.float64)
    solver = lapx_solver() if n >= _SMALL else None
    if solver is not None:
        return np.asarray(solver(cost, return_cost=False)[1], dtype=np.int64)
    cost -= cost.min(axis=0)
    return linear_sum_assignment(cost)[1].astype(np.int64)


@cache
def lapx_solver() -> Callable[..., tuple[np.ndarray, np.ndarray]] | None:
    """Lapx's solver, or None. Its import name, ``lap``, is that of another package too, which lacks ``lapjvr``."""
    try:
        return getattr(importlib.import_module("lap"), "lapjvr", None)
    except ImportError:
        return None
