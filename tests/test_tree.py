"""Nested structure, and the linear maximisation oracle against brute force over the whole group."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge._assignment import assign
from automerge._oracle import maximise
from automerge._tree import Perms, Structure
from automerge.blocks import decompose
from automerge.symmetry import Generator, Slot, Symmetry
from tests import _symmetries as hand

SHARED = {"grouped_query"}


def group(structure: Structure, root: int) -> Iterator[Perms]:
    """Every element of one tree."""
    roles = structure.descendants(root)
    cells = [(r, path) for r in roles for path in np.ndindex(*structure.path_shape(r))]
    choices = [list(itertools.permutations(range(structure.roles[r].size))) for r, _ in cells]
    for pick in itertools.product(*choices):
        perms = structure.identity(root)
        for (r, path), p in zip(cells, pick, strict=True):
            perms[r][path] = p
        yield perms


def total(structure: Structure, gains: dict[tuple[int, ...], np.ndarray], perms: Perms) -> float:
    return sum(float(g[np.arange(len(g)), structure.induced(perms, q)].sum()) for q, g in gains.items())


def random_gains(name: str, seed: int) -> Iterator[tuple[Structure, int, dict[tuple[int, ...], np.ndarray]]]:
    small = {
        "heads": lambda: hand.heads(3, 2, 3),
        "grouped_query": lambda: hand.grouped_query(2, 2, 2, 3),
        "grouped_conv": lambda: hand.grouped_conv(2, 2, 3),
        "experts": lambda: hand.experts(3, 2, 4),
        "towers": lambda: hand.towers(2, 2, 2),
        "mlp": lambda: hand.mlp((2, 5, 4, 2)),
    }
    blocks = decompose(small[name]())
    rng = np.random.default_rng(seed)
    for root in blocks.structure.roots:
        yield (
            blocks.structure,
            root,
            {s.roles: rng.normal(size=(s.size, s.size)) for s in blocks.spaces if s.root == root},
        )


@pytest.mark.parametrize("name", ["mlp", "heads", "grouped_conv", "experts", "towers"])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_oracle_is_brute_force(name: str, seed: int) -> None:
    for structure, root, gains in random_gains(name, seed):
        value, perms = maximise(structure, root, gains)
        best = max(total(structure, gains, p) for p in group(structure, root))
        assert value == pytest.approx(best)
        assert total(structure, gains, perms) == pytest.approx(value)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_shared_siblings_reach_what_no_single_role_improves(seed: int) -> None:
    for structure, root, gains in random_gains("grouped_query", seed):
        value, perms = maximise(structure, root, gains)
        everything = [total(structure, gains, p) for p in group(structure, root)]
        assert total(structure, gains, perms) == pytest.approx(value)
        assert value <= max(everything) + 1e-9
        assert value >= np.quantile(everything, 0.9)


@pytest.mark.parametrize("name", hand.ALL)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_oracle_returns_a_vertex_for_its_own_matrix(name: str, seed: int) -> None:
    """Rounding a vertex returns it: the oracle on a permutation matrix finds that permutation."""
    blocks = decompose(hand.ALL[name]())
    rng = np.random.default_rng(seed)
    for root in blocks.structure.roots:
        perms = blocks.structure.random(root, rng)
        spaces = [s for s in blocks.spaces if s.root == root]
        gains = {s.roles: np.eye(s.size)[blocks.structure.induced(perms, s.roles)] for s in spaces}
        value, found = maximise(blocks.structure, root, gains)
        assert value == pytest.approx(sum(s.size for s in spaces))
        for s in spaces:
            expected = blocks.structure.induced(perms, s.roles)
            assert np.array_equal(blocks.structure.induced(found, s.roles), expected)


def test_a_tree_without_gains_stays() -> None:
    structure = decompose(hand.mlp()).structure
    value, perms = maximise(structure, 0, {})
    assert value == 0
    assert np.array_equal(perms[0], np.arange(7))


@given(n=st.integers(1, 6), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_assign_is_brute_force(n: int, seed: int) -> None:
    gain = np.random.default_rng(seed).normal(size=(n, n)).astype(np.float32)
    best = max(gain[np.arange(n), list(p)].sum() for p in itertools.permutations(range(n)))
    assert gain[np.arange(n), assign(gain)].sum() == pytest.approx(best)


def test_roles_of_attention() -> None:
    structure = decompose(hand.heads(3, 2, 5)).structure
    assert sorted((len(r.path), r.size, len(r.members)) for r in structure.roles) == [
        (0, 3, 1),
        (0, 5, 1),
        (1, 2, 3),
        (1, 2, 3),
    ]


@pytest.mark.parametrize(
    ("count", "outer"),
    [(4, [[[0, 2], [1, 3]], [[0, 1], [2, 3]]]), (3, [[[0], [1], [2]], [[1], [2]]])],
    ids=["a grid", "some of others"],
)
def test_what_permutes_least_of_what_overlaps_is_left_out(count: int, outer: list[list[list[int]]]) -> None:
    """Experts that may be exchanged in two ways, each with five units of its own."""
    hidden = [Generator(5, (Slot("w", 1, hand.units(5), ((0, e, e + 1),)),)) for e in range(count)]
    experts = [Generator(len(units), (Slot("w", 0, np.array(units)),)) for units in outer]
    structure = decompose(Symmetry({"w": (count, 5)}, (*hidden, *experts))).structure
    (left,) = structure.dropped
    assert left >= count
    assert sorted(len(r.members) for r in structure.roles) in ([1, count], [1, 2, 2])
