"""Known symmetry, written down while a network is built: named unit sets, and who owns which positions.

Nothing here looks at a traced graph. A block of a random network *decides* which units its weights have, and writes that
down; the ground truth is what was written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from automerge.symmetry import Generator, Slot, Symmetry

Window = tuple[tuple[int, int, int], ...]


@dataclass(eq=False)
class Units:
    """Interchangeable units: ``size`` of them inside every unit of ``parent``.

    Attributes:
        size: how many, inside one unit of the parent.
        parent: the units that contain them, or None.
        pinned: their order has a meaning.
    """

    size: int
    parent: Units | None = None
    pinned: bool = False

    @property
    def total(self) -> int:
        """How many there are in all units of the parent together."""
        return self.size * (self.parent.total if self.parent else 1)

    def pin(self) -> None:
        """Give the order a meaning; the units around are then told apart, too."""
        self.pinned = True
        if self.parent is not None:
            self.parent.pin()

    def group(self, groups: int) -> Units:
        """Put the units into ``groups`` interchangeable units; returns those."""
        assert self.parent is None
        assert self.size % groups == 0
        self.parent, self.size = Units(groups, pinned=self.pinned), self.size // groups
        return self.parent


class Cell(NamedTuple):
    """One position of an axis: a unit, counted through all parents, and what was done to its value.

    Two positions of one tensor with the same unit and the same tag hold the same value.
    """

    units: Units
    at: int
    tag: tuple[object, ...] = ()

    def under(self, units: Units) -> tuple[int, int] | None:
        """The coordinate among all ``units`` that contain this cell, and the place below; None if they do not."""
        at, below, scale, here = self.at, 0, 1, self.units
        while here is not units:
            if here.parent is None:
                return None
            below += scale * (at % here.size)
            scale *= here.size
            at //= here.size
            here = here.parent
        return at, below


Layout = tuple[Cell, ...]


def cells(units: Units, *tag: object) -> Layout:
    """All units in order."""
    return tuple(Cell(units, i, tag) for i in range(units.total))


def tagged(layout: Iterable[Cell], *tag: object) -> Layout:
    """The same units after an elementwise function of this name."""
    return tuple(Cell(c.units, c.at, (*c.tag, *tag)) for c in layout)


def distinct(layout: Layout) -> Layout:
    """Tell equal values apart, as the positions of a parameter do: copies are units inside the unit they copy."""
    count = Counter(layout)
    copies: dict[tuple[int, object], Units] = {}
    seen: Counter[Cell] = Counter()
    out: list[Cell] = []
    for cell in layout:
        k = count[cell]
        if k == 1:
            out.append(cell)
            continue
        inner = copies.setdefault((id(cell.units), cell.tag), Units(k, cell.units))
        out.append(Cell(inner, cell.at * k + seen[cell], cell.tag))
        seen[cell] += 1
    return tuple(out)


def whole(layout: Layout, chosen: Sequence[int]) -> bool:
    """Whether a choice of positions cuts no unit set apart, so that it singles out nothing."""
    inside = {(id(layout[i].units), layout[i].tag) for i in chosen}
    wanted = [i for i, c in enumerate(layout) if (id(c.units), c.tag) in inside]
    return wanted == sorted(chosen)


def grouped(layout: Layout, groups: int) -> list[tuple[Units | None, int, Layout]] | None:
    """Cut a layout into equal groups whose positions are treated together.

    Returns:
        For each group the outer units and its own number among them (None when the groups are not interchangeable), and
        its cells; or None if the cut is one that this bookkeeping has no words for.
    """
    n = len(layout) // groups
    parts = [layout[i * n : (i + 1) * n] for i in range(groups)]
    sets = [{id(c.units) for c in part} for part in parts]
    first = layout[0].units
    if all(not a & b for i, a in enumerate(sets) for b in sets[:i]):
        return [(None, i, part) for i, part in enumerate(parts)]
    if any(c.units is not first for c in layout) or len(set(layout)) != len(layout) or first.total != len(layout):
        return None
    numbers = [{c.at // n for c in part} for part in parts]
    if any(len(k) != 1 for k in numbers) or len({tuple(c.at % n for c in part) for part in parts}) > 1:
        return None
    if first.parent is None:
        first.group(groups)
    if first.parent is None or first.parent.parent is not None or first.parent.size != groups:
        return None
    return [(first.parent, next(iter(k)), part) for k, part in zip(numbers, parts, strict=True)]


@dataclass
class _Record:
    tensor: torch.Tensor
    axis: int
    layout: Layout
    within: Window
    scope: Units | None


@dataclass
class Ledger:
    """What every parameter axis owns."""

    records: list[_Record] = field(default_factory=list)

    def own(
        self, tensor: torch.Tensor, axis: int, layout: Layout, within: Window = (), scope: Units | None = None
    ) -> None:
        """Position i of an axis of ``tensor`` belongs to ``layout[i]``.

        Args:
            tensor: the parameter or buffer.
            axis: its axis.
            layout: one cell for each position.
            within: the slice of other axes that this holds for.
            scope: units that move the whole slice, so that they do not reorder this axis inside of it.
        """
        assert tensor.shape[axis] == len(layout)
        self.records.append(_Record(tensor, axis, layout, within, scope))

    def generators(self, model: nn.Module) -> list[Generator]:
        """Every set of at least two units that owns something, inner ones first."""
        names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            names.setdefault(id(tensor), name)
        found: list[tuple[int, Generator]] = []
        for units in self._all_units():
            if units.pinned or units.size < 2:
                continue
            around = units.parent.total if units.parent else 1
            tables = [(r, self._table(r, units)) for r in self.records]
            for outer in range(around):
                slots = [
                    Slot(names[id(r.tensor)], r.axis, index, r.within)
                    for r, table in tables
                    if (index := _rows(table, units.size, outer)) is not None
                ]
                if slots:
                    found.append((_depth(units), Generator(units.size, tuple(slots))))
        return [g for _, g in sorted(found, key=lambda pair: -pair[0])]

    def symmetry(self, model: nn.Module) -> Symmetry:
        """The ground truth as a `Symmetry`, so that it can be verified as well."""
        first: dict[int, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        aliases: dict[str, str] = {}
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if id(tensor) in first:
                aliases[name] = first[id(tensor)]
            else:
                first[id(tensor)], shapes[name] = name, tuple(tensor.shape)
        statistics = frozenset(n for n in shapes if n.endswith(("running_mean", "running_var")))
        return Symmetry(shapes, tuple(self.generators(model)), statistics, aliases)

    def _all_units(self) -> Iterator[Units]:
        seen: dict[int, Units] = {}
        for record in self.records:
            for cell in record.layout:
                here: Units | None = cell.units
                while here is not None and id(here) not in seen:
                    seen[id(here)] = here
                    here = here.parent
        yield from seen.values()

    @staticmethod
    def _table(record: _Record, units: Units) -> dict[int, list[int]]:
        """Unit (counted through all parents) -> positions of the record's axis, in corresponding order."""
        scope = record.scope
        while scope is not None:
            if scope is units:
                return {}
            scope = scope.parent
        rows: dict[int, list[tuple[int, int, str, int]]] = {}
        order: dict[int, int] = {}
        for position, cell in enumerate(record.layout):
            place = cell.under(units)
            if place is not None:
                kind = order.setdefault(id(cell.units), len(order))
                rows.setdefault(place[0], []).append((kind, place[1], repr(cell.tag), position))
        return {u: [key[-1] for key in sorted(keys)] for u, keys in rows.items()}


def _rows(table: dict[int, list[int]], size: int, outer: int) -> np.ndarray | None:
    rows = [table.get(outer * size + u) for u in range(size)]
    if all(row is None for row in rows):
        return None
    return np.array([row or [] for row in rows], dtype=np.int64)


def _depth(units: Units) -> int:
    return 0 if units.parent is None else 1 + _depth(units.parent)
