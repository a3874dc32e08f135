"""Combine, reduce, contract: the heart of the rules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from automerge.rules._axes import determines
from automerge.rules._splits import Splits
from automerge.rules._value import Factor, Value, new_letter, rename, spread


class Combine(Splits):
    """The operations that relate the vertices of several operands."""

    def elementwise(self, values: Sequence[Value]) -> Value:
        """A function of the operands at the same (broadcast) position."""
        if len(values) == 1:
            return values[0]
        aligned, axes, size = self.align(values)
        return self.combine(aligned, axes, size)

    def combine(self, values: Sequence[Value], axes: tuple[tuple[int, ...], ...], size: dict[int, int]) -> Value:
        """The tuple of several tensors over common letters: tie what overlaps, drop what is determined by the rest."""
        values, chosen = self._same_choices(values, set(size))
        size = size | {c: v.size[c] for v in values for c in v.chosen}
        pinned = set().union(*(v.pinned for v in values))
        lists: list[list[Factor]] = []
        for v in values:
            wanted = {c for f in v.factors for c in f.letters} & (pinned - v.pinned)
            lists.append(list((self.pin_letters(v, wanted, "meets a pinned axis") if wanted else v).factors))
        self._ask_splits(values, lists)
        before: list[Factor] = []
        now = [f for fs in lists for f in fs]
        while len(before) != len(now) or any(f is not g for f, g in zip(before, now, strict=True)):
            before = now  # and again where a factor was refined on the way
            for b, c in itertools.combinations(range(len(lists)), 2):
                for i, j in itertools.product(range(len(lists[c])), range(len(lists[b]))):
                    self._consistent(lists, c, i, b, j)
            now = [f for fs in lists for f in fs]
        kept = self._prune(now, pinned)
        return Value(axes, dict(size), kept, pinned & set(size), chosen=chosen)

    def _same_choices(
        self, values: Sequence[Value], letters: set[int]
    ) -> tuple[Sequence[Value], dict[int, tuple[int, ...]]]:
        """Operands whose chosen letters are equal only where they were read at the same places."""
        chosen: dict[int, tuple[int, ...]] = {}
        if not self.choices:
            return values, chosen
        out = []
        for v in values:
            names: dict[int, int] = {}
            lost = {c for f in v.factors for c in f.letters} - letters - set(v.chosen)
            if lost:  # a rule that does not know of choices: nothing may be joint with them any more
                v = self.reduce(v, lost)
            here = {c for a in v.axes for c in a}
            for c, by in v.chosen.items():
                if not set(by) <= here or chosen.get(c, by) != by:
                    names[c] = new_letter()
            v = rename(v, names) if names else v
            chosen |= v.chosen
            out.append(v)
        return out, chosen

    def _consistent(self, lists: list[list[Factor]], a: int, i: int, b: int, j: int) -> None:
        """Make two factors of different operands agree on the letters that they share."""
        f, g = lists[a][i], lists[b][j]
        if f.letters == g.letters:
            self._same_letters(lists, a, i, b, j)
            return
        common = [c for c in f.letters if c in g.letters]
        if not common:
            return
        if len(common) == len(f.letters) == len(g.letters):
            self._same_letters(lists, a, i, b, j)
            return
        if len(common) == len(f.letters) or len(common) == len(g.letters):
            small, large = (f, (b, j)) if len(common) == len(f.letters) else (g, (a, i))
            wide = self.make_injective(lists[large[0]], large[1])
            size = dict(zip(wide.letters, wide.labels.shape, strict=True))
            self.axes.edge(wide.labels, spread(small, list(wide.letters), size))
            return
        f, g = self.make_injective(lists[a], i), self.make_injective(lists[b], j)
        for k in (h for fs in lists for h in fs):
            if set(k.letters) == set(common) and k.injective:
                return  # both have edges to that factor already, or get them as a pair
        fa = [c for c in f.letters if c in common]
        ga = [c for c in g.letters if c in common]
        one = self.axes.project(f.labels, tuple(f.letters.index(c) for c in fa))
        two = self.axes.project(g.labels, tuple(g.letters.index(c) for c in ga))
        self.axes.tie(one, two.transpose([ga.index(c) for c in fa]))

    def _same_letters(self, lists: list[list[Factor]], a: int, i: int, b: int, j: int) -> None:
        f, g = lists[a][i], lists[b][j]
        one, two = f.injective, g.injective
        if one and two and any(h.injective and _same(h.letters, f.letters) for fs in lists[:b] for h in fs):
            return  # both are tied to that one
        labels = self._like(g, f)
        if one and two:
            self.axes.tie(f.labels, labels)
        elif np.array_equal(f.labels, labels):
            return
        elif one or (not two and determines(f.labels, labels)):
            self.axes.edge(f.labels, labels)
        elif two or determines(labels, f.labels):
            self.axes.edge(labels, f.labels)
        else:
            both = Factor(f.letters, self.axes.relabel(f.labels, labels))
            self.replace(lists[a], i, both)
            self.replace(lists[b], j, both)

    def _prune(self, factors: list[Factor], pinned: set[int]) -> list[Factor]:
        """Drop factors that smaller kept ones (and pins) already determine; the edges between them stand."""
        unique: dict[tuple[tuple[int, ...], bytes], Factor] = {}
        for f in factors:
            unique.setdefault((f.letters, f.labels.tobytes()), f)
        # among equals, an injective one determines a copy, so it comes first
        order = sorted(unique.values(), key=lambda f: (len(f.letters), not f.injective))
        kept: list[Factor] = []
        for f in order:
            letters, covered = set(f.letters), set(pinned)
            for k in kept:
                if letters.issuperset(k.letters) and k.injective:
                    covered.update(k.letters)
            if letters <= covered:
                continue
            if not any(letters == set(k.letters) and np.array_equal(self._like(k, f), f.labels) for k in kept):
                kept.append(f)
        return kept

    @staticmethod
    def _like(k: Factor, f: Factor) -> np.ndarray:
        return k.labels if k.letters == f.letters else k.labels.transpose([k.letters.index(c) for c in f.letters])

    def reduce(self, value: Value, letters: set[int]) -> Value:
        """A symmetric function over some letters (sum, maximum, ...); the axes keep their place with those letters gone.

        What was read at places that depend on those letters is no longer joint with the choice.
        """
        if self.choices:
            here = {c for a in value.axes for c in a} - letters
            lost = {c for f in value.factors for c in f.letters} - here - set(value.chosen)
            letters = letters | lost | {c for c, by in value.chosen.items() if not set(by) <= here}
        factors = list(value.factors)
        for i, f in enumerate(factors):
            if letters & set(f.letters) and not (set(f.letters) <= letters and self._determined(f, factors)):
                self.make_injective(factors, i)  # how often a label occurs must count
        kept = [f for f in factors if not letters & set(f.letters)]
        for f in factors:
            if not letters & set(f.letters):
                continue
            rest = tuple(k for k, c in enumerate(f.letters) if c not in letters)
            if not rest:
                continue
            left = {f.letters[k] for k in rest}
            covered = set(value.pinned)
            for k in kept:
                if set(k.letters) <= left and k.injective:
                    covered |= set(k.letters)
            if left <= covered:
                continue
            kept.append(Factor(tuple(f.letters[k] for k in rest), self.axes.project(f.labels, rest)))
        axes = tuple(tuple(c for c in a if c not in letters) for a in value.axes)
        size = {c: n for c, n in value.size.items() if c not in letters}
        chosen = {c: by for c, by in value.chosen.items() if c not in letters}
        return Value(axes, size, kept, value.pinned - letters, chosen=chosen)

    def _determined(self, f: Factor, factors: Sequence[Factor]) -> bool:
        """Whether another factor of the value has an edge from every position to the labels of this one."""
        return any(set(g.letters) > set(f.letters) and g.injective for g in factors)

    def pin_all(self, value: Value, reason: str) -> Value:
        """Give every coordinate of a tensor a meaning."""
        value = self.reduce(value, set(value.chosen)) if self.choices else value
        return self.pin_letters(value, {c for axis in value.axes for c in axis}, reason)

    def contract(self, a: Value, b: Value, out: tuple[tuple[int, ...], ...], batch: set[int]) -> Value:
        """Sum of products over the letters that ``out`` lacks; a and b already share letters where they are paired."""
        letters = {c for v in (a, b) for axis in v.axes for c in axis}
        (a, b), chosen = self._same_choices((a, b), letters)
        self._ask_batched((a, b), batch | set(chosen))
        size = {c: n for v in (a, b) for c, n in v.size.items() if c in letters}
        both = self.combine([a, b], (tuple(size),), size)
        keep = {c for axis in out for c in axis}
        reduced = self.reduce(both, set(size) - keep)
        kept = {c: reduced.size[c] for c in (*keep, *reduced.chosen)}
        return Value(out, kept, reduced.factors, reduced.pinned, chosen=reduced.chosen)


def _same(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether these are the same letters, in any order."""
    return a == b or set(a) == set(b)
