"""The automorphisms of an axis structure, as sets of interchangeable units.

Colour refinement separates vertices that no automorphism can exchange. A candidate swap then propagates what it forces
(images under edges; the members of exchanged containers, matched in order) and is checked exactly on every incident edge.
Swaps from one reference with equal support form a symmetric group. An error here can only miss a group: every set that is
returned has been checked, so unsoundness could come only from a rule.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from automerge.rules._axes import Axes

_MIX = np.uint64(0x9E3779B97F4A7C15)
_MAX_REFERENCES = 64


@dataclass(frozen=True)
class UnitSet:
    """``table[u]`` lists the (united) vertices of unit u; columns correspond."""

    table: np.ndarray


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(*parts: np.ndarray | int) -> np.ndarray:
    out = np.uint64(0)
    with np.errstate(over="ignore"):
        for p in parts:
            out = _mix(np.asarray(p).astype(np.uint64) + _MIX * (np.asarray(out) + np.uint64(1)))
    return np.asarray(out)


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
        colour[self.index] = _hash(lead[family])
        for i, (labels, values) in enumerate(axes.marks):
            rows = np.unique(np.stack([self.index[labels], family[labels], values.astype(np.int64)], 1), axis=0)
            with np.errstate(over="ignore"):
                np.add.at(colour, rows[:, 0], _hash(i + 1, rows[:, 1], rows[:, 2] + 1))
        return colour

    def cycles(self) -> list[int]:
        """The strongly connected component of every vertex (x + flip(x) relates vertices in circles)."""
        graph = coo_matrix((np.ones(self.source.size, np.int8), (self.source, self.target)), shape=(self.n, self.n))
        return connected_components(graph, directed=True, connection="strong")[1].tolist()

    def _refine(self, colour: np.ndarray) -> np.ndarray:
        _, now = np.unique(colour, return_inverse=True)
        now = now.reshape(-1).astype(np.int64)
        while True:
            count = int(now.max(initial=-1)) + 1
            if count == self.n or not self.source.size:
                return now
            total = _hash(now)
            with np.errstate(over="ignore"):
                np.add.at(total, self.source, _hash(self.edge_type, 1, now[self.target]))
                np.add.at(total, self.target, _hash(self.edge_type, 2, now[self.source]))
            _, new = np.unique(np.stack([now.astype(np.uint64), total], 1), axis=0, return_inverse=True)
            now = new.reshape(-1).astype(np.int64)
            if int(now.max()) + 1 == count:
                return now


class _Swapper:
    """Adjacency among vertices that may move, and the propagation of one candidate swap."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.colour = structure.colour.tolist()
        counts = np.bincount(structure.colour, minlength=1)
        self.moving = counts[structure.colour] > 1
        both = self.moving[structure.source] & self.moving[structure.target]
        self.out: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.into: dict[int, dict[int, list[int]]] = defaultdict(dict)
        kinds, sources, targets = (a[both].tolist() for a in (structure.edge_type, structure.source, structure.target))
        for kind, s, t in zip(kinds, sources, targets, strict=True):
            self.out[s].append((kind, t))
            self.into[t].setdefault(kind, []).append(s)

    def swap(self, u: int, v: int) -> list[tuple[int, int]] | None:
        """The smallest automorphism found that exchanges u and v: its pairs, u's side first; None if there is none."""
        image: dict[int, int] = {}
        pairs: list[tuple[int, int]] = []
        forced: list[tuple[int, int]] = [(u, v)]
        members: list[tuple[int, int, int]] = []
        while forced or members:
            while forced:
                a, b = forced.pop()
                if not self._assign(a, b, image, pairs, forced, members):
                    return None
            if members:
                kind, a, b = members.pop(0)
                found = self._match(kind, a, b, image)
                if found is None:
                    return None
                forced += found
        return pairs if self._exact(image) else None

    def _assign(self, a: int, b: int, image: dict, pairs: list, forced: list, members: list) -> bool:
        if a in image or b in image:
            return image.get(a) == b and image.get(b) == a
        if a == b:
            return True
        if self.colour[a] != self.colour[b]:
            return False
        image[a], image[b] = b, a
        pairs.append((a, b))
        out_a, out_b = self.out.get(a, []), self.out.get(b, [])
        if len(out_a) != len(out_b):
            return False
        for (ka, ta), (kb, tb) in zip(out_a, out_b, strict=True):
            if ka != kb:
                return False
            if ta != tb:
                forced.append((ta, tb))
        for kind in self.into.get(a, {}):
            members.append((kind, a, b))
        return True

    def _match(self, kind: int, a: int, b: int, image: dict[int, int]) -> list[tuple[int, int]] | None:
        mine = [w for w in self.into[a].get(kind, []) if w not in image]
        theirs = [w for w in self.into.get(b, {}).get(kind, []) if w not in image]
        if len(mine) != len(theirs):
            return None
        free: dict[tuple, list[int]] = defaultdict(list)
        for w in reversed(theirs):
            free[(self.colour[w], *self.out[w])].append(w)
        found, left = [], []
        for w in mine:
            key = (self.colour[w], *((k, image.get(t, t)) for k, t in self.out[w]))
            if free.get(key):
                found.append((w, free[key].pop()))
            else:
                left.append(w)
        if left:
            by_colour: dict[int, list[int]] = defaultdict(list)
            rest = {w for ws in free.values() for w in ws}
            for w in reversed(theirs):
                if w in rest:
                    by_colour[self.colour[w]].append(w)
            for w in left:
                if not by_colour.get(self.colour[w]):
                    return None
                found.append((w, by_colour[self.colour[w]].pop()))
        return found

    def _exact(self, image: dict[int, int]) -> bool:
        """Every edge at a moved vertex is mapped onto an edge of its type."""
        for a, b in image.items():
            mine, theirs = self.out.get(a, []), self.out.get(b, [])
            if [(k, image.get(t, t)) for k, t in mine] != theirs:
                return False
            into = self.into.get(a, {})
            for sources in into.values():
                if any(w not in image for w in sources):
                    return False
        return True


