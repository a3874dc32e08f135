"""What counts as a number of a caller's: Python's and numpy's, and no truth values."""

from __future__ import annotations

from numbers import Integral, Real


def is_whole(value: object) -> bool:
    """Whether it is a whole number.

    Examples:
        >>> import numpy as np
        >>> is_whole(3), is_whole(np.int64(3)), is_whole(3.0), is_whole(True)
        (True, True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number, which may be infinite or NaN.

    Examples:
        >>> import numpy as np
        >>> is_number(0.5), is_number(np.float32(0.5)), is_number(1), is_number("1"), is_number(False)
        (True, True, True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)
