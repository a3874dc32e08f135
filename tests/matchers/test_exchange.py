"""Exchanges of two units, where one group acts on two axes of a tensor."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.blocks import decompose
from automerge.matchers import FrankWolfe, match
from automerge.matchers._exchange import exchange_gains
from automerge.matchers._polish import Polisher
from automerge.matchers._starts import identity_elements, induced
from automerge.objective import Objective
from tests import _symmetries as hand
from tests._all_pairs import AllPairs


@given(seed=st.integers(0, 2**30), n=st.integers(2, 7), pinned=st.integers(1, 3), one=st.booleans())
@settings(max_examples=40, deadline=None)
def test_gains_are_those_of_the_exchange(seed: int, n: int, pinned: int, one: bool) -> None:
    """Every exchange is carried out on the tensors."""
    g = torch.Generator().manual_seed(seed)
    d, y = torch.randn(2, 1, n, pinned, n, generator=g, dtype=torch.float64)
    e, z = torch.randn(2, 1, n, pinned, generator=g, dtype=torch.float64)
    pieces = [(d, y, (1, 3)), *([(e, z, (1,))] if one else [])]
    gains = exchange_gains(pieces)
    for a, b in itertools.product(range(n), repeat=2):
        order = torch.arange(n)
        order[[a, b]] = order[[b, a]]
        gain = (d * (y[:, order][:, :, :, order] - y)).sum()
        if one:
            gain += (e * (z[:, order] - z)).sum()
        assert float(gains[a, b]) == pytest.approx(float(gain), abs=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_the_end_cannot_be_improved_by_an_exchange(seed: int) -> None:
    symmetry = hand.residual(6, 2)
    models = [hand.weights(symmetry, 10 * seed + i) for i in range(3)]
    objective = Objective(decompose(symmetry), models, dtype=torch.float64)
    elements = identity_elements(objective)
    polisher = Polisher(objective, elements)
    gained = polisher.run(np.random.default_rng(0), 100)
    start = objective.value(induced(objective, identity_elements(objective)))
    value = objective.value(induced(objective, elements))
    assert value == pytest.approx(start + gained, abs=1e-9 * objective.scale)
    for m, (a, b) in itertools.product(range(3), itertools.combinations(range(6), 2)):
        other = [{r: p.copy() for r, p in e.items()} for e in elements]
        (root,) = other[m]
        other[m][root][[a, b]] = other[m][root][[b, a]]
        assert objective.value(induced(objective, other)) <= value + 1e-6 * objective.scale


@pytest.mark.parametrize("seed", range(0, 30, 3))
def test_square_blocks_end_not_below_the_all_pairs_loop(seed: int) -> None:
    symmetry = hand.residual(8, 2)
    blocks = decompose(symmetry)
    models = [hand.weights(symmetry, seed + i) for i in range(3)]
    oracle = AllPairs(blocks, models)
    rounded = oracle.vertices(oracle.iterate(30)[1])
    theirs = oracle.value([[torch.eye(len(s), dtype=torch.float64)[torch.from_numpy(s)] for s in v] for v in rounded])
    assert match(models, symmetry, FrankWolfe(dtype="float64")).stats["objective"] >= float(theirs) - 1e-9
