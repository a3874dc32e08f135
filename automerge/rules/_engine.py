"""The few operations that every rule is made of: combine, reduce, contract, reshape, take, join, pin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from automerge.rules._axes import MAX_JOINT, Axes
from automerge.rules._value import (
    Factor,
    Value,
    common_refinement,
    drop_constant,
    new_letter,
    plain,
    refine_axis,
    rename,
    split_letter,
    spread,
)


class Engine:
    """Operations on values over one `Axes`.

    Attributes:
        axes: the vertices and their relations.
        requests: parameter axes that should have one order per position of another axis in the next pass:
            ``(param, axis, by axis) -> classes`` (see `request_split`).
    """

    def __init__(self) -> None:
        self.axes = Axes()
        self.requests: dict[tuple[str, int, int], np.ndarray] = {}

    # ------------------------------------------------------------ small repairs
    def injective(self, factor: Factor) -> Factor:
        """The factor itself if it names no vertex twice, else one with a fresh vertex per position."""
        if self.axes.injective(factor.labels):
            return factor
        return Factor(factor.letters, self.axes.refine(factor.labels))

    def pin_letters(self, value: Value, letters: set[int], reason: str) -> Value:
        """Give the coordinates of some letters a meaning."""
        letters = letters & set(value.size)
        factors = []
        for f in value.factors:
            inside = [c for c in f.letters if c in letters]
            if not inside:
                factors.append(f)
                continue
            if len(inside) == len(f.letters):
                self.pin_factor(f, reason)
                continue
            f = self.injective(f)
            self._mark_coordinates(f, inside, reason)
            factors.append(f)
        return Value(value.axes, value.size, factors, value.pinned | letters)

    def pin_factor(self, factor: Factor, reason: str) -> None:
        """Fix every vertex of a factor."""
        self.axes.pin(factor.labels, reason)

    def _mark_coordinates(self, factor: Factor, letters: Sequence[int], reason: str) -> None:
        shape = factor.labels.shape
        at = np.zeros(shape, np.int64)
        for c in letters:
            k = factor.letters.index(c)
            view = [1] * len(shape)
            view[k] = shape[k]
            at = at * shape[k] + np.arange(shape[k]).reshape(view)
        self.axes.mark(factor.labels, at)

    def pin_all(self, value: Value, reason: str) -> Value:
        """Give every coordinate of a tensor a meaning."""
        return self.pin_letters(value, set(value.size), reason)

    # ------------------------------------------------------------ letters
    def merge_axis(self, value: Value, axis: int) -> tuple[Value, int | None]:
        """Make one axis a single letter; returns the value and the letter (None when the axis has length one)."""
        letters = value.axes[axis]
        if len(letters) <= 1:
            return value, (letters[0] if letters else None)
        merged = self.merge_letters(value, letters)
        return merged, merged.axes[axis][0]

    def merge_letters(self, value: Value, letters: Sequence[int]) -> Value:
        """Replace adjacent letters by their product."""
        letters = tuple(letters)
        if len(letters) < 2:
            return value
        inside = set(letters)
        one = new_letter()
        total = int(np.prod([value.size[c] for c in letters], dtype=np.int64))
        touched = [f for f in value.factors if inside & set(f.letters)]
        pins = inside & value.pinned
        rest = [f for f in value.factors if not inside & set(f.letters)]
        size = {c: n for c, n in value.size.items() if c not in inside} | {one: total}
        axes = []
        for axis in value.axes:
            if axis and inside & set(axis):
                first = axis.index(letters[0])
                axes.append((*axis[:first], one, *axis[first + len(letters) :]))
            else:
                axes.append(axis)
        pinned = value.pinned - inside
        if pins == inside or (pins and not touched):
            rest += [self._over_merged(value, f, letters, one) for f in touched if set(f.letters) - inside]
            return Value(tuple(axes), size, rest, pinned | {one})
        if touched:
            joint = self._joint(value, touched, pins)
            outer = tuple(c for c in joint.letters if c not in inside)
            full = spread(joint, (*outer, *letters), value.size)
            labels = np.ascontiguousarray(full).reshape([*(value.size[c] for c in outer), total])
            rest.append(Factor((*outer, one), labels))
        return Value(tuple(axes), size, rest, pinned)

    def _over_merged(self, value: Value, factor: Factor, letters: tuple[int, ...], one: int) -> Factor:
        """A factor that is joint with pinned letters, over the product of those letters."""
        outer = tuple(c for c in factor.letters if c not in letters)
        whole = set(letters) <= set(factor.letters)
        labels = np.ascontiguousarray(spread(factor, (*outer, *letters), value.size))
        labels = labels.reshape([*(value.size[c] for c in outer), -1])
        made = Factor((*outer, one), labels)
        if not whole:
            made = Factor(made.letters, self.axes.refine(labels))
            self._mark_coordinates(made, [one], "joined with a pinned axis")
        return made

    def _joint(self, value: Value, factors: Sequence[Factor], pins: set[int]) -> Factor:
        """One factor that determines several, and the coordinates of pinned letters."""
        if len(factors) == 1 and not pins - set(factors[0].letters):
            return factors[0]
        letters = tuple(c for c in value.size if c in pins or any(c in f.letters for f in factors))
        shape = tuple(value.size[c] for c in letters)
        made = Factor(letters, self.axes.fresh(shape))
        for f in factors:
            self.axes.edge(made.labels, spread(f, letters, value.size))
        if pins:
            self._mark_coordinates(made, sorted(pins), "joined with a pinned axis")
        return made

    def align(self, values: Sequence[Value]) -> tuple[list[Value], tuple[tuple[int, ...], ...], dict[int, int]]:
        """Broadcast: the values over common letters, and the axes of the result with the letters' lengths."""
        ndim = max(len(v.axes) for v in values)
        out = [Value(((),) * (ndim - len(v.axes)) + v.axes, v.size, v.factors, v.pinned) for v in values]
        axes: list[tuple[int, ...]] = []
        size: dict[int, int] = {}
        for k in range(ndim):
            who = [i for i, v in enumerate(out) if v.axes[k]]
            if not who:
                axes.append(())
                continue
            sizes: list[int] | None = [out[who[0]].size[c] for c in out[who[0]].axes[k]]
            for i in who[1:]:
                if sizes is not None:
                    sizes = common_refinement(sizes, [out[i].size[c] for c in out[i].axes[k]])
            letters: tuple[int, ...] = ()
            for i in who:
                v = self.merge_axis(out[i], k)[0] if sizes is None else refine_axis(out[i], k, sizes)
                mine = v.axes[k]
                if not letters:
                    letters = tuple(new_letter() for _ in mine)
                out[i] = rename(v, dict(zip(mine, letters, strict=True)))
            axes.append(letters)
            size.update({c: out[who[0]].size[c] for c in letters})
        return out, tuple(axes), size

    # ------------------------------------------------------------ combine
    def elementwise(self, values: Sequence[Value]) -> Value:
        """A function of the operands at the same (broadcast) position."""
        if len(values) == 1:
            return values[0]
        aligned, axes, size = self.align(values)
        return self.combine(aligned, axes, size)

    def combine(self, values: Sequence[Value], axes: tuple[tuple[int, ...], ...], size: dict[int, int]) -> Value:
        """The tuple of several tensors over common letters: tie what overlaps, drop what is determined by the rest."""
        pinned = set().union(*(v.pinned for v in values))
        lists: list[list[Factor]] = []
        for v in values:
            wanted = {c for f in v.factors for c in f.letters} & (pinned - v.pinned)
            lists.append((self.pin_letters(v, wanted, "meets a pinned axis") if wanted else v).factors)
        self._ask_splits(values, lists)
        done: list[list[Factor]] = []
        for mine in lists:
            for other in done:
                for i in range(len(mine)):
                    for j in range(len(other)):
                        mine[i], other[j] = self._consistent(mine[i], other[j], lists)
            done.append(list(mine))
        kept = self._prune([f for fs in done for f in fs], pinned)
        return Value(axes, dict(size), kept, pinned & set(size))

    def _consistent(self, f: Factor, g: Factor, lists: Sequence[Sequence[Factor]]) -> tuple[Factor, Factor]:
        """Make two factors of different operands agree on the letters that they share."""
        common = [c for c in f.letters if c in g.letters]
        if not common:
            return f, g
        if set(f.letters) == set(g.letters):
            return self._same_letters(f, g)
        if len(common) == len(f.letters) or len(common) == len(g.letters):
            small, large = (f, g) if len(common) == len(f.letters) else (g, f)
            large = self.injective(large)
            order = [c for c in large.letters]
            size = dict(zip(large.letters, large.labels.shape, strict=True))
            self.axes.edge(large.labels, spread(small, order, size))
            return (f, large) if small is f else (large, g)
        f, g = self.injective(f), self.injective(g)
        for k in (h for fs in lists for h in fs):
            if set(k.letters) == set(common) and self.axes.injective(k.labels):
                return f, g  # both have edges to that factor already, or get them as a pair
        a = self.axes.project(f.labels, tuple(f.letters.index(c) for c in common))
        b = self.axes.project(g.labels, tuple(g.letters.index(c) for c in common))
        fa = [c for c in f.letters if c in common]
        ga = [c for c in g.letters if c in common]
        self.axes.tie(a, b.transpose([ga.index(c) for c in fa]))
        return f, g

    def _same_letters(self, f: Factor, g: Factor) -> tuple[Factor, Factor]:
        labels = g.labels.transpose([g.letters.index(c) for c in f.letters])
        if np.array_equal(f.labels, labels):
            return f, g
        one, two = self.axes.injective(f.labels), self.axes.injective(labels)
        if not one and not two:
            f = Factor(f.letters, self.axes.refine(f.labels))
            one = True
        if one and two:
            self.axes.tie(f.labels, labels)
        elif one:
            self.axes.edge(f.labels, labels)
        else:
            self.axes.edge(labels, f.labels)
        return f, g

    def _prune(self, factors: list[Factor], pinned: set[int]) -> list[Factor]:
        """Drop factors that smaller kept ones (and pins) already determine; the edges between them stand."""
        unique: dict[tuple[tuple[int, ...], bytes], Factor] = {}
        for f in factors:
            unique.setdefault((f.letters, f.labels.tobytes()), f)
        # among equals, an injective one determines a copy, so it comes first
        order = sorted(unique.values(), key=lambda f: (len(f.letters), not self.axes.injective(f.labels)))
        kept: list[Factor] = []
        for f in order:
            covered = set(pinned)
            for k in kept:
                if set(k.letters) <= set(f.letters) and self.axes.injective(k.labels):
                    covered |= set(k.letters)
            same = any(set(k.letters) == set(f.letters) and np.array_equal(self._like(k, f), f.labels) for k in kept)
            if not same and not set(f.letters) <= covered:
                kept.append(f)
        return kept

    @staticmethod
    def _like(k: Factor, f: Factor) -> np.ndarray:
        return k.labels.transpose([k.letters.index(c) for c in f.letters])

    # ------------------------------------------------------------ reduce
    def reduce(self, value: Value, letters: set[int]) -> Value:
        """A symmetric function over some letters (sum, maximum, ...); the axes keep their place with those letters gone."""
        kept = [f for f in value.factors if not letters & set(f.letters)]
        for f in value.factors:
            gone = letters & set(f.letters)
            if not gone:
                continue
            f = self.injective(f)
            rest = tuple(k for k, c in enumerate(f.letters) if c not in letters)
            if not rest:
                continue
            left = {f.letters[k] for k in rest}
            covered = set(value.pinned)
            for k in kept:
                if set(k.letters) <= left and self.axes.injective(k.labels):
                    covered |= set(k.letters)
            if left <= covered:
                continue
            kept.append(Factor(tuple(f.letters[k] for k in rest), self.axes.project(f.labels, rest)))
        axes = tuple(tuple(c for c in a if c not in letters) for a in value.axes)
        size = {c: n for c, n in value.size.items() if c not in letters}
        return Value(axes, size, kept, value.pinned - letters)

    def contract(self, a: Value, b: Value, out: tuple[tuple[int, ...], ...], batch: set[int]) -> Value:
        """Sum of products over the letters that ``out`` lacks; a and b already share letters where they are paired."""
        self._ask_batched((a, b), batch)
        size = a.size | b.size
        both = self.combine([a, b], (tuple(size),), size)
        keep = {c for axis in out for c in axis}
        reduced = self.reduce(both, set(size) - keep)
        return Value(out, {c: size[c] for c in keep}, reduced.factors, reduced.pinned)

    # ------------------------------------------------------------ splits of parameter axes
    def _ask_batched(self, values: Sequence[Value], batch: set[int]) -> None:
        """A batched contraction: the other axes of a parameter may have an order for every batch position."""
        for v in values:
            outer = [g for g in v.factors if batch & set(g.letters)]
            for f in v.factors:
                if len(f.letters) == 1 and not batch & set(f.letters):
                    for g in outer:
                        self.request_split(f, g, batch)

    def _ask_splits(self, values: Sequence[Value], lists: Sequence[Sequence[Factor]]) -> None:
        """A joint factor meets a plain parameter axis whose own tensor has the other letters too."""
        for i, mine in enumerate(lists):
            for f in mine:
                if len(f.letters) != 1 or self._source(f) is None:
                    continue
                for j, other in enumerate(lists):
                    for g in other if i != j else ():
                        extra = set(g.letters) - set(f.letters)
                        if f.letters[0] in g.letters and extra and self._outer(extra, f, g, values[j], other):
                            for h in mine:
                                if extra & set(h.letters) and f.letters[0] not in h.letters:
                                    self.request_split(f, h, extra)

    def _outer(self, extra: set[int], f: Factor, g: Factor, value: Value, factors: Sequence[Factor]) -> bool:
        """Whether the extra letters of a joint factor are the outer ones: its operand knows them without it."""
        if not self.axes.injective(g.labels):
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

    def _source(self, factor: Factor):  # noqa: ANN202
        family = self.axes.family(factor.labels)
        if family is None or family.param is None:
            return None
        return family

    def request_split(self, inner: Factor, outer: Factor, batch: set[int]) -> None:
        """Ask that ``inner``'s parameter axis get an order of its own for every batch position of ``outer``'s axis."""
        family = self._source(inner)
        if family is None or family.by:
            return
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
        if (classes < 0).any() or (family.param, axis.axis, family.axis) in self.requests:
            return
        self.requests.setdefault((family.param, family.axis, axis.axis), classes)

    def _same_param(self, outer: Factor, param: str):  # noqa: ANN202
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

    # ------------------------------------------------------------ moving data
    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """View: regroup letters, splitting one where an axis ends inside it."""
        todo = list(value.letters)
        axes: list[tuple[int, ...]] = []
        for n in shape:
            mine: list[int] = []
            have = 1
            while have < n:
                letter = todo.pop(0)
                length = value.size[letter]
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
        return Value(tuple(axes), dict(value.size), value.factors, value.pinned)

    def _cut(self, value: Value, letter: int, outer: int) -> tuple[Value, tuple[int, int]]:
        before = set(value.size)
        value = split_letter(value, letter, [outer, value.size[letter] // outer])
        made = [c for c in value.letters if c not in before]
        return value, (made[0], made[1])

    def _merge_run(self, value: Value, run: list[int], todo: list[int], n: int) -> tuple[Value, int, int]:
        used = 0
        flat = Value((tuple(value.letters),), value.size, value.factors, value.pinned)
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
        value, letter = self.merge_axis(value, axis)
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
        return Value(axes, size, factors, pinned)

    def piece(self, value: Value, axis: int, index: np.ndarray) -> Value:
        """`take` that singles out its positions only when the piece is used for anything but to be joined again."""
        before = len(self.axes.marks)
        out = self.take(value, axis, index)
        marks = self.axes.marks[before:]
        if out is value:
            return out
        del self.axes.marks[before:]
        out.points = value.points
        out.obligations = [lambda: self.axes.marks.extend(marks), *value.obligations] if marks else value.obligations
        out.origin = (value, axis, np.asarray(index))
        return out

    def concatenate(self, values: Sequence[Value], axis: int, same: Sequence[object]) -> Value:
        """Join along one axis; ``same[i]`` is equal for operands that are the very same tensor."""
        singles = [self._segment(v, axis) for v in values]
        lengths = [v.shape[axis] for v in values]
        hidden = [Value(tuple(() if k == axis else a for k, a in enumerate(v.axes)), v.size, v.factors, v.pinned) for v in singles]
        own = [v.axes[axis] for v in singles]
        aligned, axes, size = self.align(hidden)
        for v in singles:
            size.update({c: v.size[c] for a in [v.axes[axis]] for c in a})
        both = self.combine(aligned, axes, size)
        made = new_letter()
        inner = {c for a in own for c in a}
        total = sum(lengths)
        rest = [f for f in both.factors if not inner & set(f.letters)]
        parts = [[f for f in both.factors if set(a) & set(f.letters)] for a in own]
        pinned = both.pinned - inner
        size_out = {c: n for c, n in size.items() if c not in inner} | {made: total}
        axes_out = tuple((made,) if k == axis else a for k, a in enumerate(axes))
        if not any(parts) and all(set(a) <= both.pinned for a in own) and len(set(map(id, same))) == len(same):
            return Value(axes_out, size_out, rest, pinned | {made})
        joint = self._join_segments(both, own, parts, lengths, same, made)
        if joint is not None:
            rest.append(joint)
        return Value(axes_out, size_out, rest, pinned)

    def _segment(self, value: Value, axis: int) -> Value:
        value, letter = self.merge_axis(value, axis)
        return value if letter is None else rename(value, {letter: new_letter()})

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
        used: dict[int, np.ndarray] = {}
        constant: dict[int, np.ndarray] = {}
        for letters, factors, who in zip(own, parts, map(id, same), strict=True):
            segment = self._operand_factor(both, letters, factors, constant.setdefault(who, self.axes.fresh((1,))))
            # two different tensors may carry the same labels, and equal labels must mean equal values
            if any(np.intersect1d(segment.labels, labels).size for other, labels in used.items() if other != who):
                segment = Factor(segment.letters, self.axes.refine(segment.labels))
            used[who] = np.union1d(used.get(who, segment.labels), segment.labels)
            segments.append(segment)
        outer = list(dict.fromkeys(c for f, mine in zip(segments, own, strict=True) for c in f.letters if c not in mine))
        arrays = []
        for segment, letters, n in zip(segments, own, lengths, strict=True):
            labels = spread(segment, (*letters, *outer), both.size)
            arrays.append(labels if letters else np.broadcast_to(labels[None], (n, *labels.shape)))
        return drop_constant(Factor((made, *outer), np.concatenate(arrays)))

    def _operand_factor(
        self, both: Value, letters: tuple[int, ...], factors: Sequence[Factor], constant: np.ndarray
    ) -> Factor:
        pins = set(letters) & both.pinned
        if factors:
            return self._joint(both, factors, pins)
        shape = tuple(both.size[c] for c in letters)
        if not pins:
            return Factor(letters, np.broadcast_to(constant.reshape([1] * len(shape)), shape).copy())
        labels = self.axes.fresh(shape)
        self.axes.pin(labels, "position in a concatenation")
        return Factor(letters, labels)

    # ------------------------------------------------------------ constants
    def constant(self, array: np.ndarray) -> Value:
        """A tensor by its values: positions with equal slices are interchangeable, all others pinned."""
        value = plain(array.shape)
        if _exchangeable(array):
            first, second = (a for a in value.axes if a)
            rows, columns = self.axes.fresh((array.shape[-1],)), self.axes.fresh((array.shape[-1],))
            self.axes.tie(rows, columns)
            value.factors = [Factor(first, rows), Factor(second, columns)]
            return value
        for k, axis in enumerate(value.axes):
            if not axis:
                continue
            classes = _slice_classes(array, k)
            count = int(classes.max()) + 1
            if count == array.shape[k]:
                value.pinned.add(axis[0])
            elif count > 1:
                labels = self.axes.fresh((array.shape[k],))
                self.axes.mark(labels, classes)
                value.factors.append(Factor(axis, labels))
        return value


def _exchangeable(array: np.ndarray) -> bool:
    """Whether this is one number on the diagonal of a square and another off it."""
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] < 3:
        return False
    expected = np.full_like(array, array[0, 1])
    np.fill_diagonal(expected, array[0, 0])
    return array[0, 0] != array[0, 1] and np.array_equal(array, expected)


def _slice_classes(array: np.ndarray, axis: int) -> np.ndarray:
    """Number the distinct slices along an axis: equal slices get equal numbers."""
    n = array.shape[axis]
    rows = np.moveaxis(array, axis, 0).reshape(n, -1)
    if rows.dtype.kind in "fc":
        rows = rows + 0.0  # one zero
    if bool((rows == rows[:1]).all()):
        return np.zeros(n, np.int64)
    rows = np.ascontiguousarray(rows)
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.int64)


__all__ = ["MAX_JOINT", "Engine"]
