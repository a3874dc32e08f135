"""Git Re-Basin, pairwise Frank-Wolfe and synchronisation: monotone, 1-opt, brute force, known answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from automerge._tree import Perms
from automerge.blocks import Blocks, decompose
from automerge.groups import Element
from automerge.io import StateDict
from automerge.matchers import (
    FrankWolfe,
    Matcher,
    MergeMany,
    Pairwise,
    PairwiseFrankWolfe,
    Synchronised,
    WeightMatching,
    match,
)
from automerge.matchers._base import Progress
from automerge.matchers._elements import compose, inverse
from automerge.matchers._pairwise import Pair
from automerge.matchers._polish import Polisher
from automerge.matchers._starts import identity_elements
from automerge.matchers._synchronised import _spectral
from automerge.objective import Objective
from automerge.symmetry import Symmetry
from tests import _symmetries as hand

torch.set_num_threads(1)


def dot(symmetry: Symmetry, a: StateDict, b: StateDict) -> float:
    """The inner product of what the group moves, statistics left out."""
    moving = {s.param for g in symmetry.generators() for s in g.slots} - symmetry.statistics
    return math.fsum(float((a[n].double() * b[n].double()).sum()) for n in moving)


def pair_sum(symmetry: Symmetry, models: Sequence[StateDict]) -> float:
    return math.fsum(dot(symmetry, a, b) for a, b in itertools.combinations(models, 2))


def all_elements(symmetry: Symmetry) -> Iterator[Element]:
    """Every element, inner generators before the outer ones, as the symmetry lists them."""
    for perms in itertools.product(*(itertools.permutations(range(g.size)) for g in symmetry.generators())):
        yield symmetry.element([list(p) for p in perms])


# -------------------------------------------------------------------- monotone, 1-opt
# siblings on one space: the oracle alternates them, and is not exact
SIBLINGS = {"grouped_query"}


@pytest.mark.parametrize("start", ["signature", "identity"])
@pytest.mark.parametrize("name", hand.ALL)
def test_weight_matching_climbs_to_a_point_that_no_single_move_improves(name: str, start: str) -> None:
    symmetry = hand.ALL[name]()
    models = [hand.weights(symmetry, seed) for seed in range(3)]
    result = match(models, symmetry, WeightMatching(start=start, dtype="float64", restarts=1))
    ends = result.apply(models)
    assert all(torch.equal(ends[0][n], models[0][n]) for n in models[0])
    total = 0.0
    for m in (1, 2):
        stats = result.stats["pairs"][f"0-{m}"]
        assert len(stats["runs"]) == 2
        assert all((np.diff(r["objective"]) > 0).all() for r in stats["runs"])
        best = max(r["objective"][-1] for r in stats["runs"])
        assert stats["objective"] == pytest.approx(max(best, stats["start_objective"]), rel=1e-12)
        gained = dot(symmetry, models[0], ends[m]) - dot(symmetry, models[0], models[m])
        assert stats["objective"] - stats["start_objective"] == pytest.approx(gained, rel=1e-9)
        total += stats["objective"]
        if best > stats["start_objective"] and name not in SIBLINGS:
            assert not improvable(symmetry, [ends[0], ends[m]], fixed=frozenset({0}))
    assert result.stats["reference_objective"] == pytest.approx(total)
    gained = pair_sum(symmetry, ends) - pair_sum(symmetry, models)
    assert result.stats["objective"] - result.stats["start_objective"] == pytest.approx(gained, rel=1e-4, abs=1e-4)


def improvable(symmetry: Symmetry, models: Sequence[StateDict], fixed: frozenset[int] = frozenset()) -> bool:
    """Whether one assignment of one tree of one model gains."""
    objective = Objective(decompose(symmetry), models, dtype=torch.float64)
    polisher = Polisher(objective, identity_elements(objective), fixed)
    places = itertools.product((m for m in range(len(models)) if m not in fixed), polisher.trees)
    return any(polisher.move(m, root) > 0 for m, root in places)


@pytest.mark.parametrize("start", ["signature", "identity"])
@pytest.mark.parametrize("name", hand.ALL)
def test_merge_many_climbs_to_a_point_that_no_single_move_improves(name: str, start: str) -> None:
    symmetry = hand.ALL[name]()
    models = [hand.weights(symmetry, seed) for seed in range(4)]
    result = match(models, symmetry, MergeMany(start=start, dtype="float64", restarts=1))
    assert len(result.stats["runs"]) == 2
    assert all((np.diff(r["objective"]) > 0).all() for r in result.stats["runs"])
    best = max(r["objective"][-1] for r in result.stats["runs"])
    assert result.stats["objective"] == pytest.approx(max(best, result.stats["start_objective"]), rel=1e-12)
    gained = pair_sum(symmetry, result.apply(models)) - pair_sum(symmetry, models)
    assert result.stats["objective"] - result.stats["start_objective"] == pytest.approx(gained, rel=1e-9)
    if best > result.stats["start_objective"] and name not in SIBLINGS:
        assert not improvable(symmetry, result.apply(models))


def test_more_restarts_are_never_worse() -> None:
    symmetry = hand.residual(10, 3)
    models = [hand.weights(symmetry, seed) for seed in range(3)]
    for name, key in (("pair", "reference_objective"), ("many", "objective")):
        values = []
        for restarts in (0, 2, 8):
            matcher: Matcher = WeightMatching(restarts=restarts) if name == "pair" else MergeMany(restarts=restarts)
            values.append(match(models, symmetry, matcher).stats[key])
        assert values == sorted(values)
        assert values[-1] > values[0]


# -------------------------------------------------------------------- brute force
SMALL = {
    "chain": lambda: hand.mlp((3, 3, 4, 2)),
    "square": lambda: hand.residual(4, 1),
    "groups": lambda: hand.grouped_conv(2, 2, 2),
    "product": lambda: hand.outer_product(3, 4),
    "batched": lambda: hand.batched(2, 3, 2),
    "towers": lambda: hand.towers(2, 2, 2),
}
SEARCHES: dict[str, Matcher] = {
    "weights": WeightMatching(restarts=60, dtype="float64"),
    "many": MergeMany(restarts=60, dtype="float64"),
    "frank-wolfe": PairwiseFrankWolfe(solver=FrankWolfe(restarts=24, dtype="float64")),
}


# where two free axes of one tensor make it quadratic, Frank-Wolfe's restarts do not always lead to the optimum
MISSED = {("frank-wolfe", "square"), ("frank-wolfe", "product"), ("frank-wolfe", "batched")}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("matcher", SEARCHES)
def test_two_models_reach_the_optimum_over_the_whole_group(matcher: str, name: str, seed: int) -> None:
    symmetry = SMALL[name]()
    models = [hand.weights(symmetry, 10 * seed + i) for i in range(2)]
    best = max(dot(symmetry, models[0], symmetry.apply(models[1], e)) for e in all_elements(symmetry))
    ends = match(models, symmetry, SEARCHES[matcher]).apply(models)
    assert dot(symmetry, *ends) <= best + 1e-9
    if (matcher, name) not in MISSED:
        assert dot(symmetry, *ends) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_three_models_reach_the_optimum(seed: int) -> None:
    symmetry = hand.mlp((2, 3, 3, 2))
    models = [hand.weights(symmetry, 10 * seed + i) for i in range(3)]
    moved = [[symmetry.apply(m, e) for e in all_elements(symmetry)] for m in models[1:]]
    best = max(pair_sum(symmetry, [models[0], a, b]) for a, b in itertools.product(*moved))
    ends = match(models, symmetry, MergeMany(restarts=30, dtype="float64")).apply(models)
    assert pair_sum(symmetry, ends) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_one_group_is_one_assignment(n: int) -> None:
    """Without restarts: a single linear problem is solved exactly by every matcher."""
    symmetry = hand.mlp((3, n, 2))
    for seed in range(5):
        models = [hand.weights(symmetry, 10 * seed + i) for i in range(2)]
        best = max(dot(symmetry, models[0], symmetry.apply(models[1], e)) for e in all_elements(symmetry))
        for matcher in (WeightMatching(), MergeMany(), PairwiseFrankWolfe(), Synchronised(WeightMatching())):
            ends = match(models, symmetry, matcher).apply(models)
            assert dot(symmetry, *ends) == pytest.approx(best, rel=1e-6)


# -------------------------------------------------------------------- pairwise
@pytest.mark.parametrize("reference", [0, 2])
@pytest.mark.parametrize("name", ["mlp", "heads", "grouped_conv"])
def test_each_pair_is_matched_without_the_others(name: str, reference: int) -> None:
    symmetry = hand.ALL[name]()
    models = [hand.weights(symmetry, seed) for seed in range(4)]
    for matcher in (WeightMatching(reference), PairwiseFrankWolfe(reference)):
        result = match(models, symmetry, matcher)
        for m in {0, 1, 2, 3} - {reference}:
            alone = match([models[reference], models[m]], symmetry, type(matcher)())
            assert result.between(m, reference) == alone.between(1, 0)
    solo = match([models[reference], models[1]], symmetry, FrankWolfe(anchor=0))
    assert solo.between(1, 0) == match(models, symmetry, PairwiseFrankWolfe(reference)).between(1, reference)


# -------------------------------------------------------------------- synchronisation
@dataclass(frozen=True)
class Given(Pairwise):
    """Answers with maps that are given: (first key, second key) of the models -> element."""

    maps: Any = field(default_factory=dict)

    def pair(self, blocks: Blocks, models: Sequence[StateDict], progress: Progress | None = None) -> Pair:
        a, b = (int(m["tag"]) for m in models)
        return Pair(self.maps[a, b], {"objective": 0.0, "start_objective": 0.0})


def tagged(symmetry: Symmetry, count: int) -> tuple[Symmetry, list[StateDict]]:
    models = [{**hand.weights(symmetry, i), "tag": torch.tensor(float(i))} for i in range(count)]
    return Symmetry({**symmetry.shapes, "tag": ()}, symmetry.sets, symmetry.statistics), models


def consistent(symmetry: Symmetry, count: int, seed: int) -> dict[tuple[int, int], Perms]:
    """Maps of all ordered pairs through one universe; (a, b) brings b to a."""
    structure = decompose(symmetry).structure
    rng = np.random.default_rng(seed)
    own = [{r: p for root in structure.roots for r, p in structure.random(root, rng).items()} for _ in range(count)]
    every = itertools.product(range(count), repeat=2)
    return {(a, b): compose(structure, own[b], inverse(structure, own[a])) for a, b in every}


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("name", hand.ALL)
def test_consistent_maps_are_returned_exactly(name: str, count: int) -> None:
    symmetry, models = tagged(hand.ALL[name](), count)
    maps = consistent(symmetry, count, seed=count)
    structure = decompose(symmetry).structure
    result = match(models, symmetry, Synchronised(Given(count - 1, maps)))
    assert result.stats["cycle_error_before"] == 0.0
    assert result.stats["agreement"] == 1.0
    for (a, b), element in maps.items():
        assert result.between(b, a) == structure.element(symmetry, element)
    assert result.to_universe[count - 1].is_identity()


@pytest.mark.parametrize("name", ["mlp", "heads", "towers", "grouped_conv"])
def test_one_wrong_map_is_outvoted(name: str) -> None:
    """With five models every pair has three detours; the synchronised maps are the ones behind the noise."""
    symmetry, models = tagged(hand.ALL[name](), 5)
    right = consistent(symmetry, 5, seed=1)
    maps = dict(right)
    maps[1, 3] = consistent(symmetry, 5, seed=99)[1, 3]
    structure = decompose(symmetry).structure
    result = match(models, symmetry, Synchronised(Given(0, maps)))
    assert result.stats["cycle_error_before"] > 0
    assert result.stats["agreement"] < 1
    assert result.cycle_error() == 0.0
    assert all(result.between(b, a) == structure.element(symmetry, e) for (a, b), e in right.items())


def test_the_cycle_error_before_is_the_share_displaced_around_triangles() -> None:
    """Three models of four units: two maps are the identity, the third swaps two units."""
    symmetry, models = tagged(hand.mlp((2, 4, 2)), 3)
    structure = decompose(symmetry).structure
    none = {0: np.arange(4)}
    swap = {0: np.array([1, 0, 2, 3])}
    assert structure.roots == (0,)
    maps = {(0, 1): none, (0, 2): none, (1, 2): swap}
    result = match(models, symmetry, Synchronised(Given(0, maps)))
    assert result.stats["cycle_error_before"] == 0.5
    assert result.stats["agreement"] == pytest.approx(1 - 0.5 / 3)


@pytest.mark.parametrize("seed", range(4))
def test_the_spectral_step_is_the_papers(seed: int) -> None:
    """Where every position is connected with every other, it is the leading eigenspace of the whole matrix."""
    rng = np.random.default_rng(seed)
    n, count = 4, 5
    maps = {(a, b): rng.permutation(n) for a, b in itertools.combinations(range(count), 2)}
    full = np.eye(n * count)
    for (a, b), sigma in maps.items():
        full[a * n + np.arange(n), b * n + sigma] = full[b * n + sigma, a * n + np.arange(n)] = 1
    values, vectors = np.linalg.eigh(full)
    assert values[-n] - values[-n - 1] > 1e-6
    leading = vectors[:, -n:] @ vectors[:, -n:].T
    ours = _spectral(maps, count, n, reference=2)
    assert np.allclose(ours, leading.reshape(count, n, count, n)[2].transpose(1, 0, 2))


def test_synchronised_uses_the_pairwise_matcher_and_says_so() -> None:
    symmetry = hand.mlp()
    models = [hand.weights(symmetry, seed) for seed in range(3)]
    seen: list[dict[str, Any]] = []
    result = match(models, symmetry, Synchronised(WeightMatching(reference=1)), progress=seen.append)
    assert set(result.stats["pairs"]) == {"0-1", "1-2", "0-2"}
    assert {(s["reference"], s["model"]) for s in seen} == {(0, 1), (1, 2), (0, 2)}
    assert result.to_universe[1].is_identity()
    assert 0 < result.stats["cycle_error_before"] <= 1
    assert 0 <= result.stats["agreement"] < 1
