"""The nested groups behind the flat generators: trees of roles.

A generator is *nested* in a unit of another when everything that it moves lies inside that unit. The inner generators
of different outer units that the outer permutation swaps onto each other are the *members* of one *role*; a role
without a parent is the root of a *tree*. The group of a tree is an iterated wreath product. An element of it is one array for
each role, of shape ``(*sizes of the ancestors, size)``: at the new position ``(u, a, ...)`` it says where the last
coordinate comes from, so that ``new[u, a] = old[p[u], q[u, a]]``.

A set of roles that is closed under taking parents is a *space*: the grid of their coordinates, on which the group acts
by permutations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from automerge.groups import Element
from automerge.symmetry import Generator, Slot, Symmetry

Path = tuple[int, ...]
Perms = dict[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class Member:
    """One generator of a role: its number, and its own unit -> the role's unit that corresponds to it."""

    generator: int
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Role:
    """Corresponding generators, one for each combination of units of the ancestors.

    Attributes:
        size: the number of units of each.
        path: numbers of the ancestor roles, root first; every ancestor has a smaller number than its descendants.
        members: coordinates along ``path`` -> the generator that sits there.
    """

    size: int
    path: Path
    members: Mapping[Path, Member]

    @property
    def parent(self) -> int | None:
        """The number of the enclosing role."""
        return self.path[-1] if self.path else None


@dataclass(frozen=True, eq=False)
class Structure:
    """All roles of a symmetry, and the generators left out because they fit no tree (size below 2, partial nesting)."""

    roles: tuple[Role, ...]
    dropped: frozenset[int]

    @property
    def roots(self) -> tuple[int, ...]:
        """The numbers of the roles without a parent: one for each tree."""
        return tuple(r for r, role in enumerate(self.roles) if not role.path)

    def root_of(self, role: int) -> int:
        """The tree of a role, named by its root."""
        path = self.roles[role].path
        return path[0] if path else role

    def descendants(self, root: int) -> tuple[int, ...]:
        """The roles of a tree, root first."""
        return tuple(r for r in range(len(self.roles)) if self.root_of(r) == root)

    def path_shape(self, role: int) -> tuple[int, ...]:
        """The sizes of a role's ancestors."""
        return tuple(self.roles[r].size for r in self.roles[role].path)

    def grid(self, roles: Iterable[int]) -> tuple[int, ...]:
        """The sizes of some roles."""
        return tuple(self.roles[r].size for r in roles)

    def identity(self, root: int) -> Perms:
        """The identity of one tree."""
        return {r: self._identity_of(r) for r in self.descendants(root)}

    def random(self, root: int, rng: np.random.Generator) -> Perms:
        """A uniformly random element of one tree."""
        return {r: rng.permuted(self._identity_of(r), axis=-1) for r in self.descendants(root)}

    def _identity_of(self, role: int) -> np.ndarray:
        shape = (*self.path_shape(role), self.roles[role].size)
        return np.broadcast_to(np.arange(shape[-1]), shape).copy()

    def induced(self, perms: Mapping[int, np.ndarray], roles: Sequence[int]) -> np.ndarray:
        """The permutation of a space that an element induces: ``new = old[induced]``, int64, flat.

        Args:
            perms: the element; roles that it does not name stay.
            roles: the space, ancestors before descendants.
        """
        return induced(self, perms, roles, ())

    def element(self, symmetry: Symmetry, perms: Mapping[int, np.ndarray]) -> Element:
        """The `Element` of a symmetry for the elements of all its trees together (roles not named stay).

        Inner generators move first, whatever their order in the symmetry.
        """
        stacked = symmetry.stacked
        generators = stacked.generators()
        out = stacked.identity()
        for depth in sorted({len(self.roles[r].path) for r in perms}, reverse=True):
            flat = [np.arange(g.size) for g in generators]
            for r in perms:
                if len(self.roles[r].path) == depth:
                    self._fill(flat, r, perms)
            out = out.then(stacked.element(flat))
        return symmetry.apart(out)

    def _fill(self, flat: list[np.ndarray], r: int, perms: Mapping[int, np.ndarray]) -> None:
        """Write role r's permutations to the generators that stand where the ancestors' permutations come from."""
        role = self.roles[r]
        for path in np.ndindex(*self.path_shape(r)):
            old = tuple(int(perms[a][path[: k + 1]]) if a in perms else path[k] for k, a in enumerate(role.path))
            member = role.members[old]
            own = np.argsort(member.labels)
            flat[member.generator] = own[perms[r][path][member.labels]]


def induced(
    structure: Structure, perms: Mapping[int, np.ndarray], roles: Sequence[int], outer: Sequence[int]
) -> np.ndarray:
    """`Structure.induced` for elements relative to fixed ancestors ``outer`` that the arrays do not index."""
    shape = structure.grid(roles)
    new = dict(zip(roles, np.indices(shape), strict=True))
    old = []
    for r in roles:
        if r in perms:
            at = tuple(new[a] for a in structure.roles[r].path if a not in outer)
            old.append(perms[r][(*at, new[r])])
        else:
            old.append(new[r])
    return np.ravel_multi_index(tuple(old), shape).reshape(-1).astype(np.int64)


