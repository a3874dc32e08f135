"""What inference knows of one tensor: letters, factors and pins.

Every tensor axis is a product of *letters* (einops-like). A *factor* is an array of vertices over some letters. Writing
L(i) for the tuple of labels that the factors give to position i, the claim that every rule keeps is::

    x[i] depends on i only through L(i) and the coordinates of pinned letters,
    and for every group element g:  x_after[i'] = x_before[i]  whenever  L(i') = g L(i)  and pinned letters agree;

moreover g maps the set of labels that occur onto itself. A letter without factor or pin is one along which x is constant.

A *chosen* letter is on no axis: x is a larger tensor, for which the claim holds, read at one place of that letter which
depends on data and on the coordinates of other letters (an expert's weights for every token). Two values that were read
at the same places share the letter, so that what is joint with it keeps its own order in every expert.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from automerge.rules._axes import Unruled, distinct

SELECTED = ("select",)  # first among the functions of a piece of length one whose axis is gone
_letters = itertools.count(1)


@dataclass(frozen=True)
class Factor:
    """An array of vertices over ``letters``; not constant along any of them."""

    letters: tuple[int, ...]
    labels: np.ndarray

    def __post_init__(self) -> None:
        assert self.labels.ndim == len(self.letters)

    @functools.cached_property
    def injective(self) -> bool:
        """Whether no vertex is named twice (judged on raw vertices, never on united ones)."""
        return distinct(self.labels)

    def renamed(self, names: Mapping[int, int]) -> Factor:
        """The same labels over other letters."""
        out = Factor(tuple([names.get(c, c) for c in self.letters]), self.labels)
        if "injective" in vars(self):
            vars(out)["injective"] = self.injective
        return out


@dataclass(frozen=True, eq=False)
class Points:
    """What the entries of an index tensor stand for: positions along some axis.

    Attributes:
        code: the one-hot coding of the entries: the index tensor's axes, and one of these positions behind them.
        stride: the entries are positions times this number.
        walk: for a constant that goes up along one of its axes: which, counted from the last one, that being 1.
        beside: for a sum with such a constant: its ``walk``, and what it was added to.
        order: for the order of all positions: along which axis they are listed, counted from the last one, that being 1.
    """

    code: Value
    stride: int = 1
    walk: int = 0
    beside: tuple[int, Points] | None = None
    order: int = 0

    @property
    def size(self) -> int:
        """How many positions there are."""
        return self.code.shape[-1]


@dataclass
class Value:
    """The structure of one tensor.

    Attributes:
        axes: for each tensor axis its letters, outer first; an axis of length one has none.
        size: letter -> length.
        factors: the factors.
        pinned: letters whose coordinate means itself.
        data: the tensor itself, if it depends on nothing but constants.
        origin: for a slice: the value it was taken from, the axis, the positions, and the functions applied since.
        points: for an index tensor whose entries are positions that may be permuted.
        promises: constraints on that axis, to be made unless the entries are only used to read from it or write to it.
        obligations: constraints on the tensor's own axes, to be made unless the pieces of a slice are joined again.
        chosen: letter on no axis -> the letters on whose coordinates its place depends.
    """

    axes: tuple[tuple[int, ...], ...]
    size: dict[int, int]
    factors: list[Factor] = field(default_factory=list)
    pinned: set[int] = field(default_factory=set)
    data: Any = None
    origin: tuple[Value, int, np.ndarray, tuple[str, ...]] | None = None
    points: Points | None = None
    promises: list[Callable[[], None]] = field(default_factory=list)
    obligations: list[Callable[[], None]] = field(default_factory=list)
    chosen: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def settle(self) -> Value:
        """Keep promises and meet obligations: called before any rule that is not known to carry them."""
        while self.promises:
            self.promises.pop()()
        self.points = None
        return self.whole()

    def whole(self) -> Value:
        """Meet the obligations alone: the tensor is read as it is, and its entries may still be positions."""
        while self.obligations:
            self.obligations.pop()()
        self.origin = None
        return self

    def carry(self, other: Value, move: Move | None = None) -> Value:
        """Take over what another value promises, for rules that leave its entries as they are, or move them.

        Args:
            other: the operand.
            move: what was done to it, as a function of a value and of the lengths of further axes that it has at its end.
        """
        self.points, self.promises, self.obligations = other.points, other.promises, other.obligations
        if self.points is not None and move is not None:
            try:
                code = move(self.points.code, (self.points.size,))
            except Unruled:  # too large to follow
                other.settle()
                self.points, self.promises = None, []
            else:
                self.points = replace(self.points, code=code, walk=0, beside=None, order=0)
        return self

    def moved(self, move: Move) -> Value:
        """The value with its entries at other places, and what it promises."""
        return move(self, ()).carry(self, move)

    def after(self, function: str) -> Value:
        """A slice after a function of its entries: it can still be joined with others after the same function."""
        out = self.with_axes(self.axes)
        assert self.origin is not None
        out.origin = (*self.origin[:3], (*self.origin[3], function))
        out.promises, out.obligations = self.promises, self.obligations
        return out

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        size = self.size
        return tuple([size[axis[0]] if len(axis) == 1 else math.prod([size[c] for c in axis]) for axis in self.axes])

    @property
    def letters(self) -> tuple[int, ...]:
        """All letters in order."""
        return tuple(c for axis in self.axes for c in axis)

    def touching(self, letter: int) -> list[Factor]:
        """The factors that depend on a letter."""
        return [f for f in self.factors if letter in f.letters]

    def with_axes(self, axes: Iterable[Sequence[int]]) -> Value:
        """The same content under other axes; letters that vanish must be constant ones."""
        new = tuple(tuple(a) for a in axes)
        keep = {c for a in new for c in a} | set(self.chosen)
        size = {c: self.size[c] for c in keep}
        return Value(new, size, list(self.factors), self.pinned & keep, chosen=self.chosen)


Move = Callable[[Value, tuple[int, ...]], Value]


class ConstantValue(Value):
    """A constant tensor whose structure is worked out when a rule first asks for it (an index table may be large)."""

    def __init__(self, data: Any, make: Callable[[tuple[tuple[int, ...], ...]], tuple[list[Factor], set[int]]]) -> None:
        empty = plain(data.shape)
        self.axes, self.size, self.data = empty.axes, empty.size, data
        self.origin, self.points, self.promises, self.obligations, self.chosen = None, None, [], [], {}
        self._make = make
        self._made: tuple[list[Factor], set[int]] | None = None

    def _structure(self) -> tuple[list[Factor], set[int]]:
        if self._made is None:
            self._made = self._make(self.axes)
        return self._made

    @property
    def factors(self) -> list[Factor]:  # type: ignore[override]
        """The factors."""
        return self._structure()[0]

    @property
    def pinned(self) -> set[int]:  # type: ignore[override]
        """The letters whose coordinate means itself."""
        return self._structure()[1]


def new_letter() -> int:
    """A letter that no tensor has yet."""
    return next(_letters)


def plain(shape: Sequence[int], *, pinned: bool = False) -> Value:
    """A tensor that is constant along every axis, or pinned along every axis."""
    axes: list[tuple[int, ...]] = []
    size: dict[int, int] = {}
    for n in shape:
        if n == 1:
            axes.append(())
            continue
        letter = new_letter()
        size[letter] = int(n)
        axes.append((letter,))
    return Value(tuple(axes), size, [], set(size) if pinned else set())


def drop_constant(factor: Factor) -> Factor | None:
    """Remove the letters along which a factor's labels do not change; None when none is left."""
    letters, labels = list(factor.letters), factor.labels
    for k in reversed(range(labels.ndim)):
        n = labels.shape[k]
        first = labels.take(0, axis=k)
        # a look at the last slice spares the comparison of the whole array
        if n == 1 or (
            np.array_equal(first, labels.take(n - 1, axis=k)) and bool((labels == np.expand_dims(first, k)).all())
        ):
            labels = first
            del letters[k]
    return Factor(tuple(letters), np.ascontiguousarray(labels)) if letters else None


