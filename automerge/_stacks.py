"""Interchangeable modules as positions of one axis: their parameters stacked.

An exchange of modules permutes whole parameters. Where those that it permutes are stacked along a new first axis, it is a
generator like any other, on that axis; units inside a module are confined to its position by ``within``. What works on
generators (blocks, trees of nested groups, matchers) sees this form; state dicts keep their own names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import numpy as np
import torch

from automerge._errors import SymmetryError
from automerge._generators import Exchange, Generator, Slot
from automerge.groups import Element, IndexArrays, axis_index, identity_index


@dataclass(frozen=True)
class Stacks:
    """Which parameters are stacked.

    Attributes:
        names: name of a stack -> the state-dict names along its first axis.
        shapes: of the stacks, and of the parameters that are in none.
        parts: the shapes of all parameters.
    """

    names: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, tuple[int, ...]]

    @property
    def place(self) -> dict[str, tuple[str, int]]:
        """State-dict name -> its stack, and where it is along the first axis."""
        return {n: (stack, i) for stack, names in self.names.items() for i, n in enumerate(names)}

    # ---------------------------------------------------------------- generators
    def sets(self, sets: Iterable[Generator], exchanges: Iterable[Exchange]) -> tuple[Generator, ...]:
        """All generators on the stacks: those of parameters first, then the exchanges."""
        place = self.place
        out = [Generator(g.size, self._within(g.slots), g.name) for g in sets]
        for e in exchanges:
            found: dict[str, list[list[int]]] = {}
            for column in zip(*e.params, strict=True):
                rows = found.setdefault(place[column[0]][0], [[] for _ in column])
                for row, name in zip(rows, column, strict=True):
                    row.append(place[name][1])
            whole = [Slot(stack, 0, np.array(rows, np.int64)) for stack, rows in found.items()]
            out.append(Generator(e.size, (*whole, *self._within(e.slots)), e.name))
        return tuple(out)

    def _within(self, slots: Iterable[Slot]) -> tuple[Slot, ...]:
        """Slots of parameters as slots of stacks: one for the same slot of parameters side by side."""
        place = self.place
        found: dict[Any, tuple[Slot, list[int]]] = {}
        for number, slot in enumerate(slots):
            if slot.param in place:
                stack, at = place[slot.param]
                found.setdefault((stack, slot.axis, slot.index.tobytes(), slot.within), (slot, []))[1].append(at)
            else:
                found[number] = (slot, [])
        out = [slot for slot, places in found.values() if not places]
        for slot, places in ((slot, places) for slot, places in found.values() if places):
            inner = tuple((a + 1, b, c) for a, b, c in slot.within)
            for start, stop in stretches(np.sort(places)):
                stack = place[slot.param][0]
                outer = () if stop - start == self.shapes[stack][0] else ((0, start, stop),)
                out.append(Slot(stack, slot.axis + 1, slot.index, (*outer, *inner)))
        return tuple(out)

    # ---------------------------------------------------------------- elements
    def apart(self, element: Element) -> Element:
        """An element on the stacks as one on the parameters.

        Raises:
            SymmetryError: if it moves parts of a parameter to another one.
        """
        maps: dict[str, IndexArrays] = {}
        sources: dict[str, str] = {}
        for name, index in element.maps.items():
            if name not in self.names:
                maps[name] = index
                continue
            first = index[0].reshape(index[0].shape[0], -1)
            if (first != first[:, :1]).any():
                raise SymmetryError(f"an element moves parts of the parameters {', '.join(self.names[name][:3])}, ...")
            for i, part in enumerate(self.names[name]):
                source = self.names[name][int(first[i, 0])]
                own = tuple(np.ascontiguousarray(a[i if a.shape[0] > 1 else 0]) for a in index[1:])
                if source != part:
                    sources[part] = source
                if source != part or any((a != axis_index(self.parts[part], k)).any() for k, a in enumerate(own)):
                    maps[part] = own
        return Element(self.parts, maps, sources)

    def together(self, element: Element) -> Element:
        """An element on the parameters as one on the stacks."""
        maps: dict[str, IndexArrays] = {n: m for n, m in element.maps.items() if n not in self.place}
        for stack, names in self.names.items():
            if not any(n in element.maps or n in element.sources for n in names):
                continue
            shape = self.shapes[stack]
            first = np.array([names.index(element.sources.get(n, n)) for n in names]).reshape(
                (-1,) + (1,) * (len(shape) - 1)
            )
            own = [element.maps.get(n) or identity_index(shape[1:]) for n in names]
            rest = (np.stack(np.broadcast_arrays(*column)) for column in zip(*own, strict=True))
            maps[stack] = (first, *rest)
        return Element(self.shapes, maps)

    def device(self, name: str, state: Mapping[str, torch.Tensor]) -> torch.device:
        """Where a stack, or a parameter that is in none, is in a state dict."""
        return state[self.names[name][0] if name in self.names else name].device

    def read(self, name: str, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A stack, or a parameter that is in none, from a state dict."""
        if name not in self.names:
            return state[name]
        return torch.stack([state[n] for n in self.names[name]])


