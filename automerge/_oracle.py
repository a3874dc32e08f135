"""The linear maximisation oracle of a tree: the group element with the largest total gain.

A plain set of units is one linear assignment. In a wreath product the best inner element for every pair of (new, old)
outer units gives the value of that pair, and one assignment over those values is exact. The values are computed lazily:
an upper bound stands for each (the sum of the row maxima, and of the column maxima), and only the pairs that an optimal
assignment uses are made exact, until all the used ones are. Siblings that act on one space are alternated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from automerge._assignment import assign
from automerge._tree import Path, Perms, Structure, induced

Gains = dict[Path, np.ndarray]


def maximise(structure: Structure, root: int, gains: Mapping[Path, np.ndarray]) -> tuple[float, Perms]:
    """The element of one tree that maximises the sum of ``gains[space][new, induced[new]]``.

    Args:
        structure: the roles.
        root: the tree.
        gains: for some spaces of that tree a float matrix ``(size, size)``: the gain of sending the old position
            (column) to the new position (row).

    Returns:
        The total gain and the element. It is exact unless siblings share a space; then no single role can gain more.
    """
    shaped = {q: np.asarray(g).reshape(structure.grid(q) * 2) for q, g in gains.items()}
    value, perms = _role(structure, root, shaped, ()) if shaped else (0.0, {})
    for r in structure.descendants(root):
        if r not in perms:
            perms[r] = structure._identity_of(r)
    return value, perms


def _role(structure: Structure, r: int, gains: Gains, outer: Path) -> tuple[float, Perms]:
    """The best element of the subtree of one role; every space in ``gains`` contains it, and comes first there."""
    n = structure.roles[r].size
    if len(gains) == 1 and all(len(q) == 1 for q in gains):
        (gain,) = gains.values()
        p = assign(gain)
        return float(gain[np.arange(n), p].sum(dtype=np.float64)), {r: p}
    value = np.zeros((n, n))
    inner: Gains = {}
    for q, gain in gains.items():
        if len(q) == 1:
            value += gain
        else:
            inner[q[1:]] = gain
            value += _bounds(gain, n)
    known = np.zeros((n, n), dtype=bool) if inner else np.ones((n, n), dtype=bool)
    solved: dict[tuple[int, int], Perms] = {}
    rows = np.arange(n)
    while True:
        p = assign(value)
        todo = rows[~known[rows, p]]
        if not todo.size:
            break
        for i in todo:
            pair = {q: _pair(gain, int(i), int(p[i])) for q, gain in gains.items() if len(q) > 1 for q in [q[1:]]}
            own = sum(float(gain[i, p[i]]) for q, gain in gains.items() if len(q) == 1)
            best, solved[int(i), int(p[i])] = _forest(structure, pair, (*outer, r))
            value[i, p[i]] = own + best
            known[i, p[i]] = True
    out: Perms = {r: p}
    if inner:
        parts = [solved[i, int(p[i])] for i in range(n)]
        out.update({c: np.stack([part[c] for part in parts]) for c in parts[0]})
    return float(value[rows, p].sum()), out


def _pair(gain: np.ndarray, i: int, j: int) -> np.ndarray:
    """The gains inside one (new, old) pair of outer units."""
    half = gain.ndim // 2
    return gain[i].take(j, axis=half - 1)


def _bounds(gain: np.ndarray, n: int) -> np.ndarray:
    """For each (new, old) pair of outer units an upper bound on what the inner group can gain."""
    m = int(np.prod(gain.shape[1 : gain.ndim // 2]))
    flat = gain.reshape(n, m, n, m)
    by_row = flat.max(axis=3).sum(axis=1, dtype=np.float64)
    by_column = flat.max(axis=1).sum(axis=2, dtype=np.float64)
    return np.minimum(by_row, by_column)


def _forest(structure: Structure, gains: Gains, outer: Path) -> tuple[float, Perms]:
    """The best elements of sibling subtrees; those that share a space are solved together."""
    total, out = 0.0, Perms()
    for kids in _components(structure, gains, outer):
        part = {q: g for q, g in gains.items() if any(r in kids for r in q)}
        value, perms = (
            _role(structure, kids[0], part, outer) if len(kids) == 1 else _siblings(structure, kids, part, outer)
        )
        total += value
        out.update(perms)
    return total, out


def _branch(structure: Structure, r: int, outer: Path) -> int:
    """The child of the innermost fixed ancestor above (or at) role r."""
    path = structure.roles[r].path
    return path[len(outer)] if len(path) > len(outer) else r


def _components(structure: Structure, gains: Gains, outer: Path) -> list[list[int]]:
    groups: list[set[int]] = []
    for q in gains:
        kids = {_branch(structure, r, outer) for r in q}
        joined = [g for g in groups if g & kids]
        groups = [g for g in groups if not g & kids] + [kids.union(*joined)]
    return [sorted(g) for g in groups]


# -------------------------------------------------------------------- siblings on one space
def _siblings(structure: Structure, kids: Sequence[int], gains: Gains, outer: Path) -> tuple[float, Perms]:
    """Alternate sibling subtrees that share spaces, from several starts, until no one gains; the best end wins.

    The starts are the identity, and for each sibling the optimum of a bound in which the others are free position by
    position.
    """
    starts: list[Perms] = [{}]
    for k in kids:
        relaxed: Gains = {}
        for q, gain in gains.items():
            mine, block = _split(structure, q, k, gain, outer)
            if mine:
                _add(relaxed, mine, np.minimum(block.max(axis=3).sum(axis=1), block.max(axis=1).sum(axis=2)), structure)
        starts.append(_role(structure, k, relaxed, outer)[1])
    ends = [_alternate(structure, kids, gains, outer, start) for start in starts]
    return max(ends, key=lambda end: end[0])


def _alternate(
    structure: Structure, kids: Sequence[int], gains: Gains, outer: Path, start: Perms
) -> tuple[float, Perms]:
    perms = dict(start)
    value = -np.inf
    order = [k for k in kids if k not in start] + [k for k in kids if k in start]
    while True:
        now = dict(perms)
        gained = value
        for k in order:
            linear: Gains = {}
            rest = 0.0
            for q, gain in gains.items():
                mine, block = _split(structure, q, k, gain, outer)
                others = [r for r in q if r not in mine]
                sigma = induced(structure, now, others, outer) if others else np.zeros(1, dtype=np.int64)
                fixed = block[:, np.arange(sigma.size), :, sigma].sum(axis=0, dtype=np.float64)
                if mine:
                    _add(linear, mine, fixed, structure)
                else:
                    rest += float(fixed.sum())
            best, part = _role(structure, k, linear, outer)
            gained = best + rest
            now.update(part)
        if not gained > value + 1e-12 * max(1.0, abs(gained)):
            return value, perms
        value, perms = gained, now


def _split(structure: Structure, q: Path, k: int, gain: np.ndarray, outer: Path) -> tuple[Path, np.ndarray]:
    """The roles of q below k, and the gains as (new mine, new others, old mine, old others)."""
    mine = tuple(r for r in q if _branch(structure, r, outer) == k)
    at = [i for i, r in enumerate(q) if r in mine] + [i for i, r in enumerate(q) if r not in mine]
    m = int(np.prod(structure.grid(mine)))
    half = len(q)
    block = gain.transpose(*at, *(i + half for i in at))
    others = block.size // (m * m)
    side = round(others**0.5)
    return mine, block.reshape(m, side, m, side)


def _add(gains: Gains, q: Path, gain: np.ndarray, structure: Structure) -> None:
    shaped = gain.reshape(structure.grid(q) * 2)
    gains[q] = gains[q] + shaped if q in gains else shaped