def split_letter(value: Value, letter: int, sizes: Sequence[int]) -> Value:
    """Write one letter as a product of several (outer first)."""
    sizes = [int(n) for n in sizes]
    assert int(np.prod(sizes)) == value.size[letter]
    parts = [new_letter() for _ in sizes]
    keep = [p for p, n in zip(parts, sizes, strict=True) if n > 1]
    axes = tuple(tuple(q for c in axis for q in (keep if c == letter else [c])) for axis in value.axes)
    size = {c: n for c, n in value.size.items() if c != letter}
    size.update({p: n for p, n in zip(parts, sizes, strict=True) if n > 1})
    factors = []
    for f in value.factors:
        if letter not in f.letters:
            factors.append(f)
            continue
        k = f.letters.index(letter)
        wide = [n for n in sizes if n > 1]
        labels = f.labels.reshape(*f.labels.shape[:k], *wide, *f.labels.shape[k + 1 :])
        reduced = drop_constant(Factor((*f.letters[:k], *keep, *f.letters[k + 1 :]), labels))
        if reduced is not None:
            factors.append(reduced)
    pinned = (value.pinned - {letter}) | (set(keep) if letter in value.pinned else set())
    chosen = {c: tuple(q for b in by for q in (keep if b == letter else [b])) for c, by in value.chosen.items()}
    return Value(axes, size, factors, pinned, chosen=chosen)


