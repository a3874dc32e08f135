"""Units of which pairs have entries: coordinates found from exchanges, and what is built on them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge._search import search
from automerge._squares import squared
from automerge._structure import Structure
from automerge.blocks import decompose
from automerge.rules._axes import Axes
from automerge.symmetry import Generator, Slot, Symmetry
from tests import _symmetries as hand

Vertex = tuple[Any, ...]


def exchanged(vertices: list[Vertex], names: dict[Vertex, int], k: int) -> dict[int, int]:
    """What the exchange of unit 0 with unit k does to vertices ``(kind, *units)``."""
    swap = {0: k, k: 0}
    image = {names[v]: names[(v[0], *(swap.get(u, u) for u in v[1:]))] for v in vertices}
    return {a: b for a, b in image.items() if a != b}


@given(n=st.integers(3, 6), singles=st.integers(1, 3), pairs=st.integers(1, 2), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_coordinates_are_found_again(n: int, singles: int, pairs: int, seed: int) -> None:
    vertices: list[Vertex] = [(f"s{c}", u) for c in range(singles) for u in range(n)]
    vertices += [(f"p{c}", i, j) for c in range(pairs) for i, j in itertools.permutations(range(n), 2)]
    order = np.random.default_rng(seed).permutation(1000)[: len(vertices)].tolist()
    names = dict(zip(vertices, order, strict=True))
    found = squared([exchanged(vertices, names, k) for k in range(1, n)])
    assert found is not None
    table, arrays = found
    assert sorted(table.T.tolist()) == sorted([names[f"s{c}", u] for u in range(n)] for c in range(singles))
    planted = np.array([[[names.get((f"p{c}", i, j), -1) for j in range(n)] for i in range(n)] for c in range(pairs)])
    if n > 3:  # with three units an ordered pair is an element of the group, and any of them may be called the first
        wanted = {a.tobytes() for p in planted for a in (p, p.T.copy())}
        assert all(a.astype(planted.dtype).tobytes() in wanted for a in arrays)
    for k in range(1, n):  # whatever the names: the exchange acts on them
        p = np.arange(n)
        p[[0, k]] = k, 0
        image = exchanged(vertices, names, k)
        for a in arrays:
            assert all(image.get(int(a[i, j]), int(a[i, j])) == a[p[i], p[j]] for i, j in np.argwhere(a >= 0))


@pytest.mark.parametrize("other", ["unordered", "triples", "none"])
def test_other_actions_are_no_squares(other: str) -> None:
    n = 5
    vertices: list[Vertex] = [("s", u) for u in range(n)]
    vertices += [("p", i, j) for i, j in itertools.permutations(range(n), 2) if other != "none"]
    if other == "triples":
        vertices += [("t", *t) for t in itertools.permutations(range(n), 3)]
    names = {v: i for i, v in enumerate(vertices)}
    if other == "unordered":
        names |= {("p", i, j): names["p", min(i, j), max(i, j)] for i, j in itertools.permutations(range(n), 2)}
    assert squared([exchanged(vertices, names, k) for k in range(1, n)]) is None


def test_what_does_not_act_as_the_exchanges_do_is_refused() -> None:
    """Each exchange moves as many vertices as it should, but two of them do not make the third."""
    n = 4
    vertices: list[Vertex] = [("s", u) for u in range(n)] + [("p", *t) for t in itertools.permutations(range(n), 2)]
    names = {v: i for i, v in enumerate(vertices)}
    images = [exchanged(vertices, names, k) for k in range(1, n)]
    assert squared(images) is not None
    a, b = names["p", 0, 1], names["p", 1, 0]
    c = names["p", 2, 3]
    images[0] = {v: w for v, w in images[0].items() if v not in (a, b)} | {a: c, c: a}
    assert squared(images) is None


@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_family_of_pairs_is_one_set(n: int, diagonal: bool) -> None:
    axes = Axes()
    units, pairs = axes.fresh((n,), param="a"), axes.fresh((n, n), param="w")
    axes.edge(pairs, np.broadcast_to(units[:, None], (n, n)))
    axes.edge(pairs, np.broadcast_to(units[None], (n, n)))
    if diagonal:
        axes.mark(pairs, np.eye(n, dtype=np.int64))
    (found,) = search(Structure(axes))
    assert found.table.shape == (n, 2)  # the units themselves, and the diagonal
    assert [p.shape for p in found.pairs] == [(n, n)]


def test_two_slots_of_one_axis_act_one_after_the_other() -> None:
    n = 3
    symmetry = hand.outer_square(n, 1)
    p = np.array([2, 0, 1])
    moved = symmetry.element([p]).apply_to("bias", np.arange(1 + n * n))
    assert moved[1:].reshape(n, n).tolist() == (1 + np.arange(n * n).reshape(n, n)[np.ix_(p, p)]).tolist()


def test_blocks_have_the_space_of_the_units_twice() -> None:
    block = next(b for b in decompose(hand.outer_square(4, 2)).blocks if b.param == "pairs")
    assert block.shape[:3] == (4, 4, 2)
    assert block.spaces[0] == block.spaces[1] is not None


def test_slots_that_overlap_otherwise_are_left_out() -> None:
    """Two slots of one generator that share a position and make no square."""
    unit = np.arange(3)[:, None]
    symmetry = Symmetry({"a": (5, 2)}, (Generator(3, (Slot("a", 0, unit), Slot("a", 0, unit + 2))),))
    assert decompose(symmetry).structure.dropped == {0}