def stacks_of(shapes: Mapping[str, tuple[int, ...]], exchanges: Sequence[Exchange]) -> Stacks:
    """The stacks that some exchanges need: parameters that are permuted with each other are in one."""
    graph = nx.Graph()
    for e in exchanges:
        for column in zip(*e.params, strict=True):
            nx.add_path(graph, column)
    order = {name: i for i, name in enumerate(shapes)}
    found = sorted(
        (sorted(c, key=order.__getitem__) for c in nx.connected_components(graph)), key=lambda c: order[c[0]]
    )
    names: dict[str, tuple[str, ...]] = {}
    for parts in found:
        names[stack_name(parts, {*shapes, *names})] = tuple(parts)
    inside = {n for parts in names.values() for n in parts}
    whole = {stack: (len(parts), *shapes[parts[0]]) for stack, parts in names.items()}
    return Stacks(names, {**{n: s for n, s in shapes.items() if n not in inside}, **whole}, shapes)


def stack_name(names: Sequence[str], taken: Iterable[str]) -> str:
    """A name for a stack: what its parameters' names have in common."""
    split = [n.split(".") for n in names]
    if len({len(s) for s in split}) == 1:
        name = ".".join(c[0] if len(set(c)) == 1 else "*" for c in zip(*split, strict=True))
    else:
        name = "|".join(names)
    return "|".join(names) if name in taken else name


def stretches(at: np.ndarray) -> list[tuple[int, int]]:
    """The stretches ``(start, stop)`` of consecutive positions; ``at`` is sorted.

    >>> stretches(np.array([0, 1, 4, 5, 6]))
    [(0, 2), (4, 7)]
    """
    breaks = np.flatnonzero(np.diff(at) > 1)
    starts = [int(at[0]), *(int(at[i + 1]) for i in breaks)]
    stops = [*(int(at[i]) + 1 for i in breaks), int(at[-1]) + 1]
    return list(zip(starts, stops, strict=True))


