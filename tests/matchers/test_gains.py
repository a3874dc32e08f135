"""Gains that are renewed where something has changed are those that are computed anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from automerge.blocks import decompose
from automerge.matchers import _gains
from automerge.matchers._gains import Gains
from automerge.matchers._polish import Polisher
from automerge.matchers._starts import identity_elements
from automerge.objective import Objective
from tests import _symmetries as hand

KEPT = {
    "chain": lambda: hand.mlp((3, 30, 25, 2)),
    "conv": lambda: hand.conv_flatten(20, 3, 2),
    "residual": lambda: hand.residual(24, 3, tied=False),
    "outer": lambda: hand.outer_product(24, 20),
}


def setup(name: str, count: int = 3) -> Objective:
    symmetry = (hand.ALL | KEPT)[name]()
    return Objective(decompose(symmetry), [hand.weights(symmetry, seed) for seed in range(count)], dtype=torch.float64)


@pytest.fixture(autouse=True)
def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gains, "_SMALL", 0)


def check(polisher: Polisher, m: int, root: int) -> bool:
    """Ask for gains and compare them; whether they were renewed rather than computed again."""
    rest = {b: polisher.total[b] - polisher.moved[b][m] for b in polisher.bundles[root]}
    before = polisher.gains._kept.get((m, root))
    age = before.age if before else 0
    found = {s: g.copy() for s, g in polisher.gains.of(m, root, rest).items()}
    fresh = Gains(polisher.objective, polisher.sigma).of(m, root, rest)
    assert found.keys() == fresh.keys()
    for space, gain in fresh.items():
        np.testing.assert_allclose(found[space], gain, rtol=0, atol=1e-11 * max(1.0, np.abs(gain).max()))
    after = polisher.gains._kept.get((m, root))
    return before is not None and after is before and after.age > age


def exchange(polisher: Polisher, m: int, root: int, rng: np.random.Generator, pairs: int) -> None:
    """Move one model by some exchanges of units of one tree, and by nothing else."""
    structure = polisher.objective.blocks.structure
    other = structure.random(root, rng)
    perms = {}
    for role, now in ((r, polisher.elements[m][r]) for r in other):
        new = now.reshape(-1, now.shape[-1]).copy()
        for _ in range(pairs if new.shape[1] > 1 else 0):
            row = rng.integers(len(new))
            a, b = rng.choice(new.shape[1], 2, replace=False)
            new[row, [a, b]] = new[row, [b, a]]
        perms[role] = new.reshape(now.shape)
    spaces = polisher.objective.blocks.spaces
    sigma = {k: structure.induced(perms, spaces[k].roles) for k in polisher.trees[root]}
    rest = {b: polisher.total[b] - polisher.moved[b][m] for b in polisher.bundles[root]}
    polisher._accept(m, perms, sigma, rest, polisher._after(m, sigma, rest))


@given(st.sampled_from(sorted({*KEPT, *hand.ALL})), st.integers(0, 10**6), st.integers(2, 4))
def test_renewed_gains_are_those_computed_anew(name: str, seed: int, count: int) -> None:
    objective = setup(name, count)
    polisher = Polisher(objective, identity_elements(objective))
    rng = np.random.default_rng(seed)
    roots = list(polisher.trees)
    for _ in range(30):
        m, root = int(rng.integers(count)), roots[rng.integers(len(roots))]
        if rng.random() < 0.4:
            exchange(polisher, m, root, rng, int(rng.integers(1, 3)))
        else:
            check(polisher, m, root)


@pytest.mark.parametrize("name", KEPT)
def test_few_changes_are_renewed_and_many_are_not(name: str) -> None:
    objective = setup(name)
    polisher = Polisher(objective, identity_elements(objective))
    rng = np.random.default_rng(0)
    for root in polisher.trees:
        assert not check(polisher, 0, root)  # nothing is kept yet
        assert check(polisher, 0, root)  # and nothing has changed
        for other in polisher.trees:
            exchange(polisher, 1, other, rng, 1)
        assert check(polisher, 0, root)
        for m in (1, 2):
            for other in polisher.trees:
                exchange(polisher, m, other, rng, 60)
        assert not check(polisher, 0, root)


def test_what_an_ascent_reaches_does_not_depend_on_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for small in (0, 1 << 60):
        monkeypatch.setattr(_gains, "_SMALL", small)
        objective = setup("residual")
        polisher = Polisher(objective, identity_elements(objective))
        polisher.run(np.random.default_rng(0), 50)
        ends.append(polisher.elements)
        assert bool(polisher.gains._kept) == (small == 0)
    for one, two in zip(*ends, strict=True):
        assert all(np.array_equal(one[r], two[r]) for r in one)
