"""The axis structure as one coloured graph: united vertices, typed edges, stable colours."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from automerge.rules._axes import Axes

_MIX = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mixed_hash(*parts: np.ndarray | int) -> np.ndarray:
    out = np.asarray(np.uint64(0))
    with np.errstate(over="ignore"):
        for p in parts:
            out = _mix(np.asarray(p).astype(np.uint64) + _MIX * (out + np.uint64(1)))
    return out


def _key(*columns: np.ndarray) -> np.ndarray:
    """One number for each row of a table of natural numbers: equal for equal rows, in the order of the rows."""
    key, room = np.zeros(columns[0].size, np.uint64), 2**64
    for column in columns:
        width = int(column.max(initial=0)) + 1
        if width > room:  # the product of the ranges leaves 64 bits: number the rows so far
            key = np.unique(key, return_inverse=True)[1].astype(np.uint64)
            room = 2**64 // (int(key.max(initial=0)) + 1)
        key = key * np.uint64(width) + column.astype(np.uint64)
        room //= width
    return key


def _distinct(*columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """The distinct rows of a table of natural numbers, in lexicographic order."""
    key = _key(*columns)
    order = np.argsort(key)
    key = key[order]
    kept = order[np.concatenate([[True], key[1:] != key[:-1]])] if key.size else order
    return tuple(c[kept] for c in columns)


class Structure:
    """The axis structure with united vertices numbered 0..n, typed edges and stable colours."""

    def __init__(self, axes: Axes) -> None:
        root = axes.root[: axes.count]
        lead = root == np.arange(root.size)  # every root is its own root
        self.index = (np.cumsum(lead) - 1)[root]
        self.n = int(np.count_nonzero(lead))
        family = axes.family_of[: axes.count].astype(np.int64)
        self.edge_type, self.source, self.target = self._edges(axes, family)
        self.colour = self._refine(self._initial(axes, family))

    def _edges(self, axes: Axes, family: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not axes.edges:
            empty = np.empty(0, np.int64)
            return empty, empty, empty
        event = np.concatenate([np.full(s.size, i, np.int64) for i, (s, _) in enumerate(axes.edges)])
        source = np.concatenate([s for s, _ in axes.edges])
        target = np.concatenate([t for _, t in axes.edges])
        # a type is the event with the raw families of both ends, so that united families stay apart
        kind = np.unique(_key(event, family[source], family[target]), return_inverse=True)[1]
        return _distinct(kind, self.index[source], self.index[target])  # type: ignore[return-value]

    def _initial(self, axes: Axes, family: np.ndarray) -> np.ndarray:
        colour = np.zeros(self.n, np.uint64)
        lead = np.array([axes.families[c].start for c in axes.class_of], np.int64)
        colour[self.index] = mixed_hash(lead[family])
        for i, (labels, values) in enumerate(axes.marks):
            at, of, value = _distinct(self.index[labels], family[labels], values.astype(np.int64))
            with np.errstate(over="ignore"):
                np.add.at(colour, at, mixed_hash(i + 1, of, value + 1))
        return colour

    def clusters(self) -> np.ndarray:
        """Vertices that determine each other through one-to-one edges: the number of each vertex's cluster."""
        one = np.ones(self.source.size, bool)
        if self.source.size:
            key = _key(self.edge_type, self.target)
            order = np.argsort(key)
            again = order[1:][key[order[1:]] == key[order[:-1]]]
            crowded = np.zeros(int(self.edge_type.max()) + 1, bool)
            crowded[self.edge_type[again]] = True
            one = ~crowded[self.edge_type]
        # ... or are on one circle of edges (x + flip(x))
        edges = coo_matrix((np.ones(self.source.size, np.int8), (self.source, self.target)), shape=(self.n, self.n))
        circle = connected_components(edges, directed=True, connection="strong")[1]
        _, first = np.unique(circle, return_index=True)
        rows = np.concatenate([self.source[one], np.arange(self.n)])
        columns = np.concatenate([self.target[one], first[circle]])
        both = coo_matrix((np.ones(rows.size, np.int8), (rows, columns)), shape=(self.n, self.n))
        return connected_components(both, directed=False)[1]

    def _refine(self, colour: np.ndarray) -> np.ndarray:
        """Colours such that equal ones have equally many edges of every type to every colour."""
        _, now = np.unique(colour, return_inverse=True)
        if not self.source.size:
            return now
        touched = np.zeros(self.n, bool)
        touched[self.source] = touched[self.target] = True
        inside = np.flatnonzero(touched)  # all others keep their colour, which no vertex with edges may share
        place = np.cumsum(touched) - 1
        source, target = place[self.source], place[self.target]
        _, mine = np.unique(now[inside], return_inverse=True)
        out, into = mixed_hash(self.edge_type, 1), mixed_hash(self.edge_type, 2)
        sizes, changed = np.bincount(mine), np.ones(mine.size, bool)
        while True:
            ends = np.flatnonzero(changed[target]), np.flatnonzero(changed[source])
            total, hit = np.zeros(mine.size, np.uint64), np.zeros(mine.size, bool)
            with np.errstate(over="ignore"):
                np.add.at(total, source[ends[0]], mixed_hash(out[ends[0]], mine[target[ends[0]]]))
                np.add.at(total, target[ends[1]], mixed_hash(into[ends[1]], mine[source[ends[1]]]))
            hit[source[ends[0]]] = hit[target[ends[1]]] = True
            at = np.flatnonzero(hit & (sizes[mine] > 1))
            new = _split(at, total[at], mine, sizes)
            if new is None:
                break
            changed = np.zeros(mine.size, bool)
            changed[new] = True
            sizes = np.bincount(mine)
        now = now.copy()
        now[inside] = mine + self.n
        return np.unique(now, return_inverse=True)[1]


def _split(at: np.ndarray, total: np.ndarray, colour: np.ndarray, sizes: np.ndarray) -> np.ndarray | None:
    """Give vertices of one colour that differ in ``total`` colours of their own, in place.

    One part of every colour keeps it, as what is known of a colour and of all its parts but one says all of the last:
    the vertices that are not among those given, if there are any, else the largest part.

    Args:
        at: vertices.
        total: a number for each of them.
        colour: of all vertices; changed.
        sizes: how many vertices have a colour.

    Returns:
        The vertices that have another colour now; None if there are none.
    """
    _, first, part, count = np.unique(
        mixed_hash(colour[at], total), return_index=True, return_inverse=True, return_counts=True
    )
    old = colour[at[first]]
    order = np.lexsort((count, old))
    last = np.append(old[order][1:] != old[order][:-1], True)[: old.size]
    keeps = np.zeros(old.size, bool)
    keeps[order[last]] = True
    keeps &= np.bincount(old, weights=count, minlength=sizes.size)[old] == sizes[old]
    if keeps.all():
        return None
    names = np.where(keeps, old, np.cumsum(~keeps) - 1 + sizes.size)
    colour[at] = names[part]
    return at[~keeps[part]]
