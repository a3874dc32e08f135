"""The search against brute force over all automorphisms of tiny axis structures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge._search import UnitSet, search
from automerge._structure import Structure
from automerge.rules._axes import Axes

Image = tuple[int, ...]


@st.composite
def structures(draw: st.DrawFn, most: int = 6) -> Axes:
    """Families with ties, edges (copies, containers, anything that is a function) and marks."""
    axes = Axes()
    families: list[np.ndarray] = []
    left = most
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, max(1, min(4, left))))
        if n <= left:
            families.append(axes.fresh((n,)))
            left -= n
    for _ in range(draw(st.integers(0, 3))):
        a, b = draw(st.sampled_from(families)), draw(st.sampled_from(families))
        what = draw(st.sampled_from(["tie", "edge", "edge", "mark", "copy"]))
        if what == "tie" and a.size == b.size:
            axes.tie(a, b)
        elif what == "mark":
            axes.mark(a, np.array([draw(st.integers(0, 1)) for _ in range(a.size)]))
        elif what == "copy" and a.size == b.size:
            axes.edge(a, draw(st.permutations(b.tolist()).map(np.array)))
        elif what == "edge":
            axes.edge(a, np.array([draw(st.sampled_from(b.tolist())) for _ in range(a.size)]))
    return axes


def united(axes: Axes) -> np.ndarray:
    """Raw vertex -> united vertex, numbered as the structure numbers them."""
    return np.unique(axes.root[: axes.count], return_inverse=True)[1]


def facts(axes: Axes) -> tuple[set[tuple[int, ...]], list[int]]:
    """Every typed edge and mark over united vertices, and the class of each vertex."""
    at = united(axes).tolist()
    family = axes.family_of[: axes.count].tolist()
    known: set[tuple[int, ...]] = set()
    for event, (source, target) in enumerate(axes.edges):
        known |= {
            (0, event, family[s], family[t], at[s], at[t])
            for s, t in zip(source.tolist(), target.tolist(), strict=True)
        }
    for event, (labels, values) in enumerate(axes.marks):
        known |= {(1, event, family[v], x, at[v], at[v]) for v, x in zip(labels.tolist(), values.tolist(), strict=True)}
    klass = [0] * (max(at) + 1)
    for v, u in enumerate(at):
        klass[u] = axes.class_of[family[v]]
    return known, klass


def automorphisms(axes: Axes) -> Iterator[Image]:
    """All of them, by trying every permutation."""
    known, klass = facts(axes)
    for image in itertools.permutations(range(len(klass))):
        if all(klass[v] == klass[w] for v, w in enumerate(image)) and preserves(image, known):
            yield image


def preserves(image: Image, known: set[tuple[int, ...]]) -> bool:
    return all((*fact[:4], image[fact[4]], image[fact[5]]) in known for fact in known)


def exchanges(found: list[UnitSet], n: int) -> Iterator[Image]:
    """The exchange of any two units of any set."""
    for units in found:
        for u, v in itertools.combinations(range(units.table.shape[0]), 2):
            image = list(range(n))
            for a, b in zip(units.table[u].tolist(), units.table[v].tolist(), strict=True):
                image[a], image[b] = b, a
            yield tuple(image)


def generated(generators: list[Image], n: int) -> set[Image]:
    """The group that some permutations generate."""
    group, todo = {tuple(range(n))}, [tuple(range(n))]
    while todo:
        one = todo.pop()
        for g in generators:
            made = tuple(g[v] for v in one)
            if made not in group:
                group.add(made)
                todo.append(made)
    return group


def support(image: Image) -> frozenset[int]:
    return frozenset(v for v, w in enumerate(image) if v != w)


def smallest(group: set[Image]) -> list[Image]:
    """The involutions whose support contains no smaller involution's."""
    swaps = [g for g in group if support(g) and all(g[g[v]] == v for v in range(len(g)))]
    supports = {support(g) for g in swaps}
    return [g for g in swaps if not any(s < support(g) for s in supports)]


@settings(max_examples=300)
@given(structures())
def test_every_set_is_one_of_automorphisms(axes: Axes) -> None:
    found = search(Structure(axes))
    known, klass = facts(axes)
    for image in exchanges(found, len(klass)):
        assert sorted(image) == list(range(len(klass)))
        assert all(klass[v] == klass[w] for v, w in enumerate(image))
        assert preserves(image, known)


@settings(max_examples=300)
@given(structures())
def test_colours_never_separate_what_an_automorphism_exchanges(axes: Axes) -> None:
    colour = Structure(axes).colour
    for image in automorphisms(axes):
        assert all(colour[v] == colour[w] for v, w in enumerate(image))


@settings(max_examples=300)
@given(structures())
def test_nothing_is_missing(axes: Axes) -> None:
    """Where the group is generated by its smallest exchanges, which is all that sets of units can express."""
    group = set(automorphisms(axes))
    n = len(next(iter(group)))
    if generated(smallest(group), n) != group:
        return
    found = generated(list(exchanges(search(Structure(axes)), n)), n)
    assert found == group


def test_wanted_drops_sets_that_move_no_parameter() -> None:
    axes = Axes()
    one = axes.fresh((3,), param="w")
    axes.fresh((2,))
    structure = Structure(axes)
    wanted = np.zeros(structure.n, bool)
    wanted[structure.index[one]] = True
    assert sorted(s.table.shape for s in search(structure)) == [(2, 1), (3, 1)]
    assert [s.table.shape for s in search(structure, wanted)] == [(3, 1)]


def test_containers_make_a_wreath_product() -> None:
    axes = Axes()
    inner, outer = axes.fresh((6,)), axes.fresh((2,))
    axes.edge(inner, np.repeat(outer, 3))
    sizes = [s.table.shape for s in search(Structure(axes))]
    assert sorted(sizes) == [(2, 4), (3, 1), (3, 1)]


def test_the_search_is_deterministic() -> None:
    def tables() -> list[list[list[int]]]:
        axes = Axes()
        a, b = axes.fresh((4,)), axes.fresh((4,))
        axes.edge(a, b[[1, 0, 3, 2]])
        axes.mark(a, np.array([0, 0, 0, 1]))
        return [s.table.tolist() for s in search(Structure(axes))]

    assert tables() == tables()
