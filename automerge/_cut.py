"""How one parameter falls into blocks: regions, coordinates, orbits, segments. See `automerge.blocks`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from automerge._tree import Path, Structure
from automerge.symmetry import Slot

Slots = list[tuple[int, Slot]]
Strand = tuple[int, int]  # a role, and which unit of a position: the second of a pair is strand 1


class OddError(Exception):
    """Some generators do not make a grid; they must be left out."""

    def __init__(self, generators: set[int]) -> None:
        super().__init__(f"generators {sorted(generators)} make no grid of positions")
        self.generators = generators


@dataclass(frozen=True, eq=False)
class RawBlock:
    """A block with its spaces still named by their roles (None: pinned)."""

    param: str
    axes: tuple[Path | None, ...]
    shape: tuple[int, ...]
    index: tuple[np.ndarray, ...]
    mask: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Segment:
    """Positions of one axis with the same roles.

    Attributes:
        spaces: the roles acting there, one tuple per tree.
        table: positions, ``(coordinates, rest)``.
        depends: conditioning axis -> which of its ranges belong to each coordinate, bool, ``(coordinates, ranges)``.
    """

    spaces: tuple[Path, ...]
    table: np.ndarray
    depends: dict[int, np.ndarray]

    @property
    def roles(self) -> Path:
        return tuple(r for s in self.spaces for r in s)


def cut(structure: Structure, param: str, shape: tuple[int, ...], slots: Slots) -> list[RawBlock]:
    """All blocks of one parameter that have a moving axis.

    Raises:
        OddError: if the positions of some generators make no grid.
    """
    grid = _Positions(structure, shape, slots)
    out = []
    for regions in grid.classes():
        segments = [grid.segments(axis, regions) for axis in range(len(shape))]
        for parts in itertools.product(*segments):
            if any(part.spaces for part in parts):
                out.append(_block(structure, param, parts))
    return out


class _Positions:
    """A node for each (region, axis, position), its coordinates, and the orbits of the group on the nodes."""

    def __init__(self, structure: Structure, shape: tuple[int, ...], slots: Slots) -> None:
        self.structure, self.shape, self.slots = structure, shape, slots
        self.where = {
            m.generator: (r, p, m.labels) for r, role in enumerate(structure.roles) for p, m in role.members.items()
        }
        self.offset = np.concatenate([[0], np.cumsum(shape)]).astype(np.int64)
        self._cut_regions()
        strands = _strands(slots)
        used = {(self.where[i][0], k) for (i, _), k in zip(slots, strands, strict=True)}
        used |= {(a, k) for r, k in used for a in structure.roles[r].path}
        self.roles = sorted(used, key=lambda s: (structure.root_of(s[0]), s[1], s[0]))
        self.coords = {s: np.full(self.n_regions * self.length, -1) for s in self.roles}
        self._edges: list[tuple[np.ndarray, np.ndarray]] = []
        self._region_edges: set[tuple[int, int]] = set()
        for (number, slot), strand in zip(slots, strands, strict=True):
            self._place(number, slot, strand)
        self.orbit = self._join()

    @property
    def length(self) -> int:
        return int(self.offset[-1])

    def _cut_regions(self) -> None:
        marks: dict[int, set[int]] = {}
        for _, slot in self.slots:
            for axis, start, stop in slot.within:
                marks.setdefault(axis, {0, self.shape[axis]}).update((start, stop))
        self.starts = {axis: np.array(sorted(m)) for axis, m in sorted(marks.items())}
        self.range_of = {
            a: np.searchsorted(s, np.arange(self.shape[a]), side="right") - 1 for a, s in self.starts.items()
        }
        counts = tuple(s.size - 1 for s in self.starts.values())
        self.n_regions = int(np.prod(counts)) if counts else 1
        at = np.indices(counts).reshape(len(counts), -1) if counts else np.zeros((0, 1), int)
        self.region = dict(zip(self.starts, at, strict=True))
        strides = [int(np.prod(counts[i + 1 :])) for i in range(len(counts))]
        self.stride = dict(zip(self.starts, strides, strict=True))

    def _place(self, number: int, slot: Slot, strand: int) -> None:
        """Write a slot's coordinates to its nodes, and join what its generator swaps."""
        inside = np.ones(self.n_regions, bool)
        for axis, start, stop in slot.within:
            starts = self.starts[axis]
            at = self.region[axis]
            inside &= (starts[at] >= start) & (starts[at + 1] <= stop)
        base = np.flatnonzero(inside)
        shift = np.zeros_like(slot.index)
        if slot.axis in self.stride:
            base = np.unique(base - self.stride[slot.axis] * self.region[slot.axis][base])
            shift = self.stride[slot.axis] * self.range_of[slot.axis][slot.index]
        regions = base[:, None, None] + shift[None]
        nodes = regions * self.length + self.offset[slot.axis] + slot.index[None]
        role, path, labels = self.where[number]
        self._write((role, strand), nodes, labels[None, :, None], number)
        for ancestor, unit in zip(self.structure.roles[role].path, path, strict=True):
            self._write((ancestor, strand), nodes, np.full((1, 1, 1), unit), number)
        self._edges.append((np.broadcast_to(nodes[:, :1], nodes.shape).reshape(-1), nodes.reshape(-1)))
        if slot.axis in self.stride:
            pairs = np.stack([np.broadcast_to(regions[:, :1], regions.shape).reshape(-1), regions.reshape(-1)])
            for a, b in np.unique(pairs, axis=1).T:
                if a != b:
                    self._region_edges.add((int(a), int(b)))
                    other = np.delete(
                        np.arange(self.length), np.s_[self.offset[slot.axis] : self.offset[slot.axis + 1]]
                    )
                    self._edges.append((a * self.length + other, b * self.length + other))

    def _write(self, role: Strand, nodes: np.ndarray, value: np.ndarray, number: int) -> None:
        now = self.coords[role][nodes]
        if ((now >= 0) & (now != value)).any():
            raise OddError({number})
        self.coords[role][nodes] = value

    def _join(self) -> np.ndarray:
        a = np.concatenate([e[0] for e in self._edges])
        b = np.concatenate([e[1] for e in self._edges])
        n = self.n_regions * self.length
        graph = coo_array((np.ones(a.size, np.int8), (a, b)), shape=(n, n))
        labels: np.ndarray = connected_components(graph, directed=False)[1]
        return labels

    def classes(self) -> list[np.ndarray]:
        """Sets of regions that the group swaps."""
        edges = np.array(sorted(self._region_edges), dtype=int).reshape(-1, 2).T
        graph = coo_array((np.ones(edges.shape[1], np.int8), (edges[0], edges[1])), shape=(self.n_regions,) * 2)
        count, label = connected_components(graph, directed=False)
        return [np.flatnonzero(label == c) for c in range(count)]

    # ---------------------------------------------------------------- segments
    def segments(self, axis: int, regions: np.ndarray) -> list[Segment]:
        """The segments of one axis in a class of regions."""
        region = np.repeat(regions, self.shape[axis])
        position = np.tile(np.arange(self.shape[axis]), regions.size)
        if axis in self.region:
            keep = self.range_of[axis][position] == self.region[axis][region]
            region, position = region[keep], position[keep]
        nodes = region * self.length + self.offset[axis] + position
        signature = np.zeros((len(self.roles), nodes.size), bool)
        for k, r in enumerate(self.roles):
            signature[k] = self.coords[r][nodes] >= 0
        kinds, kind = np.unique(signature, axis=1, return_inverse=True)
        out = []
        for number in range(kinds.shape[1]):
            at = kind.reshape(-1) == number
            roles = tuple(r for k, r in enumerate(self.roles) if kinds[k, number])
            out += self._grids(axis, roles, nodes[at], region[at], position[at], regions)
        return out

    def _grids(
        self,
        axis: int,
        roles: tuple[Strand, ...],
        nodes: np.ndarray,
        region: np.ndarray,
        position: np.ndarray,
        regions: np.ndarray,
    ) -> list[Segment]:
        shape = self.structure.grid(r for r, _ in roles)
        size = int(np.prod(shape))
        flat = (
            np.ravel_multi_index(tuple(self.coords[r][nodes] for r in roles), shape) if roles else np.zeros_like(nodes)
        )
        orbit = np.unique(self.orbit[nodes], return_inverse=True)[1].reshape(-1)
        table = np.full((size, int(orbit.max()) + 1), -1)
        table[flat, orbit] = position
        if (table < 0).any() or not np.array_equal(table[flat, orbit], position):
            raise OddError(self._blame(axis, roles))
        depends = {}
        for a, ranges in self.region.items():
            depends[a] = self._dependence(ranges[region], flat, orbit, table.shape, np.unique(ranges[regions]).size)
        apart = itertools.groupby(roles, key=lambda s: (self.structure.root_of(s[0]), s[1]))
        spaces = tuple(tuple(r for r, _ in group) for _, group in apart)
        return _uniform(Segment(spaces, table, {}), depends)

    @staticmethod
    def _dependence(
        at: np.ndarray, flat: np.ndarray, orbit: np.ndarray, shape: tuple[int, ...], count: int
    ) -> np.ndarray:
        """For each (coordinate, orbit) the ranges that it occurs in; all of them where it does not depend on the range."""
        seen = np.zeros((*shape, int(at.max()) + 1), bool)
        seen[flat, orbit, at] = True
        seen[seen.sum(axis=2) == count] = True
        return seen

    def _blame(self, axis: int, roles: tuple[Strand, ...]) -> set[int]:
        """The generators to leave out: the deepest that act on the axis."""
        acting = {r for r, _ in roles}
        here = [i for i, s in self.slots if s.axis == axis and self.where[i][0] in acting]
        here = here or [i for i, _ in self.slots]
        depth = {i: len(self.where[i][1]) for i in here}
        return {i for i in here if depth[i] == max(depth.values())}