# -------------------------------------------------------------------- derivation
def derive(generators: Sequence[Generator], ignore: Iterable[int] = ()) -> Structure:
    """The trees of some generators.

    A generator that fits no tree (nested in two units that are not nested in each other, or without a counterpart in
    another outer unit) is left out: what remains is a subgroup, hence sound. Of the two units and what is nested in both,
    what permutes less is left out: a grid of experts with hidden units of their own keeps these.

    Args:
        generators: the flat normal form.
        ignore: numbers of generators to leave out from the start.
    """
    dropped = set(ignore) | {i for i, g in enumerate(generators) if g.size < 2 or not g.slots}
    while True:
        builder = _Builder(generators, dropped)
        roles = builder.build()
        if not builder.odd:
            return Structure(tuple(roles), frozenset(dropped))
        dropped |= builder.odd


def crossing(generators: Sequence[Generator]) -> list[tuple[int, int]]:
    """Pairs of generators whose units overlap without being nested, and share what is in both; first the one left out.

    Args:
        generators: the flat normal form.
    """
    builder = _Builder(generators, {i for i, g in enumerate(generators) if g.size < 2 or not g.slots})
    out = []
    for pair in builder.crossed:
        first, second = sorted(pair, key=lambda g: g not in builder.odd)
        if first in builder.odd and second not in builder.odd:
            out.append((first, second))
    return out


_Draft = dict[Path, Member]


class _Builder:
    """One attempt at the trees; generators that do not fit are collected in ``odd``."""

    def __init__(self, generators: Sequence[Generator], dropped: set[int]) -> None:
        self.generators = generators
        self.odd: set[int] = set()
        self.alive = [i for i in range(len(generators)) if i not in dropped]
        self.containers = _containers(generators, self.alive)
        self.kids: dict[int, dict[int, list[int]]] = {}
        self.top: list[int] = []
        self.crossed: dict[Path, list[int]] = {}  # two that are not nested -> what is nested in both
        for t in self.alive:
            self._place(t)
        for outer, inner in self.crossed.items():
            least = min(outer, key=self._order)
            self.odd |= {least} if self._order(least) < sum(map(self._order, inner)) else set(inner)

    def _order(self, t: int) -> float:
        """The logarithm of the number of permutations of a generator."""
        return math.lgamma(self.generators[t].size + 1)

    def _place(self, t: int) -> None:
        around = self.containers[t]
        if not around:
            self.top.append(t)
            return
        s = max(around, key=lambda i: len(self.containers[i]))
        apart = set(around) - set(self.containers[s]) - {s}
        if apart:
            self.crossed.setdefault((s, min(apart)), []).append(t)
            return
        self.kids.setdefault(s, {}).setdefault(around[s], []).append(t)

    def build(self) -> list[Role]:
        roles: list[Role] = []
        for g in self.top if not self.odd else ():
            base = len(roles)
            for path, draft in self._subtree(g):
                size = self.generators[next(iter(draft.values())).generator].size
                roles.append(Role(size, tuple(p + base for p in path), draft))
        return roles

    def _subtree(self, g: int) -> list[tuple[Path, _Draft]]:
        """The roles of g and of everything in it, as (ancestors in local numbers, members), g first."""
        out: list[tuple[Path, _Draft]] = [((), {(): Member(g, np.arange(self.generators[g].size))})]
        inner = [roles for kid in self.kids.get(g, {}).get(0, []) for roles in [self._subtree(kid)]]
        images = [self._images(g, u) for u in range(1, self.generators[g].size)]
        found: list[set[int]] = [set() for _ in images]
        for roles in inner:
            base = len(out)
            for path, draft in roles:
                members = {(0, *at): member for at, member in draft.items()}
                for u, (image, seen) in enumerate(zip(images, found, strict=True), start=1):
                    members.update(self._carry(g, u, draft, image, seen))
                out.append(((0, *(p + base for p in path)), members))
        for image, seen in zip(images, found, strict=True):
            self.odd |= set(image.values()) - seen
        return out

    def _images(self, g: int, u: int) -> dict[frozenset[tuple[object, ...]], int]:
        """Every generator inside unit u, by what it covers."""
        todo = list(self.kids.get(g, {}).get(u, []))
        out = {}
        while todo:
            t = todo.pop()
            out[_cover(self.generators[t].slots)] = t
            todo += [k for kids in self.kids.get(t, {}).values() for k in kids]
        return out

    def _carry(
        self, g: int, u: int, draft: _Draft, images: Mapping[frozenset[tuple[object, ...]], int], seen: set[int]
    ) -> _Draft:
        """The members in unit u that correspond to those of unit 0."""
        out: _Draft = {}
        for at, member in draft.items():
            slots = _moved(self.generators[g], 0, u, self.generators[member.generator])
            t = None if slots is None else images.get(_cover(slots))
            own = None if t is None or slots is None else _align(slots, self.generators[t])
            if t is None or own is None:
                self.odd.add(member.generator)
                continue
            seen.add(t)
            labels = np.empty_like(member.labels)
            labels[own] = member.labels
            out[(u, *at)] = Member(t, labels)
        return out


