"""From sets of vertices to generators over parameters, and from marks to reasons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from automerge._search import UnitSet
from automerge._stacks import stretches
from automerge._structure import Structure
from automerge.rules._axes import Axes, Family
from automerge.symmetry import Exchange, Generator, Pin, Slot

_UNUSED = "the output does not depend on it in the traced pass"


class Assembler:
    """Turns unit sets into generators over parameter axes.

    Args:
        axes: what the rules built.
        structure: its united vertices.
    """

    def __init__(self, axes: Axes, structure: Structure) -> None:
        self.axes = axes
        self.structure = structure
        self.members: dict[int, list[tuple[Family, np.ndarray]]] = {}
        for number, klass in enumerate(axes.classes):
            families = [axes.families[i] for i in axes.classes[klass] if axes.families[i].param is not None]
            self.members[klass] = [(f, structure.index[f.start : f.start + f.size]) for f in families]
            del number
        self.class_of_vertex = np.empty(structure.n, np.int64)
        self.local: dict[int, np.ndarray] = {}
        class_of = np.array(axes.class_of, np.int64)
        self.class_of_vertex[structure.index] = class_of[axes.family_of[: axes.count]]

    def wanted(self) -> np.ndarray:
        """Which united vertices stand for a position of a parameter."""
        mask = np.zeros(self.structure.n, bool)
        for members in self.members.values():
            for _, vertices in members:
                mask[vertices] = True
        return mask

    def generator(self, units: UnitSet) -> Generator | None:
        """The generator of one unit set; None if its action on some parameter is not a permutation of slices."""
        slots = self._squares(units)
        if slots is None:
            return None
        table = self.plain(units)
        by_class: dict[int, list[int]] = defaultdict(list)
        for column, vertex in enumerate(table[0].tolist()):
            by_class[int(self.class_of_vertex[vertex])].append(column)
        for klass, columns in by_class.items():
            for family, vertices in self.members[klass]:
                made = self._slots(family, vertices, table[:, columns])
                if made is None:
                    return None
                slots += made
        if not slots:
            return None
        slots.sort(key=lambda s: (self._order(s.param), s.axis, s.within))
        return Generator(table.shape[0], tuple(slots), f"{slots[0].param}[{slots[0].axis}]")

    # ------------------------------------------------------------ outer squares
    def plain(self, units: UnitSet) -> np.ndarray:
        """The columns of a unit set's table that are no diagonal of its pairs."""
        return np.delete(units.table, self._diagonals(units), axis=1) if units.pairs else units.table

    def _diagonals(self, units: UnitSet) -> list[int]:
        """For each array of pairs a column in the same axes: what a unit has with itself; fewer where those miss."""
        left = sorted(range(units.table.shape[1]), key=lambda c: int(units.table[0, c]))
        out: list[int] = []
        for pair in units.pairs:
            klass = self.class_of_vertex[pair[0, 1]]
            column = next((c for c in left if self.class_of_vertex[units.table[0, c]] == klass), None)
            if column is not None:
                left.remove(column)
                out.append(column)
        return out

    def _squares(self, units: UnitSet) -> list[Slot] | None:
        """The slots of pairs: one for the first unit of each, and one for the second; None if an axis holds no whole square."""
        diagonals = self._diagonals(units)
        if len(diagonals) < len(units.pairs):
            return None
        by_class: dict[int, list[np.ndarray]] = defaultdict(list)
        for pair, column in zip(units.pairs, diagonals, strict=True):
            whole = np.where(pair < 0, np.diag(units.table[:, column]), pair)
            by_class[int(self.class_of_vertex[pair[0, 1]])].append(whole)
        slots: list[Slot] = []
        for klass, squares in by_class.items():
            for family, vertices in self.members[klass]:
                places = [self._positions(vertices, square) for square in squares]
                if family.by:
                    lines = self._lines(family, places)
                    if lines is None:
                        return None
                    slots += lines
                else:
                    both = (np.concatenate(tables, axis=1) for tables in (places, [at.T for at in places]))
                    slots += [Slot(family.param or "", family.axis, index) for index in both]
        return slots

    @staticmethod
    def _lines(family: Family, places: Sequence[np.ndarray]) -> list[Slot] | None:
        """The slots of a split axis whose positions are the second units of pairs; the first ones are the classes.

        The axis that the classes are of has a slot of its own then, and one order in all of them is no split. None if it is
        otherwise.

        Args:
            family: of the split axis.
            places: positions in the family, ``(n, n)`` for each square.
        """
        found: dict[bytes, tuple[np.ndarray, list[np.ndarray]]] = {}
        for at in places:
            *classes, place = np.unravel_index(at, family.shape)
            if len(classes) != 1:
                return None
            line, rows = (place, classes[0]) if (place == place[:1]).all() else (place.T, classes[0].T)
            if (line != line[:1]).any() or (rows != rows[:, :1]).any():
                return None
            found.setdefault(line[0].tobytes(), (line[0], []))[1].append(rows[:, 0])
        ((axis, numbers),) = family.by
        slots = []
        for line, owned in found.values():
            inside = np.isin(numbers, np.concatenate(owned))
            windows = [()] if inside.all() else [((axis, a, b),) for a, b in stretches(np.flatnonzero(inside))]
            slots += [Slot(family.param or "", family.axis, line[:, None], within) for within in windows]
        return slots

    @staticmethod
    def _positions(vertices: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Where the vertices of a table stand among those of a family."""
        order = np.argsort(vertices)
        found: np.ndarray = order[np.searchsorted(vertices, table, sorter=order)]
        return found

    def _order(self, param: str) -> int:
        if not hasattr(self, "_rank"):
            names = dict.fromkeys(f.param for f in self.axes.families if f.param is not None)
            self._rank = {name: i for i, name in enumerate(names)}
        return self._rank[param]

    def _slots(self, family: Family, vertices: np.ndarray, table: np.ndarray) -> list[Slot] | None:
        positions = self._positions(vertices, table)
        if not family.by:
            return [Slot(family.param or "", family.axis, positions)]
        *classes, place = np.unravel_index(positions, family.shape)
        slots: list[Slot] = []
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for column in range(table.shape[1]):
            keys = [c[:, column] for c in classes]
            if all((k == k[0]).all() for k in keys):
                groups[tuple(int(k[0]) for k in keys)].append(column)
            elif not (place[:, column] == place[0, column]).all():
                return None  # the units' slices would have to be reordered while they move
        for key, columns in groups.items():
            index = place[:, columns]
            for within in _windows(family.by, key):
                slots.append(Slot(family.param or "", family.axis, index, within))
        return slots

    # ------------------------------------------------------------ reasons
    def pins(
        self,
        generators: Sequence[Generator],
        shapes: dict[str, tuple[int, ...]],
        unused: Sequence[str],
        apart: Mapping[str, np.ndarray],
    ) -> list[Pin]:
        """Why each position that no generator moves stays where it is; `within` says what is apart."""
        free: dict[tuple[str, int], np.ndarray] = {}
        for g in generators:
            for s in g.slots:
                mask = free.setdefault((s.param, s.axis), np.zeros(shapes[s.param][s.axis], bool))
                mask[s.index.reshape(-1)] = True
        reason, texts = self._reasons()
        out: list[Pin] = []
        for family in self.axes.families:
            if family.param is None:
                continue
            n = shapes[family.param][family.axis]
            stuck = ~free.get((family.param, family.axis), np.zeros(n, bool))
            vertices = self.structure.index[family.start : family.start + family.size].reshape(-1, n)[0]
            why = reason[vertices]
            if family.param in apart:
                why[_wholly(apart[family.param], family.axis) & (why == 0)] = 1
            numbers, counts = np.unique(why[stuck], return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                out.append(Pin(family.param, family.axis, count, *texts[number]))
        for name in unused:
            for axis, n in enumerate(shapes[name]):
                if n > 1:
                    out.append(Pin(name, axis, n, _UNUSED))
        return out

    def _reasons(self) -> tuple[np.ndarray, list[tuple[str, str]]]:
        structure = self.structure
        texts = [("no two of its positions can be exchanged", ""), (_UNUSED, "")]
        number: dict[tuple[str, str], int] = {}
        reason = np.zeros(structure.n, np.int64)
        for labels, why, where in self.axes.reasons:
            at = structure.index[labels]
            key = (why, where)
            if key not in number:
                number[key] = len(texts)
                texts.append(key)
            reason[at[reason[at] == 0]] = number[key]
        for _ in range(64):
            before = int(np.count_nonzero(reason))
            for a, b in ((structure.source, structure.target), (structure.target, structure.source)):
                new = (reason[a] == 0) & (reason[b] != 0)
                reason[a[new]] = reason[b[new]]
            if int(np.count_nonzero(reason)) == before:
                break
        return reason, texts


def halved(generator: Generator, unread: Mapping[str, np.ndarray]) -> bool:
    """Whether its units own several positions of an axis of which some, and not all, are not read.

    The axis is a product that other inputs read more of (a flattened table, pieces of a layer's output). What they read may
    belong to the units, too, or be in another order: this pass cannot know.

    Args:
        generator: of positions that are read.
        unread: state-dict name -> which entries are not read.
    """
    for slot in generator.slots:
        mask = unread.get(slot.param)
        if mask is not None and slot.index.shape[1] > 1:
            gone = _wholly(mask, slot.axis)
            if gone.any() and not gone.all():
                return True
    return False


def within(generator: Generator | Exchange, apart: Mapping[str, np.ndarray]) -> bool:
    """Whether it moves nothing but what the output does not depend on.

    What becomes of these is not known: the output of a head that is dropped may be read in another mode.

    Args:
        generator: one of them, or an exchange of modules.
        apart: state-dict name -> the entries that the output does not depend on.
    """
    if isinstance(generator, Exchange) and not all(
        n in apart and apart[n].all() for unit in generator.params for n in unit
    ):
        return False
    for slot in generator.slots:
        mask = apart.get(slot.param)
        if mask is None or not _wholly(mask, slot.axis)[slot.index].all():
            return False
    return True


def _wholly(mask: np.ndarray, axis: int) -> np.ndarray:
    """The positions of an axis all of whose entries a mask has."""
    found: np.ndarray = np.asarray(mask.all(axis=tuple(k for k in range(mask.ndim) if k != axis)))
    return found


def _windows(by: Sequence[tuple[int, np.ndarray]], key: tuple[int, ...]) -> list[tuple[tuple[int, int, int], ...]]:
    """The slices of the other axes that make up one class: contiguous runs, and every combination of them."""
    options: list[list[tuple[int, int, int]]] = []
    for (axis, classes), number in zip(by, key, strict=True):
        options.append([(axis, a, b) for a, b in stretches(np.flatnonzero(classes == number))])
    out: list[tuple[tuple[int, int, int], ...]] = [()]
    for choice in options:
        out = [(*o, c) for o in out for c in choice]
    return out