def rename(value: Value, names: Mapping[int, int]) -> Value:
    """The value with letters renamed, all at once."""
    get = names.get
    return Value(
        tuple([tuple([get(c, c) for c in a]) for a in value.axes]),
        {get(c, c): n for c, n in value.size.items()},
        [f.renamed(names) for f in value.factors],
        {get(c, c) for c in value.pinned},
        chosen={get(c, c): tuple([get(b, b) for b in by]) for c, by in value.chosen.items()},
    )


def copy_letters(value: Value) -> Value:
    """The value under new letters, so that it can stand beside itself in one operator."""
    return rename(value, {c: new_letter() for c in value.size if c not in value.chosen})


def spread(factor: Factor, letters: Sequence[int], size: dict[int, int]) -> np.ndarray:
    """The factor's labels as an array over ``letters`` (a superset of its own), broadcast."""
    order = [c for c in letters if c in factor.letters]
    labels = factor.labels.transpose([factor.letters.index(c) for c in order])
    view = [size[c] if c in factor.letters else 1 for c in letters]
    return np.broadcast_to(labels.reshape(view), [size[c] for c in letters])


def common_refinement(a: Sequence[int], b: Sequence[int]) -> list[int] | None:
    """The coarsest list of sizes that refines two factorisations of the same number, or None.

    >>> common_refinement([6, 4], [2, 12])
    [2, 3, 4]
    """
    if list(a) == list(b):
        return [n for n in a if n > 1]
    cuts = sorted(set(np.cumprod(list(a)[::-1]).tolist()) | set(np.cumprod(list(b)[::-1]).tolist()))
    out, last = [], 1
    for cut in cuts:
        if cut % last:
            return None
        if cut // last > 1:
            out.append(cut // last)
        last = cut
    return out[::-1]


def refine_axis(value: Value, axis: int, sizes: Sequence[int]) -> Value:
    """Split the letters of one axis so that their sizes become ``sizes`` (a refinement of them)."""
    todo = list(sizes)
    if todo == [value.size[c] for c in value.axes[axis]]:
        return value
    for letter in value.axes[axis]:
        n = value.size[letter]
        parts: list[int] = []
        while math.prod(parts) < n:
            parts.append(todo.pop(0))
        if len(parts) > 1:
            value = split_letter(value, letter, parts)
    return value


def repetition(index: np.ndarray) -> tuple[int, np.ndarray, int]:
    """Positions as some that come several times over, each several times in a row.

    >>> repetition(np.array([2, 2, 5, 5, 2, 2, 5, 5]))
    (2, array([2, 5]), 2)
    """
    changes = np.flatnonzero(np.diff(index)) + 1
    each = math.gcd(index.size, *changes.tolist()) if index.size else 1
    once = index[::each]
    n = once.size
    for period in range(1, n // 2 + 1):
        if n % period == 0 and once[0] == once[period] and (once.reshape(-1, period) == once[:period]).all():
            return n // period, once[:period], each
    return 1, once, each


def widened(value: Value, axis: int, times: int, each: int) -> Value:
    """All positions of an axis several times over, each of them several times in a row."""
    outer, inner = new_letter(), new_letter()
    made = {c: n for c, n in ((outer, times), (inner, each)) if n > 1}
    letters = tuple(c for c in (outer, *value.axes[axis], inner) if c in made or c not in (outer, inner))
    axes = (*value.axes[:axis], letters, *value.axes[axis + 1 :])
    return Value(axes, value.size | made, list(value.factors), set(value.pinned), chosen=value.chosen)
