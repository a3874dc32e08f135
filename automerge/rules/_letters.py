"""Letters of values: pinning, merging, joining, aligning operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from automerge.rules._axes import Axes, determines
from automerge.rules._value import Factor, Value, common_refinement, new_letter, refine_axis, rename, spread


class Letters:
    """Operations on the letters of values over one `Axes`.

    Attributes:
        axes: the vertices and their relations.
        notes: what a reader of the answer must know.
        several: whether graphs of several inputs are read.
        choices: index tensor (by identity) -> the letter of what is read at its positions, and the tensor to keep it alive.
        functions: tensor (by identity) and the name of a function -> that function of it, and the tensor to keep it alive.
    """

    def __init__(self) -> None:
        self.axes = Axes()
        self.notes: dict[str, None] = {}
        self.several = False
        self.choices: dict[int, tuple[int, Value]] = {}
        self.functions: dict[tuple[int, str], tuple[Value, Value]] = {}

    def choice(self, index: Value) -> int:
        """The letter of everything that is read at the positions which an index tensor gives."""
        return self.choices.setdefault(id(index), (new_letter(), index))[0]

    def same_choice(self, first: Any, again: Any) -> None:
        """An index tensor holds the same positions as an earlier one."""
        if id(first) in self.choices:
            self.choices[id(again)] = self.choices[id(first)][0], again

    def make_injective(self, factors: list[Factor], i: int) -> Factor:
        """See to it that factor i of a value names no vertex twice, with a fresh vertex per position if it does."""
        if not factors[i].injective:
            self.replace(factors, i, Factor(factors[i].letters, self.axes.refine(factors[i].labels)))
        return factors[i]

    def replace(self, factors: list[Factor], i: int, finer: Factor) -> None:
        """Put a finer factor in the place of factor i; those that determined the old one must determine the new one.

        The new one leads to those over fewer letters: its vertices are positions, which the old labels may not have told.
        """
        finer = factors[i] = self._leading(finer, [f for j, f in enumerate(factors) if j != i])
        for j, other in enumerate(factors):
            if j != i and set(finer.letters) <= set(other.letters):
                other = self.make_injective(factors, j)
                size = dict(zip(other.letters, other.labels.shape, strict=True))
                self.axes.edge(other.labels, spread(finer, other.letters, size))

    def _leading(self, made: Factor, others: Sequence[Factor]) -> Factor:
        """A new factor with edges to the others of its value over some of its letters, finer where these tell more."""
        size = dict(zip(made.letters, made.labels.shape, strict=True))
        inner = [spread(f, made.letters, size) for f in others if set(f.letters) < set(made.letters)]
        if not all(made.injective or determines(made.labels, labels) for labels in inner):
            made = Factor(made.letters, self.axes.refine(made.labels))
        for labels in inner:
            self.axes.edge(made.labels, labels)
        return made

    def pin_letters(self, value: Value, letters: set[int], reason: str) -> Value:
        """Give the coordinates of some letters a meaning."""
        letters = letters & set(value.size)
        factors = list(value.factors)
        for i in range(len(factors)):
            inside = [c for c in factors[i].letters if c in letters]
            if inside and len(inside) == len(factors[i].letters):
                self.pin_factor(factors[i], reason)
            elif inside:
                self._mark_coordinates(self.make_injective(factors, i), inside, reason)
        factors = [f for f in factors if not set(f.letters) <= letters]
        return Value(value.axes, value.size, factors, value.pinned | letters, chosen=value.chosen)

    def pin_factor(self, factor: Factor, reason: str) -> None:
        """Fix every vertex of a factor."""
        self.axes.pin(factor.labels, reason)

    def fix_letter(self, value: Value, letter: int, reason: str) -> Value:
        """Pin one letter in a way that still shows which parameter's axis it is, so that others may be split by it."""
        own = [f for f in value.factors if f.letters == (letter,)]
        for f in own:
            self.pin_factor(f, reason)
        return value if own and letter not in value.pinned else self.pin_letters(value, {letter}, reason)

    def _pin_places(self, factor: Factor, letters: Sequence[int], reason: str) -> None:
        """The coordinates of some letters stay; what else a factor is over (groups of channels) may move along with it."""
        if len(letters) == len(factor.letters) or not factor.injective:
            self.axes.pin(factor.labels, reason)
        else:
            self._mark_coordinates(factor, letters, reason)
            self.axes.reasons.append((factor.labels.reshape(-1), reason, self.axes.where))

    def _mark_coordinates(self, factor: Factor, letters: Sequence[int], reason: str) -> None:
        shape = factor.labels.shape
        at = np.zeros(shape, np.int64)
        for c in letters:
            k = factor.letters.index(c)
            view = [1] * len(shape)
            view[k] = shape[k]
            at = at * shape[k] + np.arange(shape[k]).reshape(view)
        self.axes.mark(factor.labels, at)

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
        chosen = {c: _merged(by, letters, one) for c, by in value.chosen.items()}
        if pins and not touched and pins != inside:  # copies of pinned positions stay copies
            fixed = tuple(c for c in letters if c in pins)
            labels = self.axes.fresh(tuple(value.size[c] for c in fixed))
            self.axes.pin(labels, "joined with a pinned axis")
            whole = spread(Factor(fixed, labels), letters, value.size)
            return Value(tuple(axes), size, [*rest, Factor((one,), whole.reshape(-1).copy())], pinned, chosen=chosen)
        if pins == inside:
            rest += [self._over_merged(value, f, letters, one) for f in touched if set(f.letters) - inside]
            return Value(tuple(axes), size, rest, pinned | {one}, chosen=chosen)
        if touched:
            joint = self._joint(value, touched, pins)
            outer = tuple(c for c in joint.letters if c not in inside)
            full = spread(joint, (*outer, *letters), value.size)
            labels = np.ascontiguousarray(full).reshape([*(value.size[c] for c in outer), total])
            rest.append(Factor((*outer, one), labels))
        return Value(tuple(axes), size, rest, pinned, chosen=chosen)

    def _over_merged(self, value: Value, factor: Factor, letters: tuple[int, ...], one: int) -> Factor:
        """A factor that is joint with pinned letters, over the product of those letters."""
        outer = tuple(c for c in factor.letters if c not in letters)
        whole = set(letters) <= set(factor.letters)
        labels = np.ascontiguousarray(spread(factor, (*outer, *letters), value.size))
        labels = labels.reshape([*(value.size[c] for c in outer), -1])
        made = Factor((*outer, one), labels)
        if not whole:
            made = Factor(made.letters, self.axes.refine(labels))
            self._leading(made, value.factors)
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
        self._leading(made, [f for f in value.factors if all(f is not g for g in factors)])
        if pins:
            self._mark_coordinates(made, sorted(pins), "joined with a pinned axis")
        return made

    def align(self, values: Sequence[Value]) -> tuple[list[Value], tuple[tuple[int, ...], ...], dict[int, int]]:
        """Broadcast: the values over common letters, and the axes of the result with the letters' lengths."""
        ndim = max([len(v.axes) for v in values])
        out = [v if len(v.axes) == ndim else v.with_axes(((),) * (ndim - len(v.axes)) + v.axes) for v in values]
        axes: list[tuple[int, ...]] = []
        size: dict[int, int] = {}
        names: list[dict[int, int]] = [{} for _ in out]
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
                out[i] = self.merge_axis(out[i], k)[0] if sizes is None else refine_axis(out[i], k, sizes)
                mine = out[i].axes[k]
                # the first one's own, if nothing remembers letters that an operand has lost
                letters = letters or (tuple([new_letter() for _ in mine]) if i or self.choices else mine)
                if letters is not mine:
                    names[i].update(zip(mine, letters, strict=True))
            axes.append(letters)
            size.update({c: out[who[0]].size[o] for o, c in zip(out[who[0]].axes[k], letters, strict=True)})
        return [rename(v, to) if to else v for v, to in zip(out, names, strict=True)], tuple(axes), size


def _merged(by: tuple[int, ...], letters: tuple[int, ...], one: int) -> tuple[int, ...]:
    """Where a run of letters became one, in the letters that a place depends on; other orders stay as they are."""
    for k in range(len(by)):
        if by[k : k + len(letters)] == letters:
            return (*by[:k], one, *by[k + len(letters) :])
    return by
