"""Parameter axes that may have an order of their own for every position of another axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from automerge.rules._axes import MAX_JOINT, Family
from automerge.rules._letters import Letters
from automerge.rules._value import Factor, Value, new_letter


class Splits(Letters):
    """Notices where a parameter is used batched, and asks that its axes be split in the next pass.

    Attributes:
        requests: ``(param, axis, by axis) -> classes``: the axis gets an order for every class of positions of the other.
        withdrawn: those that are not asked for again.
        kept_out: those that cuts show, and that others kept from being asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[tuple[str, int, int], np.ndarray] = {}
        self.withdrawn: frozenset[tuple[str, int, int]] = frozenset()
        self.kept_out: set[tuple[str, int, int]] = set()
        self._slices: dict[tuple[str, int, int], list[np.ndarray]] = {}

    def _ask_batched(self, values: Sequence[Value], batch: set[int]) -> None:
        """A batched contraction: the other axes of a parameter may have an order for every batch position."""
        for v in values:
            outer = [g for g in v.factors if batch & set(g.letters)]
            for f in v.factors:
                if not batch & set(f.letters):
                    for g in outer:
                        self.request_split(f, g, batch)

    def _ask_splits(self, values: Sequence[Value], lists: Sequence[Sequence[Factor]]) -> None:
        """A joint factor meets a plain parameter axis whose own tensor has the other letters too."""
        if all(len(f.letters) == 1 for fs in lists for f in fs):
            return
        for i, mine in enumerate(lists):
            for f in mine:
                if len(f.letters) != 1 or self._source(f) is None:
                    continue
                for j, other in enumerate(lists):
                    for g in other if i != j else ():
                        extra = set(g.letters) - set(f.letters)
                        if f.letters[0] in g.letters and extra and self._outer(extra, f, g, values[j], other):
                            for h in values[i].factors:  # those of pinned letters, too
                                if extra & set(h.letters) and f.letters[0] not in h.letters:
                                    self.request_split(f, h, extra)

    def _outer(self, extra: set[int], f: Factor, g: Factor, value: Value, factors: Sequence[Factor]) -> bool:
        """Whether the extra letters of a joint factor are the outer ones: its operand knows them without it."""
        if not g.injective:
            return False
        known, mine = set(value.pinned), set(value.pinned)
        for h in factors:
            if h is not g and set(h.letters) <= extra:
                known |= set(h.letters)
            if h is not g and set(h.letters) <= {f.letters[0]}:
                mine |= set(h.letters)
        if extra <= known:
            return True
        return f.letters[0] not in mine and g.letters.index(f.letters[0]) == len(g.letters) - 1

    def note_slice(self, value: Value, letter: int, index: np.ndarray) -> None:
        """A parameter is cut along one axis: each piece may have an order of its own along the other axes."""
        outer = [g for g in value.factors if g.letters == (letter,)]
        if len(outer) != 1 or np.unique(index).size == value.size[letter]:
            return
        for f in value.factors:
            family = self._source(f) if len(f.letters) == 1 and f.letters != (letter,) else None
            if family is None or family.param is None or family.by:
                continue
            other = self._same_param(outer[0], family.param)
            if other is None or other[0].axis == family.axis or other[0].by:
                continue
            mask = np.zeros(other[0].size, bool)
            mask[other[1][index] - other[0].start] = True
            self._slices.setdefault((family.param, family.axis, other[0].axis), []).append(mask)

    def settle_requests(self, unread: Mapping[str, np.ndarray]) -> None:
        """Turn the cuts of a pass into requests: positions that every cut treats alike are one class.

        Args:
            unread: which entries of a parameter nobody reads, where there are some: positions without one that is read
                take the class of the nearest position before them (or else after them) that has one.
        """
        for (param, axis, by), masks in self._slices.items():
            if (param, by, axis) in self.requests or (param, axis, by) in self.requests:
                continue
            if any(p == param and (a == by or b == axis) for p, a, b in self.requests):
                self.kept_out.add((param, axis, by))
                continue
            _, classes = np.unique(np.stack(masks, 1), axis=0, return_inverse=True)
            classes = classes.reshape(-1).astype(np.int64)
            missing = unread.get(param)
            if missing is not None:
                read = np.flatnonzero(~missing.all(axis=tuple(k for k in range(missing.ndim) if k != by)))
                if not read.size:
                    continue
                before = np.searchsorted(read, np.arange(classes.size), side="right") - 1
                _, classes = np.unique(classes[read[before.clip(0)]], return_inverse=True)
            if int(classes.max()) > 0 and (param, axis, by) not in self.withdrawn:
                self.requests[param, axis, by] = classes

    def _source(self, factor: Factor) -> Family | None:
        family = self.axes.family(factor.labels)
        if family is None or family.param is None:
            return None
        return family

    def request_split(self, inner: Factor, outer: Factor, batch: set[int]) -> None:
        """Ask that ``inner``'s parameter axis get an order of its own for every batch position of ``outer``'s axis."""
        family = self._source(inner)
        if family is None or family.param is None or family.by:
            return
        outer = self._opened(outer)
        other = self._same_param(outer, family.param)
        if other is None or other[0].axis == family.axis or other[0].by:
            return
        axis, labels = other
        coordinate = np.zeros(labels.shape, np.int64)
        for c in outer.letters:
            if c in batch:
                k = outer.letters.index(c)
                view = [1] * labels.ndim
                view[k] = labels.shape[k]
                coordinate = coordinate * labels.shape[k] + np.arange(labels.shape[k]).reshape(view)
        classes = np.full(axis.size, -1, np.int64)
        classes[labels.reshape(-1) - axis.start] = coordinate.reshape(-1)
        # of a position that is read several times only the last coordinate is here
        numbers, runs = np.unique(classes, return_inverse=True)
        if numbers.size * family.size > MAX_JOINT:
            return
        if numbers[0] < 0 or (family.param, axis.axis, family.axis) in self.requests:
            return
        if (family.param, family.axis, axis.axis) not in self.withdrawn:
            self.requests.setdefault((family.param, family.axis, axis.axis), runs.reshape(-1).astype(np.int64))

    def _opened(self, factor: Factor) -> Factor:
        """What is in containers (the codes of each group) in their place, with a further letter for its places inside."""
        family = self.axes.family(factor.labels)
        held = self.axes.contents.get(int(self.axes.family_of[factor.labels.reshape(-1)[0]]))
        if family is None or held is None:
            return factor
        labels, containers = (one.reshape(-1) for one in held)
        counts = np.bincount(containers - family.start, minlength=family.size)
        if (counts != counts[0]).any():
            return factor
        inside = labels[np.argsort(containers, kind="stable")].reshape(family.size, -1)
        return Factor((*factor.letters, new_letter()), inside[factor.labels - family.start])

    def in_the_way(self) -> list[tuple[Family, int]]:
        """The splits that others gave way to, since splits do not nest: the family, and by which of its axes."""
        made = {
            (f.param, f.axis, other): (f, i)
            for f in self.axes.families
            if f.param is not None
            for i, (other, _) in enumerate(f.by)
        }
        lost = [key for key in (*self.requests, *self.kept_out) if key not in made]
        return [
            place
            for (param, axis, by), place in made.items()
            if any(param == p and (axis == outer or by == inner) for p, inner, outer in lost)
        ]

    def _same_param(self, outer: Factor, param: str) -> tuple[Family, np.ndarray] | None:
        """The outer factor as positions of another axis of the same parameter, looking through united families."""
        numbers = np.unique(self.axes.family_of[outer.labels.reshape(-1)])
        if numbers.size != 1:
            return None
        source = self.axes.families[numbers[0]]
        if source.param == param:
            return source, outer.labels
        for number in self.axes.classes[self.axes.class_of[numbers[0]]]:
            family = self.axes.families[number]
            if family.param == param and not family.by:
                vertices = np.arange(family.start, family.start + family.size)
                back = dict(zip(self.axes.root[vertices].tolist(), vertices.tolist(), strict=True))
                labels = np.array([back.get(r, -1) for r in self.axes.root[outer.labels.reshape(-1)].tolist()])
                return (family, labels.reshape(outer.labels.shape)) if (labels >= 0).all() else None
        return None
