"""The answer of inference: which positions of which parameters may be permuted together.

A `Symmetry` is a list of *generators* (sets of interchangeable units) over named parameters, plus everything the report
needs: what is pinned and why. It can also be written by hand, and round-trips through JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch

from automerge._errors import SymmetryError
from automerge.groups import Element, IndexArrays, axis_index, compose_index, identity_index

_FORMAT = "automerge.symmetry/1"


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


@dataclass(frozen=True, eq=False)
class Symmetry:
    """The permutation group of a model's parameters.

    Attributes:
        shapes: state-dict name -> shape, for every float parameter and persistent float buffer.
        sets: the generators, inner ones before the outer ones whose units contain them.
        statistics: names of normalisation statistics; they move with their group, and are no part of the objective.
        aliases: further state-dict names of tied tensors -> the name in ``shapes``.
        pins: what is not free, with the reason.
        unruled: operators without a rule, with where they stand.
        notes: what a reader must know (data-dependent control flow, ...).
        stats: seconds and counts of the inference.
        flow: ``(from, to)`` pairs of module paths between which tensors pass, in order of the first use; for pictures.
        axis_graph: a networkx MultiGraph with one node per parameter axis (attributes ``param``, ``axis``, ``size``) or joint
            axis that an operator made (``param`` None), and one edge per tie (attribute ``op``); its connected components are
            what may move together. Not part of the JSON form.

    Examples:
        >>> unit = np.arange(3)[:, None]
        >>> s = Symmetry({"a.weight": (3, 2), "b.weight": (1, 3)},
        ...              (Generator(3, (Slot("a.weight", 0, unit), Slot("b.weight", 1, unit))),))
        >>> moved = s.apply({"a.weight": torch.arange(6.).view(3, 2), "b.weight": torch.arange(3.)[None]},
        ...                 s.element([[2, 0, 1]]))
        >>> moved["b.weight"]
        tensor([[2., 0., 1.]])
    """

    shapes: Mapping[str, tuple[int, ...]]
    sets: tuple[Generator, ...]
    statistics: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    pins: tuple[Pin, ...] = ()
    unruled: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stats: Mapping[str, Any] = field(default_factory=dict)
    flow: tuple[tuple[str, str], ...] = ()
    axis_graph: nx.MultiGraph | None = None

    def __post_init__(self) -> None:
        for generator in self.sets:
            for slot in generator.slots:
                _check_slot(self.shapes, generator, slot)

    # ---------------------------------------------------------------- elements
    def generators(self) -> list[Generator]:
        """The flat normal form, for export and for tests: see `Generator`."""
        return list(self.sets)

    def identity(self) -> Element:
        """The element that moves nothing."""
        return Element(self.shapes)

    def element(self, permutations: Sequence[Sequence[int] | np.ndarray]) -> Element:
        """The element that permutes the units of each generator in turn, in the order of `generators`.

        Args:
            permutations: one permutation of ``range(g.size)`` for each generator.

        Raises:
            SymmetryError: if the number of permutations is wrong, or one is not a permutation.
        """
        if len(permutations) != len(self.sets):
            raise SymmetryError(
                f"expected {len(self.sets)} permutations, one for each generator, got {len(permutations)}"
            )
        maps: dict[str, IndexArrays] = {}
        for i, (generator, p) in enumerate(zip(self.sets, permutations, strict=True)):
            perm = np.asarray(p, dtype=np.int64)
            if perm.shape != (generator.size,) or not np.array_equal(np.sort(perm), np.arange(generator.size)):
                raise SymmetryError(f"permutation {i} is not a permutation of range({generator.size})")
            if np.array_equal(perm, np.arange(generator.size)):
                continue
            for slot in generator.slots:
                shape = self.shapes[slot.param]
                now = maps.get(slot.param, identity_index(shape))
                maps[slot.param] = compose_index(now, _slot_index(shape, slot, perm))
        return Element(self.shapes, maps)

    def random_element(self, seed: int | np.random.Generator) -> Element:
        """A random element: an independent uniform permutation for every generator.

        Args:
            seed: an integer of at least 0, or a numpy Generator.

        Raises:
            SymmetryError: for another seed.
        """
        try:
            rng = np.random.default_rng(seed)
        except (TypeError, ValueError) as error:
            raise SymmetryError(
                f"random_element({seed!r}): give an integer of at least 0, or a numpy Generator"
            ) from error
        return self.element([rng.permutation(g.size) for g in self.sets])

    def apply(self, state_dict: Mapping[str, torch.Tensor], element: Element) -> dict[str, torch.Tensor]:
        """Move a state dict by an element; entries that the group does not touch are passed through.

        Raises:
            SymmetryError: if a parameter that moves is missing or has another shape.
        """
        out: dict[str, torch.Tensor] = {}
        for name, value in state_dict.items():
            key = self.aliases.get(name, name)
            if key in self.shapes and tuple(value.shape) != tuple(self.shapes[key]):
                raise SymmetryError(
                    f"{name} has the shape {tuple(value.shape)}, but the symmetry was inferred for {self.shapes[key]}; "
                    "infer again for this architecture"
                )
            out[name] = element.apply_to(key, value)
        missing = [n for n in element.maps if n not in out]
        if missing:
            raise SymmetryError(f"the state dict has no {missing[0]!r}, which the element moves")
        return out

    # ---------------------------------------------------------------- summary
    @property
    def free_share(self) -> float:
        """The share of positions on parameter axes longer than one that belong to at least one generator."""
        free = sum(int(np.count_nonzero(m)) for m in self._free_masks().values())
        total = sum(n for shape in self.shapes.values() for n in shape if n > 1)
        return free / total if total else 0.0

    def _free_masks(self) -> dict[tuple[str, int], np.ndarray]:
        masks: dict[tuple[str, int], np.ndarray] = {}
        for generator in self.sets:
            for slot in generator.slots:
                mask = masks.setdefault((slot.param, slot.axis), np.zeros(self.shapes[slot.param][slot.axis], bool))
                mask[slot.index.reshape(-1)] = True
        return masks

    def __str__(self) -> str:
        from automerge._report import symmetry_report

        return symmetry_report(self)

    __repr__ = __str__

    def draw(self, path: str | os.PathLike[str], force: bool = False) -> Path:
        """Draw the traced graph folded by module, one colour per group, residual streams thick.

        Args:
            path: where to write; the ending (``.svg``, ``.png``, ``.pdf``) chooses the format.
            force: overwrite an existing file.

        Raises:
            AutomergeError: if matplotlib is missing, or the ending is no picture format.
            OutputError: if the path exists (without ``force``) or cannot be written.
        """
        from automerge._draw import draw_symmetry

        return draw_symmetry(self, path, force)

    # ---------------------------------------------------------------- serialisation
    def to_json(self) -> str:
        """The whole symmetry as JSON text; `from_json` reads it back."""
        data = {
            "format": _FORMAT,
            "shapes": {n: list(s) for n, s in self.shapes.items()},
            "generators": [
                {
                    "size": g.size,
                    "name": g.name,
                    "slots": [
                        {
                            "param": s.param,
                            "axis": s.axis,
                            "index": s.index.tolist(),
                            "within": [list(w) for w in s.within],
                        }
                        for s in g.slots
                    ],
                }
                for g in self.sets
            ],
            "statistics": sorted(self.statistics),
            "aliases": dict(self.aliases),
            "pins": [[p.param, p.axis, p.count, p.reason, p.where] for p in self.pins],
            "unruled": list(self.unruled),
            "notes": list(self.notes),
            "stats": dict(self.stats),
            "flow": [list(f) for f in self.flow],
        }
        return json.dumps(data)

    @staticmethod
    def from_json(text: str) -> Symmetry:
        """Read what `to_json` wrote.

        Raises:
            SymmetryError: if the text is not such JSON, or an index is out of range.
        """
        try:
            data = json.loads(text)
            if not isinstance(data, dict):
                raise SymmetryError(f"this is not a symmetry file: expected an object, got a {type(data).__name__}")
            if data.get("format") != _FORMAT:
                raise SymmetryError(
                    f"this is not a symmetry file: expected the format {_FORMAT!r}, got {data.get('format')!r}"
                )
            return Symmetry(
                shapes={n: tuple(s) for n, s in data["shapes"].items()},
                sets=tuple(
                    Generator(g["size"], tuple(_slot_from(s, g["size"]) for s in g["slots"]), g.get("name", ""))
                    for g in data["generators"]
                ),
                statistics=frozenset(data.get("statistics", ())),
                aliases=dict(data.get("aliases", {})),
                pins=tuple(Pin(*p) for p in data.get("pins", ())),
                unruled=tuple(data.get("unruled", ())),
                notes=tuple(data.get("notes", ())),
                stats=dict(data.get("stats", {})),
                flow=tuple((a, b) for a, b in data.get("flow", ())),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SymmetryError(f"this is not a symmetry file: {type(error).__name__}: {error}") from error


def _slot_from(data: Mapping[str, Any], size: int) -> Slot:
    index = np.asarray(data["index"])
    if index.size and not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"an index of {data['param']} holds {index.dtype} and not whole numbers")
    index = index.astype(np.int64).reshape(size, -1)
    within = tuple((int(a), int(b), int(c)) for a, b, c in data.get("within", ()))
    return Slot(data["param"], int(data["axis"]), index, within)


def _check_slot(shapes: Mapping[str, tuple[int, ...]], generator: Generator, slot: Slot) -> None:
    where = f"generator {generator.name or '?'} of size {generator.size}, slot {slot.param} axis {slot.axis}"
    if slot.param not in shapes:
        raise SymmetryError(f"{where}: no such parameter")
    shape = shapes[slot.param]
    if not 0 <= slot.axis < len(shape):
        raise SymmetryError(f"{where}: the parameter has {len(shape)} axes")
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


def _slot_index(shape: tuple[int, ...], slot: Slot, perm: np.ndarray) -> IndexArrays:
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
