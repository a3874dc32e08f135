"""The few operations that every rule is made of: combine, reduce, contract, reshape, take, concatenate, pin."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from automerge.rules._axes import Unruled, settle_resized
from automerge.rules._combine import Combine
from automerge.rules._constants import Pattern, pattern, slice_classes
from automerge.rules._operands import Join, filled, own_orders
from automerge.rules._value import (
    Factor,
    Value,
    drop_constant,
    new_letter,
    plain,
    repetition,
    split_letter,
    spread,
    widened,
)

MAX_BESIDE = 65_536


class Engine(Combine):
    """What a rule calls; see the methods of the bases for combining, reducing and pinning."""

    def __init__(self, states: Collection[Any] | None = None) -> None:
        """``states``: which constants beside coordinates may be first states, as an earlier pass found; None for all."""
        super().__init__()
        self.states = states
        self.refused = False
        self.fillings: list[Join] = []
        self.joins: list[Join] = []
        self.kernels: list[tuple[Factor, set[int], str]] = []
        self.resized: list[tuple[np.ndarray, np.ndarray, str]] = []

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """View: regroup letters, splitting one where an axis ends inside it."""
        todo = list(value.letters)
        none = next((axis for axis, n in zip(value.axes, value.shape, strict=True) if n == 0), ())
        axes: list[tuple[int, ...]] = []
        for n in shape:
            mine: list[int] = []
            have = 1
            if n == 0 and none and tuple(todo[: len(none)]) == none:
                todo = todo[len(none) :]
                axes.append(none)
                continue
            while have < n:
                letter = todo.pop(0)
                length = value.size[letter]
                if length == 0:
                    raise Unruled("a view that regroups an axis without positions")
                need = n // have
                if n % have == 0 and need % length == 0:
                    mine.append(letter)
                    have *= length
                elif n % have == 0 and length % need == 0:
                    value, (first, second) = self._cut(value, letter, need)
                    mine.append(first)
                    todo.insert(0, second)
                    have = n
                else:
                    value, one, used = self._merge_run(value, [*mine, letter], todo, n)
                    todo = [one, *todo[used:]]
                    mine, have = [], 1
            axes.append(tuple(mine))
        if none and todo:
            raise Unruled("a view that regroups an axis without positions")
        return value.with_axes(axes)

    def _cut(self, value: Value, letter: int, outer: int) -> tuple[Value, tuple[int, int]]:
        before = set(value.size)
        value = split_letter(value, letter, [outer, value.size[letter] // outer])
        made = [c for c in value.letters if c not in before]
        return value, (made[0], made[1])

    def _merge_run(self, value: Value, run: list[int], todo: list[int], n: int) -> tuple[Value, int, int]:
        used = 0
        flat = value.with_axes((tuple(value.letters),))
        total = int(np.prod([value.size[c] for c in run], dtype=np.int64))
        while total % n:
            run.append(todo[used])
            total *= value.size[todo[used]]
            used += 1
        before = set(flat.size)
        flat = self.merge_letters(flat, run)
        one = next(c for c in flat.letters if c not in before)
        return flat, one, used

    def take(self, value: Value, axis: int, index: np.ndarray) -> Value:
        """Positions of one axis by a constant index (slice, select, flip, roll, lookup)."""
        index = np.asarray(index, np.int64).reshape(-1)
        n = value.shape[axis]
        if n == index.size and np.array_equal(index, np.arange(n)):
            return value
        if not index.size:
            raise Unruled("no position of an axis is taken")
        times, once, each = repetition(index)
        if times * each > 1:
            return widened(self.take(value, axis, once), axis, times, each)
        value, letter = self.merge_axis(value, axis)
        if letter is not None:
            self.note_slice(value, letter, index)
        made = new_letter()
        size = {c: m for c, m in value.size.items() if c != letter}
        if index.size > 1:
            size[made] = index.size
        factors: list[Factor] = []
        for f in value.factors:
            if letter is None or letter not in f.letters:
                factors.append(f)
                continue
            k = f.letters.index(letter)
            labels = f.labels.take(index, axis=k)
            self.axes.select(labels, f.labels)
            reduced = drop_constant(Factor((*f.letters[:k], made, *f.letters[k + 1 :]), labels))
            if reduced is not None:
                factors.append(reduced)
        pinned = value.pinned - {letter}
        if letter in value.pinned and index.size > 1:
            pinned.add(made)
        axes = tuple(((made,) if index.size > 1 else ()) if k == axis else a for k, a in enumerate(value.axes))
        return Value(axes, size, factors, pinned, chosen=value.chosen)

    def piece(self, value: Value, axis: int, index: np.ndarray) -> Value:
        """`take` that singles out its positions only when the piece is used for anything but to be joined again."""
        before = len(self.axes.marks)
        out = self.take(value, axis, index)
        if out is value:
            return out
        out.carry(value, lambda v, _: self.take(v, axis, index))
        marks = self.axes.marks[before:]
        del self.axes.marks[before:]
        out.obligations = [lambda: self.axes.marks.extend(marks), *value.obligations] if marks else value.obligations
        out.origin = (value, axis, np.asarray(index), ())
        return out

    def concatenate(self, values: Sequence[Value], axis: int, same: Sequence[Any], *, node: Any = None) -> Value:
        """Join along one axis; ``same[i]`` is equal for operands that are the very same tensor.

        With the ``node`` that joins those of ``same`` constants may be the first state of a recurrence, which has units.
        """
        if len(values) == 1:
            return values[0]
        made_once: dict[tuple[int, int], Value] = {}  # the same tensor has the same labels each time
        keys = [(id(who), v.shape[axis]) for v, who in zip(values, same, strict=True)]  # (a border has several lengths)
        for v, key in zip(values, keys, strict=True):
            if key not in made_once:
                made_once[key] = self.merge_axis(v, axis)[0]
        singles = [made_once[key] for key in keys]
        coordinates = [bool(v.pinned & set(v.axes[axis])) for v in values]
        lengths = [v.shape[axis] for v in values]
        n = len(singles[0].axes)
        long = [i for i, v in enumerate(singles) if v.axes[axis]]
        apart = []  # the joined axes side by side, each a further axis of its own, but for those of length one
        for i, v in enumerate(singles):
            others = tuple(() if k == axis else a for k, a in enumerate(v.axes))
            apart.append(v.with_axes((*others, *(v.axes[axis] if i == j else () for j in long))))
        aligned, wide, size = self.align(apart)
        further = dict(zip(long, wide[n:], strict=True))
        axes, own = wide[:n], [further.get(i, ()) for i in range(len(singles))]
        made = new_letter()
        inner = {c for a in own for c in a}
        total = sum(lengths)
        aligned, beside = self._beside(aligned, made) if total == len(lengths) else (aligned, [])
        aligned, orders = own_orders(aligned, own)
        both = self.combine(aligned, wide, size)
        parts = [[f for f in both.factors if set(a) & set(f.letters)] for a in own]
        filling = filled(own, parts, both.pinned, coordinates)
        if any(filling):
            fixed = {c for a, *which in zip(own, filling, coordinates, strict=True) if any(which) for c in a}
            loose = {c for a, fills in zip(own, filling, strict=True) if fills for c in a}
            free = self.states is None or all((node, i) in self.states for i, fills in enumerate(filling) if fills)
            if node is not None and free and fixed - loose <= both.pinned:
                fixed = set()
                made_loose = {c: self.axes.fresh((both.size[c],)) for c in sorted(loose)}
                both = replace(both, factors=[*both.factors, *(Factor((c,), m) for c, m in made_loose.items())])
            both = self.pin_letters(both, fixed, "filled up with constants")
            parts = [[f for f in both.factors if set(a) & set(f.letters)] for a in own]
        if node is not None and any(coordinates):
            place = (axis, tuple(lengths), tuple(coordinates))
            for i, mine in enumerate(parts):
                if len(mine) > 1 and all(set(f.letters) <= set(own[i]) for f in mine) and not set(own[i]) & both.pinned:
                    mine = parts[i] = [self._joint(both, mine, set())]
                if len(mine) == 1 and mine[0].letters == tuple(own[i]):
                    join = Join(mine[0].labels, (*place, i), node, same[i], self.axes.where)
                    (self.fillings if filling[i] and not fixed else self.joins).append(join)
        rest = [f for f in both.factors if not inner & set(f.letters)]
        pinned = both.pinned - inner
        size_out = {c: n for c, n in both.size.items() if c not in inner} | {made: total}
        axes_out = tuple((made,) if k == axis else a for k, a in enumerate(axes))
        seen = [id(who) for who, f in zip(same, filling, strict=True) if not f]
        if not any(parts) and all(set(a) <= both.pinned for a in own) and len(set(seen)) == len(seen):
            return self._and(Value(axes_out, size_out, rest, pinned | {made}, chosen=both.chosen), beside)
        joint = self._join_segments(both, own, parts, lengths, same, made)
        if joint is not None and not orders and joint.letters == (made,) and self._all_fixed(joint.labels):
            return self._and(Value(axes_out, size_out, rest, pinned | {made}, chosen=both.chosen), beside)
        if joint is not None:
            rest.append(joint)
        out = Value(axes_out, size_out, rest, pinned, chosen=both.chosen)
        inside = self._join_segments(both, own, [[f] for f in orders], lengths, same, made) if orders else None
        return self._and(out, beside if inside is None else [*beside, inside])

    def _and(self, value: Value, factors: Sequence[Factor]) -> Value:
        """A value that has further factors, too, which must agree with what they share with its own."""
        more = [replace(value, factors=[f]) for f in factors]
        return self.combine([value, *more], value.axes, value.size) if more else value

    def settle_lengths(self) -> None:
        """Pin what only stands for units if their number is no length of the inputs: first states, kernels over all units.

        Where there are other constants than first states, the rules have to run again (``refused``): what is joined to
        coordinates is one, too.
        """
        settle_resized(self.axes, self.resized)
        if self.fillings or self.kernels:
            moving = self.axes.clusters()
            self._settle_fillings(moving)
            self._settle_kernels(moving)

    def _settle_fillings(self, moving: np.ndarray) -> None:
        """Tell constants that stand for units from those that fill an axis up: elsewhere, units stand at their place.

        (First states of recurrences, and what a mask has for learned tokens.) These are joined at the same place, move with
        them position by position, and are all of a parameter's axis: so their number is that of units.
        """
        states: set[int] = set()
        for start in self.fillings:
            numbers = moving[start.labels]
            later = (j for j in self.joins if j.place == start.place and np.array_equal(moving[j.labels], numbers))
            given = self.axes.encloses(moving, numbers) or self.axes.multiplies(moving, numbers)
            if given and any(j.node is not start.node for j in later):
                states.update(numbers.tolist())
        found = [np.isin(moving[start.labels], list(states)).all() for start in self.fillings]
        self.refused = not all(found)
        self.states = {(f.node, f.place[-1]) for f, ok in zip(self.fillings, found, strict=True) if ok}

    def _settle_kernels(self, moving: np.ndarray) -> None:
        """Pin kernels over a whole axis, but for one of units, which all are positions of some parameter that is no kernel."""
        families = {k for f, _, _ in self.kernels for k in np.unique(self.axes.family_of[f.labels])}
        own = {self.axes.families[k].start for k in families}
        for f, places, where in self.kernels:
            if not self.axes.encloses(moving, moving[f.labels.reshape(-1)], own):
                self.axes.where = where
                self._pin_places(f, sorted(places), "position in a convolution kernel")

    def _beside(self, values: Sequence[Value], made: int) -> tuple[list[Value], list[Factor]]:
        """Factors that every operand of a stack has over the same letters with labels of its own, taken out and stacked.

        Each operand keeps its order until something reads several of them alike: the last states of both directions of a
        recurrence, weights of several members read in one batched product, the points that every head takes of each level.
        """
        out, stacked = list(values), []
        for f in values[0].factors:
            mine = [[g for g in v.factors if set(g.letters) == set(f.letters)] for v in values]
            if any(len(m) != 1 or not m[0].injective for m in mine):
                continue
            if any(set(f.letters) & v.pinned or v.chosen for v in values) or f.labels.size * len(values) > MAX_BESIDE:
                continue
            labels = [m[0].labels.transpose([m[0].letters.index(c) for c in f.letters]) for m in mine]
            if all(np.array_equal(self.axes.root[labels[0]], self.axes.root[one]) for one in labels[1:]):
                continue  # they move together already
            made_one = [Factor((made, *f.letters), np.stack(labels))]
            self._mark_coordinates(self.make_injective(made_one, 0), [made], "position in a concatenation")
            stacked += made_one
            out = [replace(v, factors=[g for g in v.factors if set(g.letters) != set(f.letters)]) for v in out]
        return out, stacked

    def _all_fixed(self, labels: np.ndarray) -> bool:
        """Whether labels are distinct and none of them can move: then they say no more than the coordinate."""
        return bool(self.axes.rigid[labels].all()) and self.axes.injective(labels)

    def _join_segments(
        self,
        both: Value,
        own: Sequence[tuple[int, ...]],
        parts: Sequence[Sequence[Factor]],
        lengths: Sequence[int],
        same: Sequence[object],
        made: int,
    ) -> Factor | None:
        """One factor over the joined axis: each operand's labels, distinct operands kept apart."""
        segments: list[Factor] = []
        owner = np.zeros(2 * self.axes.count, np.int32)  # which operand has shown a vertex; room for new ones
        numbers: dict[int, int] = {}
        shared: dict[Any, np.ndarray] = {}
        for letters, factors, who in zip(own, parts, map(id, same), strict=True):
            segment = self._operand_factor(both, letters, factors, shared, who)
            number = numbers.setdefault(who, len(numbers) + 1)
            owner = _with_room(owner, self.axes.count)
            # two different tensors may carry the same labels, and equal labels must mean equal values
            before = owner[segment.labels]
            if ((before != 0) & (before != number)).any():
                segment = Factor(segment.letters, self.axes.relabel(segment.labels))
                owner = _with_room(owner, self.axes.count)
            owner[segment.labels] = number
            segments.append(segment)
        outer = list(
            dict.fromkeys(c for f, mine in zip(segments, own, strict=True) for c in f.letters if c not in mine)
        )
        arrays = []
        for segment, letters, n in zip(segments, own, lengths, strict=True):
            labels = spread(segment, (*letters, *outer), both.size)
            arrays.append(labels if letters else np.broadcast_to(labels[None], (n, *labels.shape)))
        return drop_constant(Factor((made, *outer), np.concatenate(arrays)))

    def _operand_factor(
        self, both: Value, letters: tuple[int, ...], factors: Sequence[Factor], shared: dict[Any, np.ndarray], who: int
    ) -> Factor:
        """An operand's labels along the joined axis; the same operand gets the same ones each time."""
        pins = set(letters) & both.pinned
        if factors:
            return self._joint(both, factors, pins)
        shape = tuple(both.size[c] for c in letters)
        extent = shape if pins else (1,)
        if (who, extent) not in shared:
            shared[who, extent] = self.axes.fresh(extent)
            if pins:
                self.axes.pin(shared[who, extent], "position in a concatenation")
        labels = shared[who, extent]
        if pins:
            return Factor(letters, labels)
        return Factor(letters, np.broadcast_to(labels.reshape([1] * len(shape)), shape).copy())

    # ------------------------------------------------------------ constants
    def constant(self, array: np.ndarray) -> Value:
        """A tensor by its values: positions with equal slices are interchangeable, all others pinned."""
        value = plain(array.shape)
        value.factors, value.pinned = self.constant_structure(array, value.axes)
        return value

    def constant_structure(self, array: np.ndarray, axes: Sequence[tuple[int, ...]]) -> tuple[list[Factor], set[int]]:
        """The factors and pins of a constant whose axes have one letter each."""
        factors: list[Factor] = []
        pinned: set[int] = set()
        found = pattern(array)
        if found is not None:
            factors += self._patterned(found, array.shape, axes)
        for k, axis in enumerate(axes):
            if not axis or (found is not None and k in found.axes):
                continue
            classes = slice_classes(array, k)
            count = int(classes.max()) + 1
            if count == array.shape[k]:
                pinned.add(axis[0])
            elif count > 1:
                labels = self.axes.fresh((array.shape[k],))
                self.axes.mark(labels, classes)
                factors.append(Factor(axis, labels))
        return factors, pinned

    def _patterned(self, found: Pattern, shape: Sequence[int], axes: Sequence[tuple[int, ...]]) -> list[Factor]:
        """Two axes that are permuted together: a vertex for each entry leads to its row and its column."""
        whole = [self.axes.fresh((shape[k],)) for k in found.axes]
        ends = []
        for labels, classes in zip(whole, found.classes, strict=True):
            count = int(classes.max()) + 1
            ends.append(labels if count == labels.size else self.axes.fresh((count,)))
            if count < labels.size:
                self.axes.edge(labels, ends[-1][classes])
        rows, columns = ends[0][found.rows], ends[1][found.columns]
        if found.of_a_kind and rows.size == ends[0].size == ends[1].size:
            self.axes.tie(rows, columns)
        else:
            entries = self.axes.fresh(rows.shape)
            self.axes.mark(entries, found.kinds)
            self.axes.edge(entries, rows)
            self.axes.edge(entries, columns)
        return [Factor(axes[k], labels) for k, labels in zip(found.axes, whole, strict=True)]


def _with_room(owner: np.ndarray, count: int) -> np.ndarray:
    """The array, or a longer one with zeros behind it."""
    return owner if owner.size >= count else np.concatenate([owner, np.zeros(2 * count - owner.size, np.int32)])
