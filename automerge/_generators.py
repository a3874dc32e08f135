"""What a symmetry is made of: sets of interchangeable units, of interchangeable modules, and what stays in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from automerge._errors import SymmetryError
from automerge.groups import IndexArrays, axis_index, identity_index


@dataclass(frozen=True, eq=False)
class Slot:
    """The positions of one parameter axis that a generator's units own.

    Attributes:
        param: state-dict name.
        axis: the axis of that parameter.
        index: int64, ``(n, k)``: row u lists the k positions of the axis that belong to unit u, in corresponding order.
        within: ``(axis, start, stop)`` triples that confine the slot to a slice of other axes; empty for most.
    """

    param: str
    axis: int
    index: np.ndarray
    within: tuple[tuple[int, int, int], ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Slot):
            return NotImplemented
        same = (self.param, self.axis, self.within) == (other.param, other.axis, other.within)
        return same and np.array_equal(self.index, other.index)

    def __hash__(self) -> int:
        return hash((self.param, self.axis, self.within, self.index.shape))


@dataclass(frozen=True)
class Generator:
    """A set of ``size`` interchangeable units: permuting them by any p leaves the function unchanged.

    Permuting by p writes ``new[index[u]] = old[index[p[u]]]`` for one slot after the other; where pairs of units own the
    positions of an axis (an outer square), it has a slot for the first of each pair and one for the second. A wreath
    product is a generator whose units are the outer units (heads) and one generator for each of them (its dimensions).

    Attributes:
        size: the number of units.
        slots: what each unit owns.
        name: a readable name for the report, after the first parameter axis that produces the units.
    """

    size: int
    slots: tuple[Slot, ...]
    name: str = ""


@dataclass(frozen=True)
class Exchange:
    """A set of ``size`` interchangeable modules: units that own whole parameters, such as experts kept in a list.

    Permuting them by p writes ``new[params[u][k]] = old[params[p[u]][k]]`` for all k, and then moves the slots as a
    `Generator` does (the rows of a gate that scores the experts).

    Attributes:
        size: the number of units.
        params: for each unit the state-dict names of what it owns, in corresponding order.
        slots: what each unit owns of other parameters.
        name: a readable name for the report.

    Examples:
        >>> unit = np.arange(2)[:, None]
        >>> Exchange(2, (("a.weight",), ("b.weight",)), (Slot("gate.weight", 0, unit),)).size
        2
    """

    size: int
    params: tuple[tuple[str, ...], ...]
    slots: tuple[Slot, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Pin:
    """Positions of a parameter axis that are not free, and why.

    Attributes:
        param: state-dict name.
        axis: the axis.
        count: how many positions of it are pinned.
        reason: what gives their order a meaning.
        where: the operator, module path and source line, as far as known.
    """

    param: str
    axis: int
    count: int
    reason: str
    where: str = ""


def check_slot(shapes: Mapping[str, tuple[int, ...]], generator: Generator | Exchange, slot: Slot) -> None:
    where = f"generator {generator.name or '?'} of size {generator.size}, slot {slot.param} axis {slot.axis}"
    if slot.param not in shapes:
        raise SymmetryError(f"{where}: no such parameter")
    shape = shapes[slot.param]
    if not 0 <= slot.axis < len(shape):
        raise SymmetryError(f"{where}: the parameter has {len(shape)} axes")
    if not isinstance(slot.index, np.ndarray):
        raise SymmetryError(f"{where}: the index must be a numpy array, got a {type(slot.index).__name__}")
    if slot.index.ndim != 2 or slot.index.shape[0] != generator.size or not np.issubdtype(slot.index.dtype, np.integer):
        raise SymmetryError(
            f"{where}: the index must be an integer table of shape ({generator.size}, k), got {slot.index.shape}"
        )
    flat = slot.index.reshape(-1)
    if flat.size and (flat.min() < 0 or flat.max() >= shape[slot.axis] or np.bincount(flat).max() > 1):
        raise SymmetryError(f"{where}: the index leaves the axis (length {shape[slot.axis]}) or names a position twice")
    for axis, start, stop in slot.within:
        if axis == slot.axis or not 0 <= axis < len(shape) or not 0 <= start < stop <= shape[axis]:
            raise SymmetryError(f"{where}: within {(axis, start, stop)} is not a slice of another axis")


def check_exchange(shapes: Mapping[str, tuple[int, ...]], exchange: Exchange) -> None:
    """Raises `SymmetryError` if the units of an exchange do not own alike parameters."""
    where = f"exchange {exchange.name or '?'} of size {exchange.size}"
    if len(exchange.params) != exchange.size or len({len(names) for names in exchange.params}) != 1:
        raise SymmetryError(f"{where}: expected equally many parameters for each of its units")
    flat = [n for names in exchange.params for n in names]
    unknown = next((n for n in flat if n not in shapes), None)
    if unknown is not None or len(set(flat)) < len(flat):
        raise SymmetryError(
            f"{where}: " + (f"no parameter {unknown}" if unknown else "a parameter belongs to two units")
        )
    for column in zip(*exchange.params, strict=True):
        if len({tuple(shapes[n]) for n in column}) > 1:
            raise SymmetryError(f"{where}: {', '.join(column)} have different shapes")
    for slot in exchange.slots:
        check_slot(shapes, exchange, slot)


def slot_index(shape: tuple[int, ...], slot: Slot, perm: np.ndarray) -> IndexArrays:
    """The index arrays of one slot under a permutation of its generator's units."""
    out = list(identity_index(shape))
    line = np.arange(shape[slot.axis], dtype=np.int64)
    line[slot.index] = line[slot.index[perm]]
    view = [1] * len(shape)
    view[slot.axis] = shape[slot.axis]
    if not slot.within:
        out[slot.axis] = line.reshape(view)
        return tuple(out)
    extent = list(view)
    inside = np.ones([1] * len(shape), dtype=bool)
    for axis, start, stop in slot.within:
        extent[axis] = shape[axis]
        at = axis_index(shape, axis)
        inside = inside & (at >= start) & (at < stop)
    out[slot.axis] = np.where(inside, line.reshape(view), axis_index(shape, slot.axis))
    return tuple(out)


def slots_by_parameter(generators: Iterable[Generator]) -> dict[str, list[tuple[int, Slot]]]:
    """Parameter name -> its ``(generator number, slot)`` pairs, in order."""
    table: dict[str, list[tuple[int, Slot]]] = {}
    for number, generator in enumerate(generators):
        for slot in generator.slots:
            table.setdefault(slot.param, []).append((number, slot))
    return table
