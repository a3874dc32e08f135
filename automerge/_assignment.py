"""Linear assignment: scipy's solver behind one function."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment


def assign(gain: np.ndarray) -> np.ndarray:
    """The permutation p that maximises ``sum_i gain[i, p[i]]``.

    The minima of rows and columns (of the costs) are subtracted first: that leaves the optimum as it is, and gives the
    solver a feasible start from which most rows are assigned at once.

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
    cost = gain.max(axis=1, keepdims=True) - np.asarray(gain, dtype=np.float64)
    cost -= cost.min(axis=0, keepdims=True)
    return linear_sum_assignment(cost)[1].astype(np.int64)
