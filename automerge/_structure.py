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


class Structure:
    """The axis structure with united vertices numbered 0..n, typed edges and stable colours."""

    def __init__(self, axes: Axes) -> None:
        root = axes.root[: axes.count]
        self.ids, self.index = np.unique(root, return_inverse=True)
        self.n = self.ids.size
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
        key = np.stack([event, family[source], family[target]], 1)
        _, kind = np.unique(key, axis=0, return_inverse=True)
        rows = np.unique(np.stack([kind.reshape(-1), self.index[source], self.index[target]], 1), axis=0)
        return rows[:, 0].copy(), rows[:, 1].copy(), rows[:, 2].copy()

    def _initial(self, axes: Axes, family: np.ndarray) -> np.ndarray:
        colour = np.zeros(self.n, np.uint64)
        lead = np.array([axes.families[c].start for c in axes.class_of], np.int64)
        colour[self.index] = mixed_hash(lead[family])
        for i, (labels, values) in enumerate(axes.marks):
            rows = np.unique(np.stack([self.index[labels], family[labels], values.astype(np.int64)], 1), axis=0)
            with np.errstate(over="ignore"):
                np.add.at(colour, rows[:, 0], mixed_hash(i + 1, rows[:, 1], rows[:, 2] + 1))
        return colour

    def clusters(self) -> np.ndarray:
        """Vertices that determine each other through one-to-one edges: the number of each vertex's cluster."""
        pairs = (
            np.unique(np.stack([self.edge_type, self.target], 1), axis=0, return_counts=True)
            if self.source.size
            else None
        )
        one = np.ones(self.source.size, bool)
        if pairs is not None:
            crowded = np.unique(pairs[0][pairs[1] > 1, 0])
            one = ~np.isin(self.edge_type, crowded)
        # ... or are on one circle of edges (x + flip(x))
        edges = coo_matrix((np.ones(self.source.size, np.int8), (self.source, self.target)), shape=(self.n, self.n))
        circle = connected_components(edges, directed=True, connection="strong")[1]
        _, first = np.unique(circle, return_index=True)
        rows = np.concatenate([self.source[one], np.arange(self.n)])
        columns = np.concatenate([self.target[one], first[circle]])
        both = coo_matrix((np.ones(rows.size, np.int8), (rows, columns)), shape=(self.n, self.n))
        return connected_components(both, directed=False)[1]

    def _refine(self, colour: np.ndarray) -> np.ndarray:
        _, now = np.unique(colour, return_inverse=True)
        now = now.reshape(-1).astype(np.int64)
        while True:
            count = int(now.max(initial=-1)) + 1
            if count == self.n or not self.source.size:
                return now
            total = mixed_hash(now)
            with np.errstate(over="ignore"):
                np.add.at(total, self.source, mixed_hash(self.edge_type, 1, now[self.target]))
                np.add.at(total, self.target, mixed_hash(self.edge_type, 2, now[self.source]))
            _, new = np.unique(np.stack([now.astype(np.uint64), total], 1), axis=0, return_inverse=True)
            now = new.reshape(-1).astype(np.int64)
            if int(now.max()) + 1 == count:
                return now