def _strands(slots: Slots) -> list[int]:
    """For each slot how many earlier ones of its generator own some of its positions: pairs of units own an outer square."""
    out: list[int] = []
    for k, (number, slot) in enumerate(slots):
        earlier = [s for i, s in slots[:k] if (i, s.axis, s.within) == (number, slot.axis, slot.within)]
        out.append(sum(bool(np.isin(slot.index, s.index).any()) for s in earlier))
    return out


def _uniform(segment: Segment, depends: dict[int, np.ndarray]) -> list[Segment]:
    """Split the rest where the dependence on regions differs, so that it is a matter of coordinates alone."""
    if not depends:
        return [segment]
    rows = [d.transpose(0, 2, 1).reshape(-1, d.shape[1]) for d in depends.values()]
    kinds, kind = np.unique(np.concatenate(rows), axis=1, return_inverse=True)
    out = []
    for number in range(kinds.shape[1]):
        at = np.flatnonzero(kind.reshape(-1) == number)
        used = {a: d[:, at[0]] for a, d in depends.items() if not d[:, at[0]].all()}
        out.append(Segment(segment.spaces, segment.table[:, at], used))
    return out


# -------------------------------------------------------------------- blocks
def _block(structure: Structure, param: str, parts: tuple[Segment, ...]) -> RawBlock:
    """One block from one segment per axis; axes that share an outer coordinate are merged or masked."""
    rides: dict[int, tuple[int, np.ndarray]] = {}
    masks: list[tuple[int, int, np.ndarray]] = []
    for a in sorted({a for part in parts for a in part.depends}):
        tied = [k for k, part in enumerate(parts) if a in part.depends]
        main = max(tied, key=lambda k: len(parts[k].roles))
        for k in tied:
            if k == main or k in rides:
                continue
            onto = _projection(structure, parts[main], parts[k], a) if main not in rides else None
            if onto is not None:
                rides[k] = (main, onto)
            else:
                meet = parts[main].depends[a].astype(np.int64) @ parts[k].depends[a].T.astype(np.int64)
                masks.append((main, k, meet > 0))
    return _lay_out(structure, param, parts, rides, masks)


