"""Means over disjoint sets, and Markdown tables of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Mean:
    """A mean over sets of networks.

    Attributes:
        value: the mean of the sets' means.
        deviation: the standard deviation over the sets; NaN for one set.
        sets: how many.
        rows: how many rows it rests on.
    """

    value: float
    deviation: float
    sets: int
    rows: int

    def percent(self, digits: int = 1) -> str:
        """As percent with the deviation.

        Examples:
            >>> Mean(0.5, 0.011, 3, 3).percent()
            '50.0 ± 1.1'
        """
        return self.plain(digits, 100.0)

    def plain(self, digits: int = 3, factor: float = 1.0) -> str:
        """As a number with the deviation."""
        if math.isnan(self.value):
            return "–"
        text = f"{factor * self.value:.{digits}f}"
        return text if math.isnan(self.deviation) else f"{text} ± {factor * self.deviation:.{digits}f}"


def by_set(rows: Iterable[Row], value: str = "accuracy") -> dict[int, float]:
    """Set -> the mean of a value over its rows."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.get(value) is not None:
            found.setdefault(int(row["set"]), []).append(float(row[value]))
    return {k: fmean(v) for k, v in sorted(found.items())}


def mean(rows: Iterable[Row], value: str = "accuracy") -> Mean:
    """The mean of a value over sets, and its deviation.

    Examples:
        >>> mean([{"set": 0, "accuracy": 0.5}, {"set": 1, "accuracy": 0.7}]).plain(2)
        '0.60 ± 0.14'
    """
    kept = list(rows)
    values = list(by_set(kept, value).values())
    if not values:
        return Mean(math.nan, math.nan, 0, 0)
    return Mean(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values), len(kept))


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    out = ["| " + " | ".join(head) + " |", "|:--|" + "--:|" * (len(head) - 1)]
    out += ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join(out) + "\n"


def grid(
    rows: Sequence[Row],
    down: str,
    across: str,
    lines: Sequence[Any],
    columns: Sequence[Any],
    *,
    value: str = "accuracy",
    show: Callable[[Mean], str] = Mean.percent,
    corner: str | None = None,
) -> str:
    """A table of means: a line for each value of one column of the rows, a column for each of another."""
    found = []
    for line in lines:
        cells = [mean([r for r in rows if r.get(down) == line and r.get(across) == c], value) for c in columns]
        if any(cell.sets for cell in cells):
            found.append([str(line), *map(show, cells)])
    return table([corner or down, *map(str, columns)], found)


@dataclass(frozen=True)
class Difference:
    """One way against another on the same sets of networks.

    Attributes:
        value: the mean of the paired differences.
        margin: half the width of its 95 % confidence interval (Student's t over the pairs); NaN for fewer than three.
        sets: how many pairs.
        wins: in how many the difference is above zero.
        settings: of how many settings.
    """

    value: float
    margin: float
    sets: int
    wins: int
    settings: int

    @property
    def verdict(self) -> str:
        """``ahead`` or ``behind`` if the interval is on one side of zero."""
        if not abs(self.value) > self.margin:
            return "not settled"
        return "ahead" if self.value > 0 else "behind"

    def __str__(self) -> str:
        if not self.sets:
            return "no rows"
        margin = "" if math.isnan(self.margin) else f" ± {100 * self.margin:.1f}"
        return f"{100 * self.value:+.1f}{margin} points, {self.wins} of {self.sets} sets"


def difference(ours: Iterable[Row], theirs: Iterable[Row], value: str = "accuracy") -> Difference:
    """Paired by setting and set of networks; what is measured on parts of one set (other N) is averaged first.

    Examples:
        >>> a = [{"setting": "s", "n": 2, "set": k, "accuracy": 0.9 + 0.01 * k} for k in range(3)]
        >>> b = [{"setting": "s", "n": 2, "set": k, "accuracy": 0.8} for k in range(3)]
        >>> difference(a, b).verdict
        'ahead'
    """
    left, right = _cells(ours, value), _cells(theirs, value)
    pairs: dict[tuple[str, int], list[float]] = {}
    for setting, n, number in left:
        if (setting, n, number) in right:
            gap = left[setting, n, number] - right[setting, n, number]
            pairs.setdefault((setting, number), []).append(gap)
    gaps = [fmean(v) for v in pairs.values()]
    if not gaps:
        return Difference(math.nan, math.nan, 0, 0, 0)
    margin = math.nan
    if len(gaps) > 2:
        margin = float(student.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))
    return Difference(fmean(gaps), margin, len(gaps), sum(g > 0 for g in gaps), len({s for s, _ in pairs}))


def _cells(rows: Iterable[Row], value: str) -> dict[tuple[str, Any, int], float]:
    found: dict[tuple[str, Any, int], list[float]] = {}
    for row in rows:
        if row.get(value) is not None:
            found.setdefault((row["setting"], row.get("n"), row["set"]), []).append(float(row[value]))
    return {k: fmean(v) for k, v in found.items()}
