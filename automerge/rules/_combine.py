"""Combine, reduce, contract: the heart of the rules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from automerge.rules._splits import Splits
from automerge.rules._value import Factor, Value, spread


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
            order = list(large.letters)
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
            both = Factor(f.letters, self.axes.relabel(f.labels, labels))
            return both, both
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