def _projection(structure: Structure, main: Segment, part: Segment, axis: int) -> np.ndarray | None:
    """``main`` coordinate -> the coordinate of ``part`` that shares its range, if that is determined; else None."""
    dep = part.depends[axis]
    if not set(part.roles) <= set(main.roles) or len(np.unique(dep, axis=0)) != len(dep):
        return None
    if len(set(main.roles)) < len(main.roles):
        return None
    at = np.indices(structure.grid(main.roles)).reshape(len(main.roles), -1)
    mine = [at[main.roles.index(r)] for r in part.roles]
    flat = np.ravel_multi_index(tuple(mine), structure.grid(part.roles)) if mine else np.zeros(at.shape[1], int)
    return flat if np.array_equal(dep[flat], main.depends[axis]) else None


def _lay_out(
    structure: Structure,
    param: str,
    parts: tuple[Segment, ...],
    rides: dict[int, tuple[int, np.ndarray]],
    masks: list[tuple[int, int, np.ndarray]],
) -> RawBlock:
    axes: list[Path | None] = []
    shape: list[int] = []
    grid_dims: dict[int, list[int]] = {}
    rest_dim: dict[int, int] = {}
    for k, part in enumerate(parts):
        if k not in rides:
            grid_dims[k] = list(range(len(axes), len(axes) + len(part.spaces)))
            axes += part.spaces
            shape += [int(np.prod(structure.grid(s))) for s in part.spaces]
        if part.table.shape[1] > 1 or not (part.spaces or k in rides):
            rest_dim[k] = len(axes)
            axes.append(None)
            shape.append(part.table.shape[1])

    def spread(array: np.ndarray, dims: list[int]) -> np.ndarray:
        view = [1] * len(axes)
        for d in dims:
            view[d] = shape[d]
        order = np.argsort(dims)
        return array.reshape([shape[d] for d in dims]).transpose(order).reshape(view)

    index = []
    for k, part in enumerate(parts):
        main, flat = rides.get(k, (k, np.arange(part.table.shape[0])))
        index.append(
            np.ascontiguousarray(spread(part.table[flat], grid_dims[main] + ([rest_dim[k]] if k in rest_dim else [])))
        )
    mask = None
    for main, k, both in masks:
        one = spread(both, grid_dims[rides[main][0] if main in rides else main] + grid_dims[k])
        mask = one if mask is None else mask & one
    return RawBlock(param, tuple(axes), tuple(shape), tuple(index), mask)
