"""The answer of inference: which positions of which parameters may be permuted together.

A `Symmetry` is a list of *generators* (sets of interchangeable units) over named parameters, plus everything the report
needs: what is pinned and why. It can also be written by hand, and round-trips through JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch

from automerge._errors import SymmetryError
from automerge._generators import Exchange as Exchange  # public here
from automerge._generators import Generator as Generator
from automerge._generators import Pin as Pin
from automerge._generators import Slot as Slot
from automerge._generators import check_exchange, check_slot, slot_index
from automerge._generators import slots_by_parameter as slots_by_parameter
from automerge._stacks import Stacks, stacks_of
from automerge.groups import Element, IndexArrays, compose_index, identity_index

_FORMAT = "automerge.symmetry/1"


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
        exchanges: sets of interchangeable modules, whose units own whole parameters.
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
    exchanges: tuple[Exchange, ...] = ()

    def __post_init__(self) -> None:
        for exchange in self.exchanges:
            check_exchange(self.shapes, exchange)
        for generator in self.sets:
            for slot in generator.slots:
                check_slot(self.shapes, generator, slot)

    # ---------------------------------------------------------------- elements
    def generators(self) -> list[Generator]:
        """The flat normal form, for export and for tests: see `Generator`."""
        return list(self.sets)

    def identity(self) -> Element:
        """The element that moves nothing."""
        return Element(self.shapes)

    def element(
        self,
        permutations: Sequence[Sequence[int] | np.ndarray],
        exchanges: Sequence[Sequence[int] | np.ndarray] | None = None,
    ) -> Element:
        """The element that permutes the units of each generator in turn, in the order of `generators`, and then modules.

        Args:
            permutations: one permutation of ``range(g.size)`` for each generator.
            exchanges: one permutation of ``range(e.size)`` for each of the ``exchanges``; None leaves all modules in place.

        Raises:
            SymmetryError: if the number of permutations is wrong, or one is not a permutation.
        """
        if len(permutations) != len(self.sets):
            raise SymmetryError(
                f"expected {len(self.sets)} permutations, one for each generator, got {len(permutations)}"
            )
        if exchanges is None:
            return _composed(self.shapes, self.sets, permutations)
        if len(exchanges) != len(self.exchanges):
            raise SymmetryError(
                f"expected {len(self.exchanges)} permutations of modules, one for each exchange, got {len(exchanges)}"
            )
        perms = [*permutations, *exchanges]
        return self.apart(_composed(self.stacked.shapes, self.stacked.sets, perms))

    @cached_property
    def stacked(self) -> Symmetry:
        """The same group with the parameters of interchangeable modules stacked, so that all of it are generators.

        Elements of it become elements of this symmetry with `apart`; without exchanges, the symmetry itself.
        """
        if not self.exchanges:
            return self
        place = self.stacks.place
        return Symmetry(
            shapes=self.stacks.shapes,
            sets=self.stacks.sets(self.sets, self.exchanges),
            statistics=frozenset(place[n][0] if n in place else n for n in self.statistics),
            aliases=self.aliases,
        )

    @cached_property
    def stacks(self) -> Stacks:
        """Which parameters `stacked` holds in one."""
        return stacks_of(self.shapes, self.exchanges)

    def apart(self, element: Element) -> Element:
        """An element of `stacked` as one of this symmetry."""
        return self.stacks.apart(element) if self.exchanges else element

    def together(self, element: Element) -> Element:
        """An element of this symmetry as one of `stacked`."""
        return self.stacks.together(element) if self.exchanges else element

    def random_element(self, seed: int | np.random.Generator) -> Element:
        """A random element: an independent uniform permutation for every generator and every exchange.

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
        exchanges = [rng.permutation(e.size) for e in self.exchanges] or None
        return self.element([rng.permutation(g.size) for g in self.sets], exchanges)

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
            out[name] = value
        missing = [n for n in (*element.maps, *element.sources.values()) if n not in out]
        if missing:
            raise SymmetryError(f"the state dict has no {missing[0]!r}, which the element moves")
        return {name: element.take(name, state_dict, self.aliases) for name in out}

    # ---------------------------------------------------------------- summary
    @property
    def counted(self) -> str:
        """How many groups there are, for a report."""
        modules = f" and {len(self.exchanges)} of interchangeable modules" if self.exchanges else ""
        return f"{len(self.sets)} group{'s' * (len(self.sets) != 1)}{modules}"

    @property
    def moved(self) -> set[str]:
        """The parameters that some element changes."""
        own = {slot.param for slot in self._slots}
        return own | {n for e in self.exchanges for names in e.params for n in names}

    @property
    def _slots(self) -> list[Slot]:
        return [*(s for g in self.sets for s in g.slots), *(s for e in self.exchanges for s in e.slots)]

    @property
    def free_share(self) -> float:
        """The share of positions on parameter axes longer than one that belong to at least one generator."""
        free = sum(int(np.count_nonzero(m)) for m in self._free_masks().values())
        total = sum(n for shape in self.shapes.values() for n in shape if n > 1)
        return free / total if total else 0.0

    def _free_masks(self) -> dict[tuple[str, int], np.ndarray]:
        masks: dict[tuple[str, int], np.ndarray] = {}
        for slot in self._slots:
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
            "generators": [{"size": g.size, "name": g.name, "slots": _slots_data(g.slots)} for g in self.sets],
            "exchanges": [
                {"size": e.size, "name": e.name, "params": [list(p) for p in e.params], "slots": _slots_data(e.slots)}
                for e in self.exchanges
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
                exchanges=tuple(
                    Exchange(
                        e["size"],
                        tuple(tuple(p) for p in e["params"]),
                        tuple(_slot_from(s, e["size"]) for s in e["slots"]),
                        e.get("name", ""),
                    )
                    for e in data.get("exchanges", ())
                ),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SymmetryError(f"this is not a symmetry file: {type(error).__name__}: {error}") from error


def _composed(
    shapes: Mapping[str, tuple[int, ...]],
    sets: Sequence[Generator],
    permutations: Sequence[Sequence[int] | np.ndarray],
) -> Element:
    """The element that permutes the units of some generators in turn."""
    maps: dict[str, IndexArrays] = {}
    for i, (generator, p) in enumerate(zip(sets, permutations, strict=True)):
        perm = np.asarray(p, dtype=np.int64)
        if perm.shape != (generator.size,) or not np.array_equal(np.sort(perm), np.arange(generator.size)):
            raise SymmetryError(f"permutation {i} is not a permutation of range({generator.size})")
        if np.array_equal(perm, np.arange(generator.size)):
            continue
        for slot in generator.slots:
            shape = shapes[slot.param]
            now = maps.get(slot.param, identity_index(shape))
            maps[slot.param] = compose_index(now, slot_index(shape, slot, perm))
    return Element(shapes, maps)


def _slots_data(slots: Sequence[Slot]) -> list[dict[str, Any]]:
    return [
        {"param": s.param, "axis": s.axis, "index": s.index.tolist(), "within": [list(w) for w in s.within]}
        for s in slots
    ]


def _slot_from(data: Mapping[str, Any], size: int) -> Slot:
    index = np.asarray(data["index"])
    if index.size and not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"an index of {data['param']} holds {index.dtype} and not whole numbers")
    index = index.astype(np.int64).reshape(size, -1)
    within = tuple((int(a), int(b), int(c)) for a, b, c in data.get("within", ()))
    return Slot(data["param"], int(data["axis"]), index, within)
