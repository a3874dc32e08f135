"""Frank-Wolfe against the all-pairs oracle and scipy's FAQ; monotonicity; interruption; options."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import quadratic_assignment

from automerge._errors import MatchingError
from automerge._polynomial import maximise_polynomial
from automerge._state import State
from automerge.blocks import decompose
from automerge.matchers import FrankWolfe, match
from automerge.matchers._polish import Polisher
from automerge.matchers._starts import identity_elements, induced, signature, vertices
from automerge.objective import Objective
from automerge.symmetry import Generator, Slot, Symmetry
from tests import _symmetries as hand
from tests._all_pairs import AllPairs

torch.set_num_threads(1)


def models_of(symmetry: Symmetry, count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    return [hand.weights(symmetry, seed + i) for i in range(count)]


def worth(gradient: list[torch.Tensor], permutations: list[np.ndarray]) -> float:
    """The linearised objective at a vertex."""
    return sum(float(g[np.arange(len(p)), p].sum()) for g, p in zip(gradient, permutations, strict=True))


@pytest.mark.parametrize("name", hand.ALL)
@pytest.mark.parametrize("count", [2, 4])
def test_first_iterations_are_the_all_pairs_formulas(name: str, count: int) -> None:
    symmetry = hand.ALL[name]()
    blocks = decompose(symmetry)
    models = models_of(symmetry, count)
    objective, oracle = Objective(blocks, models, dtype=torch.float64), AllPairs(blocks, models)
    state = State.at(objective, objective.identity())
    plans = oracle.identity()
    for _ in range(3):
        assert state.value() == pytest.approx(float(oracle.value(plans)), rel=1e-12)
        gradient, by_pairs = state.gradient(), oracle.gradient(plans)
        sigma = vertices(objective, gradient)[0]
        expected = oracle.vertices(by_pairs)
        for m, k in itertools.product(range(count), range(len(blocks.spaces))):
            assert torch.allclose(gradient[k][m], by_pairs[m][k], rtol=1e-11, atol=1e-11)
        for m in range(count):
            found = [s[m].numpy() for s in sigma]
            if not all(map(np.array_equal, found, expected[m])):  # half a step to an exchange makes two rows equal
                assert worth(by_pairs[m], found) == pytest.approx(worth(by_pairs[m], expected[m]), rel=1e-13)
                expected[m] = found
        segment = state.segment(sigma)
        step, gain = maximise_polynomial(segment.coefficients)
        assert gain >= 0
        state.advance(segment, step)
        eyes = [[torch.eye(len(s), dtype=torch.float64)[torch.from_numpy(s)] for s in v] for v in expected]
        plans = [
            [(1 - step) * a + step * b for a, b in zip(p, v, strict=True)] for p, v in zip(plans, eyes, strict=True)
        ]


@pytest.mark.parametrize("name", ["mlp", "branches", "heads", "experts"])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_end_is_not_below_the_all_pairs_loops(name: str, seed: int) -> None:
    symmetry = hand.ALL[name]()
    blocks = decompose(symmetry)
    models = models_of(symmetry, 3, seed)
    oracle = AllPairs(blocks, models)
    _, plans = oracle.iterate(20)
    rounded = oracle.vertices(plans)
    value = oracle.value([[torch.eye(len(s), dtype=torch.float64)[torch.from_numpy(s)] for s in v] for v in rounded])
    result = match(models, symmetry, FrankWolfe(dtype="float64", restarts=8))
    assert result.stats["objective"] >= float(value) - 1e-9


def square(n: int) -> Symmetry:
    return Symmetry({"w": (n, n)}, (Generator(n, (Slot("w", 0, hand.units(n)), Slot("w", 1, hand.units(n)))),))


@pytest.mark.parametrize("seed", range(6))
def test_two_models_and_one_group_are_scipys_faq(seed: int) -> None:
    """trace(A P B P^T) is <A^T, P B P^T>: the same start, the same steps, the same end (before its rounding)."""
    n = 9
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n, n))
    start = np.full((n, n), 1 / n)
    symmetry = square(n)
    models = [{"w": torch.from_numpy(a)}, {"w": torch.from_numpy(b)}]
    matcher = FrankWolfe(start="barycentre", anchor=0, polish=0, dtype="float64", gap_tolerance=0, progress_tolerance=0)
    # an explicit generator: hypothesis seeds numpy's global one, of which scipy warns
    options = {"maximize": True, "P0": start, "maxiter": 500, "tol": 1e-12, "rng": np.random.default_rng(0)}
    theirs = quadratic_assignment(a, b, method="faq", options=options)
    ours = match(models, symmetry, matcher)
    assert ours.stats["objective"] >= theirs.fun - 1e-9
    polished = match(models, symmetry, FrankWolfe(start="barycentre", anchor=0, dtype="float64"))
    assert polished.stats["objective"] >= theirs.fun - 1e-9
    for iterations in (1, 2):
        capped = quadratic_assignment(a, b, method="faq", options=options | {"maxiter": iterations})
        state = State(
            Objective(decompose(symmetry), models, dtype=torch.float64),
            [torch.stack([torch.eye(n, dtype=torch.float64), torch.from_numpy(start)])],
        )
        for _ in range(iterations):
            sigma = vertices(state.objective, state.gradient(slice(1, 2)))[0]
            segment = state.segment(sigma, slice(1, 2))
            state.advance(segment, maximise_polynomial(segment.coefficients)[0])
        rounded = vertices(state.objective, [p[1:2] for p in state.plan])[0]
        assert np.array_equal(rounded[0][0].numpy(), capped.col_ind)


@pytest.mark.parametrize("schedule", ["cyclic", "simultaneous"])
@pytest.mark.parametrize("start", ["identity", "barycentre", "sinkhorn", "signature"])
@pytest.mark.parametrize("name", ["mlp", "residual", "heads", "grouped_query", "grouped_conv", "cube"])
def test_objective_never_decreases(name: str, start: str, schedule: str) -> None:
    symmetry = hand.ALL[name]()
    models = models_of(symmetry, 3)
    matcher = FrankWolfe(
        start=start, schedule=schedule, dtype="float64", gap_tolerance=0, progress_tolerance=0, max_iterations=15
    )
    stats = match(models, symmetry, matcher).stats
    assert (np.diff(stats["objectives"]) >= -1e-9).all()
    assert all(0 <= s <= 1 for s in stats["steps"])
    *runs, polish = stats["runs"]
    assert polish["value"] >= max(run["rounded"] for run in runs) - 1e-9
    assert stats["objective"] == max(polish["value"], stats["start_objective"])


@pytest.mark.parametrize("name", hand.ALL)
@given(seed=st.integers(0, 2**30))
@settings(max_examples=3, deadline=None)
def test_polishing_is_monotone_and_says_what_it_gained(name: str, seed: int) -> None:
    symmetry = hand.ALL[name]()
    objective = Objective(decompose(symmetry), models_of(symmetry, 3, seed), dtype=torch.float64)
    elements = identity_elements(objective)
    value = objective.value(induced(objective, elements))
    polisher = Polisher(objective, elements)
    for m, root in itertools.product(range(3), objective.blocks.structure.roots):
        gain = polisher.move(m, root)
        new = objective.value(induced(objective, elements))
        assert gain >= 0
        assert new == pytest.approx(value + gain, abs=1e-9 * objective.scale)
        value = new


@pytest.mark.parametrize("name", hand.ALL)
def test_signatures_do_not_depend_on_the_order(name: str) -> None:
    symmetry = hand.ALL[name]()
    objective = Objective(decompose(symmetry), hand.planted(symmetry, 4, 3), dtype=torch.float64)
    best = objective.scale / 3 * 3
    assert objective.value(signature(objective)[0]) == pytest.approx(best, rel=1e-12)


def test_interrupting_keeps_the_best_so_far() -> None:
    symmetry = hand.residual(12, 3)
    models = models_of(symmetry, 3)
    for after in (1, 2, 100):
        seen: list[dict[str, Any]] = []

        def stop(numbers: dict[str, Any], seen: list[dict[str, Any]] = seen, after: int = after) -> None:
            seen.append(numbers)
            if len(seen) == after or (after == 100 and numbers["phase"] == "polish"):
                raise KeyboardInterrupt

        result = match(models, symmetry, FrankWolfe(), progress=stop)
        assert result.stats["interrupted"]
        assert result.stats["objective"] >= result.stats["start_objective"]
        assert result.cycle_error() == 0.0
        assert "interrupted" in str(result)


def test_progress_and_stats() -> None:
    symmetry = hand.mlp()
    seen: list[dict[str, Any]] = []
    stats = match(models_of(symmetry, 3), symmetry, FrankWolfe(), progress=seen.append).stats
    first = [s for s in seen if s["phase"] == "frank-wolfe" and s["start"] == "signature"]
    assert [s["iteration"] for s in first] == list(range(1, stats["iterations"] + 1))
    assert [s["objective"] for s in first] == stats["objectives"][1:]
    assert all(np.isfinite(s["rest"]) and s["rest"] >= 0 for s in first)
    assert {s["start"] for s in seen if s["phase"] == "frank-wolfe"} == {"signature", "best"}
    assert len(stats["objectives"]) == stats["iterations"] + 1 == len(stats["gaps"]) + 1
    assert {"gradient", "assignment", "line_search", "polish", "total"} <= set(stats["seconds"])
    assert not stats["interrupted"]
    assert stats["converged"]


def test_copies_take_one_start() -> None:
    symmetry = hand.residual(10, 3)
    model = models_of(symmetry, 1)[0]
    models = [symmetry.apply(model, symmetry.random_element(seed)) for seed in range(3)]
    result = match(models, symmetry, FrankWolfe(restarts=2))
    assert [run["start"] for run in result.stats["runs"]] == ["signature", "polish"]
    assert result.stats["objective"] == pytest.approx(result.stats["bound"], rel=1e-6)
    assert [run["start"] for run in match([model] * 3, symmetry, FrankWolfe()).stats["runs"]] == ["polish"]
    assert match([model] * 3, symmetry, FrankWolfe(polish=0)).stats["objective"] > 0


def test_more_restarts_are_never_worse() -> None:
    symmetry = hand.residual(10, 3)
    models = models_of(symmetry, 3)
    values = [match(models, symmetry, FrankWolfe(restarts=r)).stats["objective"] for r in (0, 2, 4)]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "nowhere"}, "start='nowhere'"),
        ({"schedule": "x"}, "schedule='x'"),
        ({"block_weights": "x"}, "block_weights='x'"),
        ({"block_weights": {"a": -1.0}}, "block_weights={'a': -1.0}"),
        ({"block_weights": {"a": float("nan")}}, "expected finite numbers that are not negative"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ({"softness": 2.0}, "softness=2.0"),
        ({"restarts": -1}, "restarts=-1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MatchingError, match=message):
        FrankWolfe(**options)


def test_bad_anchor() -> None:
    symmetry = hand.mlp()
    with pytest.raises(MatchingError, match="anchor=5"):
        match(models_of(symmetry, 2), symmetry, FrankWolfe(anchor=5))


def test_anchor_stays() -> None:
    symmetry = hand.heads()
    result = match(models_of(symmetry, 3), symmetry, FrankWolfe(anchor=1, restarts=1))
    assert result.to_universe[1].is_identity()
