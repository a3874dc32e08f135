"""The exact line search: the maximum of a polynomial on [0, 1]."""

from __future__ import annotations

import numpy as np
from numpy.polynomial import polynomial as poly


def maximise_polynomial(coefficients: np.ndarray) -> tuple[float, float]:
    """The step in [0, 1] with the largest value of a polynomial, end points included, and its gain over 0.

    Args:
        coefficients: by rising powers.

    Examples:
        >>> maximise_polynomial(np.array([0.0, 1.0, -1.0]))
        (0.5, 0.25)
        >>> maximise_polynomial(np.array([0.0, 1.0, 1.0]))
        (1.0, 2.0)
    """
    slope = poly.polyder(coefficients)
    size = float(np.abs(slope).max(initial=0.0))
    if size == 0:
        return 0.0, 0.0
    slope = poly.polytrim(slope / size, 1e-14)
    roots = poly.polyroots(slope)
    inside = [float(r.real) for r in roots if abs(r.imag) < 1e-6 and 0 < r.real < 1]
    start = float(coefficients[0])
    gain, step = max(
        ((float(poly.polyval(t, coefficients)) - start, t) for t in (*inside, 0.0, 1.0)), key=lambda x: x[0]
    )
    return (step, gain) if gain > 0 else (0.0, 0.0)
