"""Units of which pairs have entries of their own: outer squares (a Gram matrix, a learnt transform of the features).

A permutation p of n units moves the entry of the pair (i, j) to that of (p[i], p[j]). Exchanges of two units then overlap
in such entries, so that no table of disjoint units holds them; coordinates do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

Image = Mapping[int, int]


def squared(
    images: Sequence[Image], ends: Callable[[int], Iterable[int]] = lambda _: ()
) -> tuple[np.ndarray, tuple[np.ndarray, ...]] | None:
    """The vertices that n units and their ordered pairs own, from the exchanges of unit 0 with every other.

    These exchanges generate the symmetric group, and every vertex gets coordinates on which each of them acts as on its
    units: what is returned is an action of the whole group if each exchange is an automorphism.

    Args:
        images: of the exchange of unit 0 with unit k + 1, vertex -> vertex in both directions.
        ends: where edges lead from a vertex; of three units any pair may be called the first, so that of the ends is taken.

    Returns:
        ``(n, columns)`` vertices that single units own, and for each orbit of pairs an ``(n, n)`` array of vertices, -1 on
        its diagonal; None unless there are such orbits and no other ones.
    """
    n = len(images) + 1
    movers: dict[int, list[int]] = {}
    for k, image in enumerate(images, start=1):
        for w in image:
            movers.setdefault(w, []).append(k)
    orbits: list[set[int]] = []
    seen: set[int] = set()
    for start in sorted(movers):
        if start not in seen:
            orbits.append(_orbit(start, images, movers))
            seen |= orbits[-1]
    if {len(orbit) for orbit in orbits} != {n, n * (n - 1)}:
        return None
    unit_of: dict[int, int] = {}
    singles: list[np.ndarray] = []
    pairs: list[np.ndarray] = []
    for orbit in sorted(orbits, key=len):  # single units first
        count = 1 if len(orbit) == n else 2
        # a vertex that is not unit 0's moves with its own units alone
        first = next((w for w in sorted(orbit) if len(movers[w]) == count), None)
        if first is None:
            return None
        own = sorted({unit_of[t] for t in ends(first) if t in unit_of})
        label = tuple(own) if n == 3 and len(own) == count == 2 else tuple(movers[first])
        found = _coordinates(first, label, images, movers)
        if found is None or np.count_nonzero(found >= 0) != len(orbit):
            return None
        (singles if count == 1 else pairs).append(found)
        if count == 1:
            unit_of |= {int(w): u for u, w in enumerate(found)}
    return np.stack(singles, axis=1), tuple(pairs)


def _orbit(start: int, images: Sequence[Image], movers: Mapping[int, Sequence[int]]) -> set[int]:
    found, todo = {start}, [start]
    while todo:
        w = todo.pop()
        new = {images[k - 1][w] for k in movers[w]} - found
        found |= new
        todo += new
    return found


def _coordinates(
    first: int, label: tuple[int, ...], images: Sequence[Image], movers: Mapping[int, Sequence[int]]
) -> np.ndarray | None:
    """The vertices of one orbit by their units, ``(n,)`` or ``(n, n)``; None if exchanges do not act on these.

    Args:
        first: a vertex.
        label: its units.
        images: see `squared`.
        movers: vertex -> the exchanges that move it.
    """
    n = len(images) + 1
    at: dict[int, tuple[int, ...]] = {first: label}
    todo = [first]
    while todo:
        w = todo.pop()
        if movers[w] != (list(range(1, n)) if 0 in at[w] else sorted(at[w])):
            return None
        for k in movers[w]:
            to, units = images[k - 1][w], tuple([k if u == 0 else 0 if u == k else u for u in at[w]])
            if to not in at:
                at[to] = units
                todo.append(to)
            elif at[to] != units:
                return None
    out = np.full((n,) * len(label), -1)
    for w, units in at.items():
        out[units] = w
    return out