def search(structure: Structure, wanted: np.ndarray | None = None) -> list[UnitSet]:
    """All sets of interchangeable units, inner ones first.

    Args:
        structure: the axis structure.
        wanted: bool per vertex; sets without any such vertex are dropped (they move no parameter).
    """
    swapper = _Swapper(structure)
    cycle = structure.cycles()
    buckets: dict[tuple, list[int]] = defaultdict(list)
    for v in np.flatnonzero(swapper.moving).tolist():
        outside = ((k, t) for k, t in swapper.out.get(v, ()) if cycle[t] != cycle[v])
        buckets[(swapper.colour[v], *outside)].append(v)
    found: list[UnitSet] = []
    place: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
    for bucket in sorted((b for b in buckets.values() if len(b) > 1), key=lambda b: (swapper.out.get(b[0], []) == [], b[0])):
        for table in _sets_of(bucket, swapper, place):
            number = len(found)
            found.append(UnitSet(table))
            for row, vertices in enumerate(table.tolist()):
                for column, v in enumerate(vertices):
                    place[v][number, column] = row
    kept = [s for s in found if wanted is None or wanted[s.table].any()]
    return sorted(kept, key=lambda s: s.table.shape[1])


def _same_column(bucket: list[int], place: dict[int, dict[tuple[int, int], int]]) -> bool:
    common = set(place[bucket[0]]) if bucket[0] in place else set()
    for v in bucket[1:]:
        common &= set(place[v]) if v in place else set()
        if not common:
            return False
    return bool(common)


def _sets_of(bucket: list[int], swapper: _Swapper, place: dict) -> list[np.ndarray]:
    """The symmetric groups among vertices with equal colour and equal images."""
    if _same_column(bucket, place):
        return []
    tables: list[np.ndarray] = []
    known: list[set[frozenset[int]]] = []
    left = list(bucket)
    for _ in range(_MAX_REFERENCES):
        if len(left) < 2:
            break
        reference, left = left[0], left[1:]
        groups: dict[frozenset[int], dict[frozenset[int], list[int]]] = defaultdict(dict)
        members: dict[frozenset[int], list[int]] = defaultdict(list)
        for v in left:
            pairs = swapper.swap(reference, v)
            if pairs is None:
                continue
            pairs.sort()
            mine = frozenset(a for a, _ in pairs)
            row = [b for _, b in pairs]
            groups[mine].setdefault(frozenset(row), row)
            members[mine].append(v)
        for mine in sorted(groups, key=len):
            units = {mine, *groups[mine]}
            if not any(units <= other for other in known):
                known.append(units)
                tables.append(np.array([sorted(mine), *groups[mine].values()], np.int64))
        if groups:
            smallest = min(groups, key=len)
            done = set(members[smallest])
            left = [v for v in left if v not in done]
            if len(groups) == 1 and not left:
                break
    return tables
