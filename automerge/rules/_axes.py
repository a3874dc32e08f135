"""The axis structure that rules write into: vertices, families, typed functional edges and marks.

A *vertex* is a position of a parameter axis (or a fresh one made by an operator); a *family* is a run of vertices that
were made together. The symmetry group of the model is the group of vertex permutations that keep every family, every
mark and every typed edge (a partial function from vertices to vertices). Two families that must move alike and are still
unrelated are united (one class); everything else is an edge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import networkx as nx
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

MAX_JOINT = 4_000_000


class Unruled(Exception):
    """A rule does not cover this use of its operator; the node is handled as if it had no rule."""


def distinct(labels: np.ndarray) -> bool:
    """Whether no entry occurs twice."""
    flat = labels.reshape(-1)
    return flat.size < 2 or _run(flat) or np.unique(flat).size == flat.size


def determines(source: np.ndarray, target: np.ndarray) -> bool:
    """Whether equal labels in one array mean equal labels in the other."""
    pairs = np.stack([source.reshape(-1), target.reshape(-1)])
    return np.unique(pairs, axis=1).shape[1] == np.unique(source).size


def _run(flat: np.ndarray) -> bool:
    """Whether these are consecutive numbers."""
    return bool(flat[-1] - flat[0] == flat.size - 1) and np.array_equal(flat, np.arange(flat[0], flat[-1] + 1))


def _sorted(labels: np.ndarray) -> np.ndarray:
    """The distinct labels in order."""
    flat = labels.reshape(-1)
    return flat if flat.size and _run(flat) else np.unique(flat)


@dataclass
class Family:
    """Vertices ``start .. start + size``.

    Attributes:
        param: state-dict name, or None for vertices made by an operator.
        axis: the parameter axis.
        by: for a split axis, ``(axis, classes)`` pairs: the family is indexed (class of each other axis..., position).
        shape: the family's index shape.
    """

    start: int
    size: int
    shape: tuple[int, ...]
    param: str | None = None
    axis: int = 0
    by: tuple[tuple[int, np.ndarray], ...] = ()
    origin: str = ""
    members: list[int] = field(default_factory=list)


class Axes:
    """All vertices of one inference, and what relates them."""

    def __init__(self) -> None:
        self.families: list[Family] = []
        self.family_of = np.empty(1024, np.int32)
        self.root = np.empty(1024, np.int64)
        self.rigid = np.zeros(1024, bool)
        self.count = 0
        self.class_of: list[int] = []
        self.classes: dict[int, list[int]] = {}
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.marks: list[tuple[np.ndarray, np.ndarray]] = []
        self.reasons: list[tuple[np.ndarray, str, str]] = []
        self.contents: dict[
            int, tuple[np.ndarray, np.ndarray]
        ] = {}  # family of containers -> labels, container of each
        self.graph = nx.MultiGraph()
        self.where = ""
        self._seen: dict[tuple[bytes, bytes], bool] = {}
        self._projections: dict[tuple[bytes, tuple[int, ...], tuple[int, ...]], np.ndarray] = {}
        self._unique: dict[int, bool] = {}

    # ------------------------------------------------------------ making vertices
    def fresh(self, shape: tuple[int, ...], *, param: str | None = None, axis: int = 0, by: tuple = ()) -> np.ndarray:
        """A new family of vertices, as an array of the given shape."""
        size = math.prod(shape)
        if param is None and size > MAX_JOINT:
            raise Unruled(f"a joint structure of {size:,} positions is over the bound of {MAX_JOINT:,}")
        start = self.count
        while start + size > len(self.root):
            self.root = np.concatenate([self.root, np.empty_like(self.root)])
            self.family_of = np.concatenate([self.family_of, np.empty_like(self.family_of)])
            self.rigid = np.concatenate([self.rigid, np.zeros_like(self.rigid)])
        number = len(self.families)
        self.families.append(Family(start, size, tuple(shape), param, axis, by, self.where))
        self.family_of[start : start + size] = number
        self.root[start : start + size] = np.arange(start, start + size)
        self.rigid[start : start + size] = size == 1
        self.class_of.append(number)
        self.classes[number] = [number]
        self.count += size
        self.graph.add_node(number, param=param, axis=axis, size=size)
        return np.arange(start, start + size, dtype=np.int64).reshape(shape)

    def family(self, labels: np.ndarray) -> Family | None:
        """The one family that all labels belong to, or None."""
        flat = labels.reshape(-1)
        number = self.family_of[flat[0]]
        family = self.families[number]
        if flat.min() >= family.start and flat.max() < family.start + family.size:
            return family
        return None

    # ------------------------------------------------------------ relating vertices
    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """``a[i]`` and ``b[i]`` move together; both arrays name no vertex twice."""
        a, b = a.reshape(-1), b.reshape(-1)
        if (self.root[a] == self.root[b]).all():
            return
        if self._unite(a, b):
            return
        self.edge(a, b)

    def _unite(self, a: np.ndarray, b: np.ndarray) -> bool:
        fa, fb = (self.families[self.family_of[x[0]]] for x in (a, b))
        if fa.size != a.size or fb.size != b.size or self.family(a) is None or self.family(b) is None:
            return False
        na, nb = int(self.family_of[a[0]]), int(self.family_of[b[0]])
        ca, cb = self.class_of[na], self.class_of[nb]
        if ca == cb:
            return False
        if len(self.classes[ca]) < len(self.classes[cb]):
            a, b, ca, cb = b, a, cb, ca
        lead = self.families[cb].start
        table = np.empty(a.size, np.int64)
        table[self.root[b] - lead] = self.root[a]
        for number in self.classes[cb]:
            family = self.families[number]
            part = slice(family.start, family.start + family.size)
            self.root[part] = table[self.root[part] - lead]
            self.class_of[number] = ca
        self.classes[ca] += self.classes.pop(cb)
        self.graph.add_edge(na, nb, op=self.where)
        return True

    def edge(self, source: np.ndarray, target: np.ndarray) -> None:
        """A new type of edge: ``source[i] -> target[i]``; no source is named twice with different targets."""
        source, target = np.broadcast_arrays(source, target)
        source, target = np.ascontiguousarray(source).reshape(-1), np.ascontiguousarray(target).reshape(-1)
        if np.array_equal(source, target):
            return
        key = (source.tobytes(), target.tobytes()) if source.size < 200_000 else None
        if key is not None:
            if key in self._seen:
                return
            self._seen[key] = True
        self.edges.append((source, target))
        self.graph.add_edge(int(self.family_of[source[0]]), int(self.family_of[target[0]]), op=self.where)

    def project(self, labels: np.ndarray, keep: tuple[int, ...]) -> np.ndarray:
        """Containers: one vertex for each position along the kept array axes, with an edge from every label inside.

        Args:
            labels: what is projected.
            keep: the array axes that are kept, in their order.
        """
        key = (labels.tobytes(), labels.shape, keep)
        found = self._projections.get(key)
        if found is None:
            found = self.fresh(tuple(labels.shape[k] for k in keep))
            view = [labels.shape[k] if k in keep else 1 for k in range(labels.ndim)]
            self.edge(labels, np.broadcast_to(found.reshape(view), labels.shape))
            self._projections[key] = found
            self.contents[int(self.family_of[found.reshape(-1)[0]])] = (
                labels,
                np.broadcast_to(found.reshape(view), labels.shape),
            )
        return found

    def refine(self, labels: np.ndarray) -> np.ndarray:
        """A fresh vertex for every position, with an edge to its label."""
        made = self.fresh(labels.shape)
        self.edge(made, labels)
        return made

    def relabel(self, *labels: np.ndarray) -> np.ndarray:
        """A fresh vertex for every distinct tuple of labels, with an edge to each; equal tuples stay copies."""
        if any(self.injective(one) for one in labels):
            made = self.fresh(labels[0].shape)
            for one in labels:
                self.edge(made, one)
            return made
        stacked = np.stack([one.reshape(-1) for one in labels])
        distinct, number = np.unique(stacked, axis=1, return_inverse=True)
        made = self.fresh((distinct.shape[1],))
        for row in distinct:
            self.edge(made, row)
        return made[number.reshape(-1)].reshape(labels[0].shape)

    # ------------------------------------------------------------ marks
    def mark(self, labels: np.ndarray, values: np.ndarray) -> None:
        """Colour vertices: a permutation maps a vertex only to one of the same value under this mark."""
        labels, values = np.broadcast_arrays(labels, values)
        self.marks.append((np.ascontiguousarray(labels).reshape(-1), np.ascontiguousarray(values).reshape(-1)))

    def select(self, labels: np.ndarray, whole: np.ndarray) -> None:
        """Some of the labels of an array are singled out (a slice): they may only be permuted among themselves."""
        chosen = _sorted(labels)
        if chosen.size < _sorted(whole).size:
            self.mark(chosen, np.zeros(chosen.size, np.int64))

    def pin(self, labels: np.ndarray, reason: str) -> None:
        """Fix every vertex named."""
        unique = _sorted(labels)
        self.rigid[unique] = True
        self.mark(unique, np.arange(unique.size))
        self.reasons.append((unique, reason, self.where))

    def clusters(self) -> np.ndarray:
        """For every vertex a number that it shares with those that it moves with by one-to-one relations."""
        both = [(np.arange(self.count), self.root[: self.count])]
        both += [(s, t) for s, t in self.edges if distinct(s) and distinct(t)]
        rows, columns = (np.concatenate(ends) for ends in zip(*both, strict=True))
        joined = coo_matrix((np.ones(rows.size, np.int8), (rows, columns)), shape=(self.count, self.count))
        return connected_components(joined, directed=False)[1]

    def encloses(self, moving: np.ndarray, numbers: np.ndarray, but: Collection[int] = ()) -> bool:
        """Whether positions are made up of whole axes of parameters: then the model gives their number, and not the input.

        Args:
            moving: `clusters`.
            numbers: of the positions.
            but: starts of families that do not count.
        """
        inside = np.zeros(moving.size, bool)
        inside[numbers] = True
        whole = np.zeros(moving.size, bool)
        for f in self.families:
            if f.param is not None and f.size and f.start not in but:
                mine = moving[f.start : f.start + f.size]
                if inside[mine].all():
                    whole[mine] = True
        return bool(whole[numbers].all())

    def multiplies(self, moving: np.ndarray, numbers: np.ndarray) -> bool:
        """Whether positions are those of a table, one for every pair of a row and a column, which both are units of parameters.

        (What several heads read of one memory: a head is units of a parameter, a word those of another.)
        """
        own = np.unique(numbers)
        sides = []
        for source, target in self.edges:
            here = moving[source]
            if here.size == own.size and np.array_equal(np.sort(here), own) and self._counts(moving, moving[target]):
                sides.append(np.unique(moving[target[np.argsort(here)]], return_inverse=True)[1])
        for rows, columns in itertools.combinations(sides, 2):
            pairs = rows * own.size + columns
            if (rows.max() + 1) * (columns.max() + 1) == own.size and distinct(pairs):
                return True
        return False

    def _counts(self, moving: np.ndarray, numbers: np.ndarray) -> bool:
        """Whether positions are on one axis of a parameter, or hold such positions."""
        own = np.unique(numbers)
        held = (np.unique(moving[s]) for s, t in self.edges if np.array_equal(np.unique(moving[t]), own))
        axes = [moving[f.start : f.start + f.size] for f in self.families if f.param is not None]
        return any(np.isin(some, axis).all() for some in (own, *held) for axis in axes)

    @staticmethod
    def injective(labels: np.ndarray) -> bool:
        """Whether no vertex is named twice (judged on raw vertices, never on united ones)."""
        return distinct(labels)


def settle_resized(axes: Axes, resized: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> None:
    """Axes that an interpolation left as they were: one before and after it where units stand after it, else pinned.

    What comes out has the length that was asked for, which may be that of the inputs by chance, unless it must fit what is
    computed with it: all positions of a parameter.

    Args:
        axes: what the rules built.
        resized: labels before, labels after, and where.
    """
    left = list(resized)
    while left:
        moving = axes.clusters()
        fits = [axes.encloses(moving, moving[after]) for _, after, _ in left]
        for (before, after, _), fit in zip(left, fits, strict=True):
            if fit:
                axes.tie(before, after)
        if not any(fits):
            break
        left = [item for item, fit in zip(left, fits, strict=True) if not fit]
    for before, after, where in left:
        axes.where = where
        for labels in (before, after):
            axes.pin(labels, "spatial axis of a window operator")


def settle_unread(axes: Axes, unread: dict[str, np.ndarray]) -> None:
    """What is not read stays where it is, unless it moves with what is read, and a cut by the length of inputs is ruled out.

    (The last layer of a residual stream of which the output takes one half: the layers before read all of it.) What is
    read then is a number of units that some parameter has; where it is a number of tokens, longer inputs read more.

    Args:
        axes: what the rules built.
        unread: state-dict name -> which entries are not read; what moves with others is taken out.
    """
    cut = [f for f in axes.families if f.param in unread]
    still = {f.start: _unread_positions(f, unread[f.param or ""]) for f in cut}
    if not still:
        return
    gone = np.concatenate([start + np.flatnonzero(mask) for start, mask in still.items()])
    moving = axes.clusters()
    free = _accompanied(axes, moving, gone)
    for family in cut:
        lost = still[family.start]
        here = moving[family.start : family.start + family.size]
        if not lost.all() and free[here[lost]].any() and not axes.encloses(moving, here[~lost], still):
            free[here[lost]] = False
    led = gone[free[moving[gone]]]
    axes.where = ""
    axes.pin(np.setdiff1d(gone, led), "not read with these inputs")
    for family in (axes.families[k] for k in np.unique(axes.family_of[led])):
        mine = led[(led >= family.start) & (led < family.start + family.size)]
        axes.mark(mine, np.zeros(mine.size, np.int64))
        mask = unread.get(family.param or "")
        if mask is not None and not family.by and not mask.all():
            np.moveaxis(mask, family.axis, 0)[mine - family.start] = False
            if not mask.any():
                del unread[family.param or ""]


def _accompanied(axes: Axes, moving: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Which clusters hold a position of a parameter that is read."""
    read = np.array([f.param is not None for f in axes.families])[axes.family_of[: axes.count]]
    read[gone] = False
    free = np.zeros(axes.count, bool)
    free[moving[read]] = True
    return free


def _unread_positions(family: Family, missing: np.ndarray) -> np.ndarray:
    """For every vertex of a parameter's family, whether nothing it stands for is read."""
    counts = family.shape[:-1]
    out = np.empty((*counts, family.shape[-1]), bool)
    for classes in np.ndindex(*counts):
        part = missing
        for (axis, numbers), c in zip(family.by, classes, strict=True):
            part = part.take(np.flatnonzero(numbers == c), axis=axis)
        out[classes] = part.all(axis=tuple(k for k in range(part.ndim) if k != family.axis))
    return out.reshape(-1)