# -------------------------------------------------------------------- from inference
def taken_apart(
    generator: Generator, names: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> Generator | Exchange | None:
    """A generator on stacked parameters as one on the parameters, or as an exchange of modules.

    Args:
        generator: inferred from a graph in which parameters are stacked.
        names: stack -> the state-dict names along its leading axes.
        shapes: of the stacks.

    Returns:
        None if it exchanges parts of parameters with those of others.
    """
    slots: list[Slot] = []
    moving: dict[tuple[str, int, bytes, tuple[tuple[int, int, int], ...]], list[Slot]] = {}
    for slot in generator.slots:
        if slot.param not in names:
            slots.append(slot)
            continue
        lead = names[slot.param].ndim
        outer, inner = _divided(slot, lead)
        if slot.axis >= lead:
            parts = _there(names[slot.param], outer).reshape(-1)
            slots += [Slot(n, slot.axis - lead, slot.index, inner) for n in parts]
        else:
            moving.setdefault((slot.param, slot.axis, slot.index.tobytes(), outer), []).append(slot)
    if not moving:
        return Generator(generator.size, tuple(slots), generator.name)
    whole: list[list[str]] = [[] for _ in range(generator.size)]
    for (param, axis, _, outer), same in moving.items():
        lead = names[param].ndim
        # where a gate is half of an axis, the halves are slots of their own
        if not _fills([_divided(slot, lead)[1] for slot in same], shapes[param][lead:]):
            return None
        along = np.moveaxis(_there(names[param], outer), axis, 0)
        for row, index in zip(whole, same[0].index, strict=True):
            row += along[index].reshape(-1).tolist()
    if len({n for row in whole for n in row}) < sum(map(len, whole)):
        return None
    return Exchange(generator.size, tuple(tuple(row) for row in whole), tuple(slots), generator.name)


def aligned(
    generators: Sequence[Generator], names: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> list[Generator]:
    """Generators that exchange the same modules, each a part of them, as one that exchanges all of those parts.

    Branches of depthwise convolutions can be exchanged in every channel by itself. Whole parameters move where all
    channels do alike, which is one exchange after the other; those that share positions are left out.

    Args:
        generators: on stacked parameters, none of which moves whole parameters.
        names: stack -> the state-dict names along its leading axes.
        shapes: of all parameters.
    """
    found: dict[Any, tuple[Generator, list[Slot]]] = {}
    for generator in generators:
        if any(s.param in names and s.axis >= names[s.param].ndim for s in generator.slots):
            continue  # it also moves what is inside the modules that others move
        first = next(s for s in generator.slots if s.param in names and s.axis < names[s.param].ndim)
        order = np.argsort(first.index[:, 0], kind="stable")
        slots = [replace(s, index=s.index[order]) for s in generator.slots]
        moving = {
            (s.param, s.axis, s.index.tobytes(), _divided(s, names[s.param].ndim)[0])
            for s in slots
            if s.param in names and s.axis < names[s.param].ndim
        }
        found.setdefault((generator.size, frozenset(moving)), (generator, []))[1].extend(slots)
    return [replace(generator, slots=tuple(slots)) for generator, slots in found.values() if _disjoint(slots, shapes)]


def _disjoint(slots: Sequence[Slot], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether no two slots of one axis own a position of it at the same place of the other axes."""
    owned: dict[tuple[str, int], list[Slot]] = {}
    for slot in slots:
        owned.setdefault((slot.param, slot.axis), []).append(slot)
    for (param, axis), same in owned.items():
        axes = sorted({axis, *(a for slot in same for a, _, _ in slot.within)})
        count = np.zeros([shapes[param][a] for a in axes], np.int64)
        for slot in same:
            within = {a: np.arange(b, c) for a, b, c in slot.within} | {axis: slot.index.reshape(-1)}
            count[np.ix_(*(within.get(a, np.arange(shapes[param][a])) for a in axes))] += 1
        if count.max(initial=0) > 1:
            return False
    return True


def _divided(slot: Slot, lead: int) -> tuple[tuple[tuple[int, int, int], ...], tuple[tuple[int, int, int], ...]]:
    """What confines a slot of a stack: along the stack's leading axes, and inside its parameters."""
    outer = tuple(w for w in slot.within if w[0] < lead)
    return outer, tuple((a - lead, b, c) for a, b, c in slot.within if a >= lead)


def _there(names: np.ndarray, outer: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """The names of a stack that a slot is confined to."""
    here = [slice(None)] * names.ndim
    for axis, start, stop in outer:
        here[axis] = slice(start, stop)
    return names[tuple(here)]


def _fills(boxes: Sequence[Sequence[tuple[int, int, int]]], shape: tuple[int, ...]) -> bool:
    """Whether slices of a tensor are all of it."""
    axes = sorted({a for box in boxes for a, _, _ in box})
    filled = np.zeros([shape[a] for a in axes], bool)
    for box in boxes:
        within = {a: slice(b, c) for a, b, c in box}
        filled[tuple(within.get(a, slice(None)) for a in axes)] = True
    return bool(filled.all())


def joined(
    sets: Sequence[Generator],
    found: Sequence[Generator],
    shapes: Mapping[str, tuple[int, ...]],
    unused: Collection[str] = (),
) -> tuple[Generator, ...]:
    """Some generators, with those of others that say more than they do, and without those that say less than these.

    Args:
        sets: the generators.
        found: the others.
        shapes: of the parameters.
        unused: parameters of which the first ones know nothing, such as those of an expert that is not reached.
    """
    cut = _Cuts([*sets, *found], shapes)
    more = _beyond([cut(g) for g in sets], {g: cut(g) for g in found})
    left = [g for g in sets if not any(_inside_of(cut(g), cut(m), unused) for m in more)]
    moved_by = {key: m for m in found for key, _ in _columns(cut(m))}
    parts = [_parts(cut(g), moved_by, cut) for g in left]
    finer = dict.fromkeys(m for one in parts for m in one if m not in more)
    return (*(g for g, one in zip(left, parts, strict=True) if not one), *finer, *more)


class _Cuts:
    """Generators by slots that are comparable: confined to slices that no other slot of the same axis cuts again."""

    def __init__(self, generators: Sequence[Generator], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.at: dict[tuple[str, int], dict[int, set[int]]] = {}
        for slot in (s for g in generators for s in g.slots):
            for axis, start, stop in slot.within:
                self.at.setdefault((slot.param, slot.axis), {}).setdefault(axis, set()).update((start, stop))
        self._known: dict[int, tuple[Generator, list[Slot]]] = {}

    def __call__(self, generator: Generator) -> list[Slot]:
        if id(generator) not in self._known:
            self._known[id(generator)] = generator, [part for slot in generator.slots for part in self._pieces(slot)]
        return self._known[id(generator)][1]

    def _pieces(self, slot: Slot) -> list[Slot]:
        within = {a: (b, c) for a, b, c in slot.within}
        options: list[list[tuple[int, int, int]]] = []
        for axis, cuts in sorted(self.at.get((slot.param, slot.axis), {}).items()):
            start, stop = within.get(axis, (0, self.shapes[slot.param][axis]))
            ends = sorted({start, stop, *(c for c in cuts if start < c < stop)})
            options.append([(axis, b, c) for b, c in itertools.pairwise(ends)])
        return [replace(slot, within=piece) for piece in itertools.product(*options)]


def _columns(slots: Sequence[Slot]) -> Iterator[tuple[Hashable, np.ndarray]]:
    """The columns of a generator's tables, each with what tells which positions it exchanges."""
    for slot in slots:
        for column in slot.index.T:
            yield (slot.param, slot.axis, slot.within, np.sort(column).tobytes()), column


def _parts(
    whole: Sequence[Slot], moved_by: Mapping[Hashable, Generator], cut: Callable[[Generator], list[Slot]]
) -> list[Generator]:
    """The generators that move parts of what one moves, each by itself, if together they move all of it; else none.

    (The units of every expert, where these were found in one order for all experts.)
    """
    mine = dict(_columns(whole))
    parts = list(dict.fromkeys(moved_by[key] for key in mine if key in moved_by))
    count = sum(s.index.shape[1] for s in whole)
    if len(parts) < 2 or len(mine) != count or sum(s.index.shape[1] for g in parts for s in cut(g)) != count:
        return []
    for part in parts:
        if not all(key in mine for key, _ in _columns(cut(part))):
            return []
        # for every column of the part, which unit of the whole each of its units is
        units = [
            np.argsort(mine[key])[np.searchsorted(np.sort(mine[key]), column)] for key, column in _columns(cut(part))
        ]
        if any(not np.array_equal(own, units[0]) for own in units):
            return []
    return parts


def _inside_of(mine: Sequence[Slot], others: Sequence[Slot], unused: Collection[str]) -> bool:
    """Whether the units of a generator are some of those of another, which may also own positions of unused parameters."""
    units: np.ndarray | None = None
    slots = {(s.param, s.axis, s.within): s.index for s in others}
    if len(others) > len(slots) or len(mine) != sum(s.param not in unused for s in others):
        return False
    for slot in mine:
        rows = slots.get((slot.param, slot.axis, slot.within))
        if rows is None or rows.shape[1] != slot.index.shape[1]:
            return False
        number = {row.tobytes(): u for u, row in enumerate(np.sort(rows, 1))}
        own = np.array([number.get(row.tobytes(), -1) for row in np.sort(slot.index, 1)])
        if (own < 0).any() or (units is not None and not np.array_equal(own, units)):
            return False
        units = own
    return units is not None


def _beyond(sets: Sequence[Sequence[Slot]], found: Mapping[Generator, Sequence[Slot]]) -> list[Generator]:
    """Those of some generators that exchange positions which other generators do not reach from each other."""
    known: dict[tuple[str, int, tuple[tuple[int, int, int], ...]], nx.Graph] = {}
    for slot in (s for slots in sets for s in slots):
        graph = known.setdefault((slot.param, slot.axis, slot.within), nx.Graph())
        for column in slot.index.T:
            nx.add_path(graph, column.tolist())
    orbit = {key: {p: i for i, c in enumerate(nx.connected_components(g)) for p in c} for key, g in known.items()}

    def reached(slot: Slot) -> bool:
        own = orbit.get((slot.param, slot.axis, slot.within), {})
        return all(len({own.get(p, ("alone", p)) for p in column.tolist()}) == 1 for column in slot.index.T)

    return [g for g, slots in found.items() if g.size > 1 and not all(map(reached, slots))]
