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

from automerge._squares import squared
from automerge._structure import Structure, mixed_hash

_MAX_REFERENCES = 64


@dataclass(frozen=True)
class UnitSet:
    """Interchangeable units.

    Attributes:
        table: ``table[u]`` lists the (united) vertices of unit u; columns correspond.
        pairs: ``(units, units)`` arrays of the vertices that ordered pairs of units own; -1 on the diagonal.
    """

    table: np.ndarray
    pairs: tuple[np.ndarray, ...] = ()


class _Adjacency:
    """Compressed rows of edges among vertices that may move: (kind, other end) for each vertex, sorted."""

    def __init__(self, n: int, kind: np.ndarray, at: np.ndarray, other: np.ndarray) -> None:
        order = np.lexsort((other, kind, at))
        self.kind, self.other = kind[order], other[order]
        self.start = np.searchsorted(at[order], np.arange(n + 1))

    def block(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The other ends of the edges at every unit's vertices ``(units, columns)``.

        Returns:
            The column that each edge is at, and the ends ``(units, edges)``; None unless corresponding vertices have the
            same kinds of edges.
        """
        low = self.start[units]
        degree = self.start[units + 1] - low
        if not (degree == degree[0]).all():
            return None
        column = np.repeat(np.arange(units.shape[1]), degree[0])
        within = np.arange(column.size) - np.repeat(np.cumsum(degree[0]) - degree[0], degree[0])
        at = low[:, column] + within
        kinds = self.kind[at]
        if not (kinds == kinds[0]).all():
            return None
        return column, self.other[at]

    def row(self, v: int) -> list[tuple[int, int]]:
        """The edges of one vertex."""
        part = slice(self.start[v], self.start[v + 1])
        return list(zip(self.kind[part].tolist(), self.other[part].tolist(), strict=True))


class _Swapper:
    """Candidate exchanges of vertices: a whole bucket at once where it is regular, else one pair at a time."""

    def __init__(self, structure: Structure) -> None:
        n = structure.n
        self.colour = structure.colour
        self.moving = np.bincount(structure.colour, minlength=1)[structure.colour] > 1
        both = self.moving[structure.source] & self.moving[structure.target]
        kind, source, target = structure.edge_type[both], structure.source[both], structure.target[both]
        self.outward = _Adjacency(n, kind, source, target)
        self.inward = _Adjacency(n, kind, target, source)
        self._row = np.full(n, -1, np.int64)
        self._column = np.full(n, -1, np.int64)
        self._out: dict[int, list[tuple[int, int]]] = {}
        self._into: dict[int, dict[int, list[int]]] = {}

    def buckets(self, cluster: np.ndarray) -> list[np.ndarray]:
        """Vertices of equal colour whose clusters have the same images outside; roots first."""
        out = self.outward
        at = np.repeat(np.arange(self.colour.size), np.diff(out.start))
        outside = cluster[at] != cluster[out.other]
        whole = np.zeros(int(cluster.max(initial=-1)) + 1, np.uint64)
        with np.errstate(over="ignore"):
            images = mixed_hash(self.colour[at[outside]], out.kind[outside], out.other[outside])
            np.add.at(whole, cluster[at[outside]], images)
        key = whole[cluster]
        chosen = np.flatnonzero(self.moving)
        group = mixed_hash(self.colour[chosen], key[chosen])
        order = np.argsort(group, kind="stable")
        cuts = np.flatnonzero(np.diff(group[order])) + 1
        starts, ends = np.concatenate([[0], cuts]), np.concatenate([cuts, [order.size]])
        several = np.flatnonzero(ends - starts > 1)
        parts = [chosen[order[starts[k] : ends[k]]] for k in several]
        return sorted(parts, key=lambda p: (bool(key[p[0]]), int(p[0])))

    # ------------------------------------------------------------ a whole bucket
    def bundle(self, bucket: np.ndarray) -> np.ndarray | None:
        """The table of a bucket whose members all have clusters of one shape in order; None if that does not check out."""
        columns = [bucket[:, None]]
        self._row[bucket], self._column[bucket] = np.arange(bucket.size), 0
        try:
            while columns[-1].shape[1]:
                new = self._extended(columns[-1], sum(c.shape[1] for c in columns))
                if new is None:
                    return None
                columns.append(new)
            table = np.concatenate(columns, 1)
            return table if self._keeps(table) else None
        finally:
            for c in columns:
                self._row[c] = self._column[c] = -1

    def _extended(self, units: np.ndarray, count: int) -> np.ndarray | None:
        """The columns that must move with some: all that leads into them, and what they lead to one to one.

        Args:
            units: vertices, ``(units, columns)``.
            count: the number of columns so far.
        """
        into, out = self.inward.block(units), self.outward.block(units)
        if into is None or out is None:
            return None
        order = np.argsort(np.concatenate([into[0], out[0]]), kind="stable")
        ends = np.concatenate([into[1], out[1]], 1)[:, order]
        still = (order >= into[0].size) & (self._row[ends[0]] < 0) & (ends == ends[0]).all(0)
        ends = ends[:, ~still]
        first = ends[0]
        at = np.flatnonzero(self._row[first] < 0)
        at = np.sort(at[np.unique(first[at], return_index=True)[1]])
        new = ends[:, at]
        if (self._row[new] >= 0).any():
            return None
        self._row[new], self._column[new] = np.arange(units.shape[0])[:, None], np.arange(count, count + at.size)
        if self._parallel(ends):
            return new
        self._row[new] = self._column[new] = -1
        return None

    def _parallel(self, ends: np.ndarray) -> bool:
        """Whether every row is in its unit and every column in one column."""
        inside = bool((self._row[ends] == np.arange(ends.shape[0])[:, None]).all())
        return inside and bool((self._column[ends] == self._column[ends[0]]).all())

    def _keeps(self, table: np.ndarray) -> bool:
        """Every edge out of a unit stays in it, or leads to one vertex that does not move."""
        block = self.outward.block(table)
        if block is None or not (self.colour[table] == self.colour[table[0]]).all():
            return False
        moves = self._row[block[1][0]] >= 0
        still, ends = block[1][:, ~moves], block[1][:, moves]
        return bool((still == still[0]).all()) and self._parallel(ends)

    # ------------------------------------------------------------ one pair
    def out(self, v: int) -> list[tuple[int, int]]:
        """Edges out of a vertex."""
        found = self._out.get(v)
        if found is None:
            found = self._out[v] = self.outward.row(v)
        return found

    def into(self, v: int) -> dict[int, list[int]]:
        """Edges into a vertex, by kind."""
        found = self._into.get(v)
        if found is None:
            found = self._into[v] = {}
            for kind, source in self.inward.row(v):
                found.setdefault(kind, []).append(source)
        return found

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
        out_a, out_b = self.out(a), self.out(b)
        if len(out_a) != len(out_b):
            return False
        for (ka, ta), (kb, tb) in zip(out_a, out_b, strict=True):
            if ka != kb:
                return False
            if ta != tb:
                forced.append((ta, tb))
        for kind in self.into(a):
            members.append((kind, a, b))
        return True

    def _match(self, kind: int, a: int, b: int, image: dict[int, int]) -> list[tuple[int, int]] | None:
        mine = [w for w in self.into(a).get(kind, []) if w not in image]
        theirs = [w for w in self.into(b).get(kind, []) if w not in image]
        if len(mine) != len(theirs):
            return None
        free: dict[tuple, list[int]] = defaultdict(list)
        for w in reversed(theirs):
            free[(self.colour[w], *self.out(w))].append(w)
        found, left = [], []
        for w in mine:
            key = (self.colour[w], *((k, image.get(t, t)) for k, t in self.out(w)))
            if free.get(key):
                found.append((w, free[key].pop()))
            else:
                left.append(w)
        rest = sorted(w for ws in free.values() for w in ws)
        for w in left:
            choice = self._best(w, rest, image)
            if choice is None:
                return None
            rest.remove(choice)
            found.append((w, choice))
        return found

    def _best(self, w: int, candidates: list[int], image: dict[int, int]) -> int | None:
        """The first candidate of w's colour that agrees with all images so far and moves the least else."""
        best, score = None, -1
        for c in candidates:
            if self.colour[c] != self.colour[w]:
                continue
            agree = 0
            for (_, t), (_, x) in zip(self.out(w), self.out(c), strict=True):
                if image.get(t, x) != x or (x in image and image[x] != t):
                    break
                agree += t == x
            else:
                if agree > score:
                    best, score = c, agree
        return best

    def _exact(self, image: dict[int, int]) -> bool:
        """Every edge at a moved vertex is mapped onto an edge of its type."""
        for a, b in image.items():
            if [(k, image.get(t, t)) for k, t in self.out(a)] != self.out(b):
                return False
            if any(w not in image for sources in self.into(a).values() for w in sources):
                return False
        return True


def search(structure: Structure, wanted: np.ndarray | None = None) -> list[UnitSet]:
    """All sets of interchangeable units, inner ones first.

    Args:
        structure: the axis structure.
        wanted: bool per vertex; sets without any such vertex are dropped (they move no parameter).
    """
    swapper = _Swapper(structure)
    shown = np.ones(structure.n, bool) if wanted is None else wanted
    found: dict[tuple, UnitSet] = {}
    number = 0
    last = np.full((structure.n, 2), -1, np.int64)  # the latest set and column of each vertex
    for bucket in swapper.buckets(structure.clusters()):
        places = last[bucket]
        if places[0, 0] >= 0 and (places == places[0]).all():
            continue  # they were exchanged along with others already
        table = swapper.bundle(bucket)
        for units in [UnitSet(table)] if table is not None else _sets_of(bucket.tolist(), swapper, shown):
            made = units.table
            # sets that differ in vertices of no parameter only are one
            owned = np.sort(made[:, shown[made[0]]], axis=1)
            rows = owned[np.argsort(owned[:, 0])] if owned.size else owned
            found.setdefault((owned.shape, rows.tobytes()), units)
            number += 1
            last[made.reshape(-1), 0] = number
            last[made.reshape(-1), 1] = np.tile(np.arange(made.shape[1]), made.shape[0])
            for k, pair in enumerate(units.pairs):
                last[pair[pair >= 0]] = number, made.shape[1] + k
    kept = [s for s in found.values() if wanted is None or wanted[s.table].any()]
    return sorted(kept, key=lambda s: s.table.shape[1])


def _sets_of(bucket: list[int], swapper: _Swapper, shown: np.ndarray) -> list[UnitSet]:
    """The symmetric groups among vertices with equal colour and equal images, from pairwise exchanges.

    Exchanges with one reference form one group when they move the same vertices on the reference's side, or act on pairs;
    only vertices that are shown (they stand for a parameter) need to agree, and make up the table.
    """
    tables: list[np.ndarray] = []
    known: list[set[frozenset[int]]] = []
    left = list(bucket)
    for _ in range(_MAX_REFERENCES):
        if len(left) < 2:
            break
        reference, left = left[0], left[1:]
        images: dict[int, dict[int, int]] = {}
        for v in left:
            pairs = [p for p in swapper.swap(reference, v) or [] if shown[p[0]]]
            if pairs:
                images[v] = dict(pairs)
        if len(images) == len(bucket) - 1 > 1:
            both = [i | {b: a for a, b in i.items()} for i in images.values()]
            made = squared(both, lambda w: [end for _, end in swapper.out(w)])
            if made is not None:
                return [UnitSet(*made)]
        found = [t for t in map(np.array, _tables(images)) if _is_new(t, known)]
        tables += found
        reached = _orbit(reference, found, bucket)
        smallest = min(map(len, images.values()), default=0)
        left = [v for v in left if v not in reached and (v not in images or len(images[v]) != smallest)]
    return [UnitSet(table) for table in tables]


def _orbit(reference: int, tables: list[np.ndarray], bucket: list[int]) -> set[int]:
    """Where a reference gets to by exchanges that all move the whole bucket: from there on they are the same ones.

    (Sets that move a part of it have counterparts elsewhere, which are found from there.)
    """
    columns = [{v: column for column in table.T.tolist() for v in column} for table in tables]
    if any(v not in column for column in columns for v in bucket):
        return set()
    reached, new = {reference}, [reference]
    while new:
        v = new.pop()
        further = {w for column in columns for w in column[v]} - reached
        reached |= further
        new += further
    return reached


def _tables(images: dict[int, dict[int, int]]) -> list[list[list[int]]]:
    """Tables of units from the exchanges of one reference, smallest units first.

    Exchanges of one size have the reference's unit in common; where units overlap (an outer square), those are put together
    whose sides happen to agree.
    """
    out: list[list[list[int]]] = []
    by_size: dict[int, list[dict[int, int]]] = defaultdict(list)
    for image in images.values():
        by_size[len(image)].append(image)
    for size in sorted(by_size):
        alike = by_size[size]
        both = [i | {b: a for a, b in i.items()} for i in alike]
        unit = set(both[0]).intersection(*both[1:]) if len(both) > 1 else set(alike[0])
        if len(unit) == size:
            groups = [(sorted(unit), both)]
        else:
            sides: dict[frozenset[int], list[dict[int, int]]] = defaultdict(list)
            for image in alike:
                sides[frozenset(image)].append(image)
            groups = [(sorted(side), members) for side, members in sides.items()]
        for mine, members in groups:
            # of exchanges that differ inside the units the one that keeps the order there: slices can follow it where
            # every unit has an order of its own along another axis
            rows: dict[frozenset[int], list[int]] = {}
            for row in [mine, *sorted([i[a] for a in mine] for i in members)]:
                rows.setdefault(frozenset(row), row)
            flat = [v for row in rows.values() for v in row]
            if len(rows) > 1 and len(set(flat)) == len(flat):
                out.append(list(rows.values()))
    return out


def _is_new(table: np.ndarray, known: list[set[frozenset[int]]]) -> bool:
    units = {frozenset(row) for row in table.tolist()}
    if any(units <= other for other in known):
        return False
    known.append(units)
    return True