def _containers(generators: Sequence[Generator], alive: Sequence[int]) -> dict[int, dict[int, int]]:
    """For each generator, those that contain it in one of their units: ``{t: {s: unit}}``."""
    by_param: dict[str, set[int]] = {}
    for i in alive:
        for slot in generators[i].slots:
            by_param.setdefault(slot.param, set()).add(i)
    lookup: dict[tuple[int, int], np.ndarray] = {}
    out: dict[int, dict[int, int]] = {}
    for t in alive:
        out[t] = {}
        for s in sorted(by_param[generators[t].slots[0].param] - {t}):
            unit = _unit_around(generators[t], generators[s], lookup, s)
            if unit is not None:
                out[t][s] = unit
    return out


def _unit_around(t: Generator, s: Generator, lookup: dict[tuple[int, int], np.ndarray], number: int) -> int | None:
    """The unit of s that contains all that t moves, or None."""
    unit: int | None = None
    for slot in t.slots:
        found = None
        for k, around in enumerate(s.slots):
            if around.param == slot.param:
                if (number, k) not in lookup:
                    lookup[number, k] = _unit_of(around)
                found = _slot_in(slot, around, lookup[number, k])
                if found is not None:
                    break
        if found is None or (unit is not None and found != unit):
            return None
        unit = found
    return unit


def _unit_of(slot: Slot) -> np.ndarray:
    out = np.full(int(slot.index.max()) + 1, -1)
    out[slot.index] = np.arange(slot.index.shape[0])[:, None]
    return out


def _slot_in(slot: Slot, around: Slot, unit_of: np.ndarray) -> int | None:
    """The unit of ``around`` that contains every position of ``slot``, or None."""
    spans = {axis: (start, stop) for axis, start, stop in slot.within}
    for axis, start, stop in around.within:
        if axis == slot.axis:
            inside = bool(slot.index.min() >= start and slot.index.max() < stop)
        else:
            inside = axis in spans and spans[axis][0] >= start and spans[axis][1] <= stop
        if not inside:
            return None
    if around.axis == slot.axis:
        positions = slot.index.reshape(-1)
    elif around.axis in spans:
        positions = np.arange(*spans[around.axis])
    else:
        return None
    if positions.max() >= unit_of.size:
        return None
    units = unit_of[positions]
    return int(units[0]) if units[0] >= 0 and bool((units == units[0]).all()) else None


def _cover(slots: Iterable[Slot]) -> frozenset[tuple[object, ...]]:
    """What a generator covers, as a key: its positions on every axis, whatever their order."""
    return frozenset((s.param, s.axis, tuple(sorted(s.within)), np.sort(s.index, axis=None).tobytes()) for s in slots)


def _moved(outer: Generator, u: int, to: int, inner: Generator) -> list[Slot] | None:
    """The slots of ``inner`` (inside unit u) after the outer units u and ``to`` are swapped; None if torn apart."""
    out = []
    for slot in inner.slots:
        index: np.ndarray = slot.index
        within = []
        line = _line(outer, (slot.param, slot.axis), u, to, int(index.max()) + 1)
        if line is not None:
            index = line[index]
            if (index < 0).any():
                return None
        for axis, start, stop in slot.within:
            line = _line(outer, (slot.param, axis), u, to, stop)
            back = _line(outer, (slot.param, axis), to, u, stop)
            span = np.arange(start, stop)
            if line is not None and back is not None:  # a range that holds both units stays
                line, back = line[start:stop], back[start:stop]
                span = np.sort(np.where(line >= 0, line, np.where(back >= 0, back, span)))
            if span[-1] - span[0] != span.size - 1:
                return None
            within.append((axis, int(span[0]), int(span[-1]) + 1))
        out.append(Slot(slot.param, slot.axis, index, tuple(within)))
    return out


def _line(outer: Generator, where: tuple[str, int], u: int, to: int, length: int) -> np.ndarray | None:
    """Position in unit u -> corresponding position in unit ``to`` (-1 outside u); None if the axis is not moved."""
    slots = [s for s in outer.slots if (s.param, s.axis) == where]
    if not slots:
        return None
    line = np.full(max(length, *(int(s.index.max()) + 1 for s in slots)), -1)
    for slot in slots:
        line[slot.index[u]] = slot.index[to]
    return line


def _align(slots: Sequence[Slot], target: Generator) -> np.ndarray | None:
    """For each unit of the moved slots the target's unit on the same positions, or None if the units differ."""
    own: np.ndarray | None = None
    for slot in slots:
        key = _cover([slot])
        unit_of = next(_unit_of(s) for s in target.slots if _cover([s]) == key)
        units = unit_of[slot.index]
        if slot.index.shape[0] != target.size or (units != units[:, :1]).any():
            return None
        if own is None:
            own = units[:, 0]
        if not np.array_equal(own, units[:, 0]):
            return None
    return own
