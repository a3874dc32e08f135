"""Arrays of tree elements: the group laws, and orders that no labelling changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge._tree import Perms, Structure
from automerge.blocks import decompose
from automerge.matchers._elements import canonical, compose, inverse, random_elements
from automerge.objective import Objective
from tests import _symmetries as hand

torch.set_num_threads(1)


def draw(structure: Structure, rng: np.random.Generator) -> Perms:
    return {r: p for root in structure.roots for r, p in structure.random(root, rng).items()}


def same(a: Perms, b: Perms) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[r], b[r]) for r in a)


@pytest.mark.parametrize("name", hand.ALL)
@given(seed=st.integers(0, 2**30))
@settings(max_examples=4)
def test_composition_and_inverse_are_those_of_the_group(name: str, seed: int) -> None:
    symmetry = hand.ALL[name]()
    structure = decompose(symmetry).structure
    rng = np.random.default_rng(seed)
    a, b, c = (draw(structure, rng) for _ in range(3))
    one, other = structure.element(symmetry, a), structure.element(symmetry, b)
    assert structure.element(symmetry, compose(structure, a, b)) == one.then(other)
    assert structure.element(symmetry, inverse(structure, a)) == one.inverse()
    left = compose(structure, compose(structure, a, b), c)
    assert same(left, compose(structure, a, compose(structure, b, c)))
    none = {r: p for root in structure.roots for r, p in structure.identity(root).items()}
    assert same(compose(structure, a, inverse(structure, a)), none)
    assert same(compose(structure, inverse(structure, a), a), none)


@pytest.mark.parametrize("name", hand.ALL)
def test_canonical_and_random_orders_do_not_depend_on_the_labelling(name: str) -> None:
    symmetry = hand.ALL[name]()
    blocks = decompose(symmetry)
    models = [hand.weights(symmetry, seed) for seed in range(3)]
    moves = [symmetry.random_element(seed) for seed in range(3)]
    others = [symmetry.apply(m, e) for m, e in zip(models, moves, strict=True)]

    def ends(models: list[dict[str, torch.Tensor]], reference: int | None) -> list[list[dict[str, torch.Tensor]]]:
        objective = Objective(blocks, models, dtype=torch.float64)
        lists = [canonical(objective), random_elements(objective, np.random.default_rng(0), reference)]
        return [
            [symmetry.apply(m, blocks.structure.element(symmetry, e)) for m, e in zip(models, elements, strict=True)]
            for elements in lists
        ]

    for one, other in zip(ends(models, None), ends(others, None), strict=True):
        assert all(torch.equal(a[n], b[n]) for a, b in zip(one, other, strict=True) for n in a)
    one, other = ends(models, 1)[1], ends(others, 1)[1]
    assert all(torch.equal(one[1][n], models[1][n]) for n in models[1])
    back = [symmetry.apply(m, moves[1].inverse()) for m in other]
    assert all(torch.equal(a[n], b[n]) for a, b in zip(one, back, strict=True) for n in a)
