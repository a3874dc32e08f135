"""Value, gradient and line search of the objective against autograd and the all-pairs formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge._errors import MatchingError
from automerge._polynomial import maximise_polynomial
from automerge._state import State
from automerge.blocks import decompose
from automerge.objective import Objective
from tests import _symmetries as hand
from tests._all_pairs import AllPairs

torch.set_num_threads(1)


def setup(name: str, seed: int, count: int) -> tuple[Objective, AllPairs, State, list[list[torch.Tensor]]]:
    symmetry = hand.ALL[name]()
    blocks = decompose(symmetry)
    models = [hand.weights(symmetry, seed + i) for i in range(count)]
    objective = Objective(blocks, models, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    plan = [torch.rand(count, s.size, s.size, generator=generator, dtype=torch.float64) for s in blocks.spaces]
    plans = [[p[m].clone().requires_grad_() for p in plan] for m in range(count)]
    return objective, AllPairs(blocks, models), State(objective, [p.clone() for p in plan]), plans


def random_vertex(objective: Objective, seed: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    structure = objective.blocks.structure
    rows = []
    for _ in range(objective.count):
        perms = {r: p for root in structure.roots for r, p in structure.random(root, rng).items()}
        rows.append(objective.blocks.induced(perms))
    return [torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-10 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("name", hand.ALL)
@given(seed=st.integers(0, 2**30), count=st.integers(2, 4))
@settings(max_examples=4, deadline=None)
def test_value_and_gradient_are_autograds(name: str, seed: int, count: int) -> None:
    objective, oracle, state, plans = setup(name, seed, count)
    value = oracle.value(plans)
    assert state.value() == pytest.approx(float(value.detach()), rel=1e-10)
    leaves = [p for plan in plans for p in plan]
    by_autograd = iter(torch.autograd.grad(value, leaves))
    gradient = state.gradient()
    with torch.no_grad():
        by_pairs = oracle.gradient(plans)
    for m in range(count):
        for space in range(len(objective.blocks.spaces)):
            expected = next(by_autograd)
            assert close(gradient[space][m], expected)
            assert close(by_pairs[m][space], expected)


@pytest.mark.parametrize("name", hand.ALL)
@given(seed=st.integers(0, 2**30), one=st.booleans())
@settings(max_examples=4, deadline=None)
def test_segment_polynomial_and_incremental_state(name: str, seed: int, one: bool) -> None:
    """f along the segment, evaluated anew at points of it; and a step leaves the state as built anew."""
    objective, oracle, state, _ = setup(name, seed, 3)
    models = slice(1, 2) if one else slice(None)
    sigma = [s[models] for s in random_vertex(objective, seed)]
    start = [p.clone() for p in state.plan]
    segment = state.segment(sigma, models)
    ends = state.ends(state.gradient(models), sigma, models)
    known = state.segment(sigma, models, ends).coefficients
    assert known == pytest.approx(segment.coefficients, abs=1e-10 * max(1.0, float(np.abs(known).max())))
    assert segment.coefficients[1] == pytest.approx(ends[1] - ends[0], rel=1e-9)
    before = state.value()
    step = 0.37
    state.advance(segment, step)
    end = [p.clone() for p in start]
    for e, s in zip(end, sigma, strict=True):
        eye = torch.eye(s.shape[1], dtype=torch.float64)
        e[models] = (1 - step) * e[models] + step * eye[s]
    again = State(objective, end)
    scale = max(1.0, abs(before))
    assert again.value() == pytest.approx(
        before + np.polynomial.polynomial.polyval(step, segment.coefficients), abs=1e-10 * scale
    )
    for a, b in zip(state.parts, again.parts, strict=True):
        assert all(close(a[s], b[s]) for s in a)
    assert all(close(a, b) for a, b in zip(state.total, again.total, strict=True))
    assert all(close(a, b) for a, b in zip(state.plan, again.plan, strict=True))
    del oracle


@pytest.mark.parametrize("name", ["mlp", "residual", "heads", "cube"])
def test_state_at_a_vertex(name: str) -> None:
    objective, _, _, _ = setup(name, 3, 3)
    sigma = random_vertex(objective, 5)
    state = State.at(objective, sigma)
    dense = State(objective, state.plan)
    assert state.value() == pytest.approx(objective.value(sigma), rel=1e-12)
    assert state.value() == pytest.approx(dense.value(), rel=1e-12)
    for a, b in zip(state.parts, dense.parts, strict=True):
        assert all(close(a[s], b[s]) for s in a)


@given(coefficients=st.lists(st.floats(-10, 10), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_step_is_never_worse_than_a_dense_grid(coefficients: list[float]) -> None:
    c = np.array([0.0, *coefficients])
    step, gain = maximise_polynomial(c)
    assert 0 <= step <= 1
    grid = np.polynomial.polynomial.polyval(np.linspace(0, 1, 1001), c)
    assert gain >= grid.max() - 1e-9
    assert gain == pytest.approx(np.polynomial.polynomial.polyval(step, c), abs=1e-12)


@pytest.mark.parametrize("name", hand.ALL)
@given(seed=st.integers(0, 2**30), count=st.integers(1, 4))
@settings(max_examples=4, deadline=None)
def test_no_element_exceeds_the_bound(name: str, seed: int, count: int) -> None:
    objective = setup(name, seed, count)[0]
    assert objective.value(random_vertex(objective, seed)) <= objective.bound + 1e-12 * objective.scale


def test_scaled_copies_reach_the_bound() -> None:
    symmetry = hand.mlp()
    models = [{n: v * scale for n, v in hand.weights(symmetry, 0).items()} for scale in (1.0, 3.0, 0.5)]
    objective = Objective(decompose(symmetry), models, dtype=torch.float64)
    assert objective.value(objective.identity()) == pytest.approx(objective.bound, rel=1e-12)


def test_normalised_weights_make_blocks_equal() -> None:
    symmetry = hand.mlp()
    models = [hand.weights(symmetry, i) for i in range(2)]
    models = [{n: v * (100 if n == "0.weight" else 1) for n, v in m.items()} for m in models]
    objective = Objective(decompose(symmetry), models, dtype=torch.float64, block_weights="normalised")
    assert objective.scale == pytest.approx(2 * len(objective.blocks.blocks))


def test_weights_of_parameters_multiply_the_inner_products_of_their_parameters() -> None:
    symmetry = hand.mlp()
    models = [hand.weights(symmetry, i) for i in range(3)]
    blocks = decompose(symmetry)
    weights = {"0.weight": 4.0, "1.bias": 0.0, "2.weight": 0.25}
    objective = Objective(blocks, models, dtype=torch.float64, block_weights=weights)
    scaled = [{n: v * weights.get(n, 1.0) ** 0.5 for n, v in m.items()} for m in models]
    plain = Objective(blocks, scaled, dtype=torch.float64)
    for weighted, own in zip(objective.bundles, plain.bundles, strict=True):
        torch.testing.assert_close(weighted.weights, own.weights, rtol=1e-14, atol=0)
    parts = {n: Objective(blocks, [{k: v * (k == n) for k, v in m.items()} for m in models]) for n in models[0]}
    sigma = objective.identity()
    whole = sum(weights.get(n, 1.0) * part.value(sigma) for n, part in parts.items())
    assert objective.value(sigma) == pytest.approx(whole, rel=1e-5)


def test_given_weights_of_complex_parameters_multiply_both_parts() -> None:
    symmetry = hand.mlp()
    models = [{n: torch.complex(v, v.roll(1, 0)) for n, v in hand.weights(symmetry, i).items()} for i in range(2)]
    blocks = decompose(symmetry)
    weights = {"0.weight": 4.0, "2.weight": 0.25}
    objective = Objective(blocks, models, dtype=torch.float64, block_weights=weights)
    plain = Objective(
        blocks, [{n: v * weights.get(n, 1.0) ** 0.5 for n, v in m.items()} for m in models], dtype=torch.float64
    )
    for weighted, own in zip(objective.bundles, plain.bundles, strict=True):
        torch.testing.assert_close(weighted.weights, own.weights, rtol=1e-6, atol=0)


def test_given_weights_count_for_tied_names_and_unknown_ones_are_refused() -> None:
    symmetry = hand.mlp()
    models = [hand.weights(symmetry, i) for i in range(2)]
    tied = [{"alias": m["0.weight"], **m} for m in models]
    one = Objective(decompose(symmetry), models, block_weights={"0.weight": 4.0})
    two = Objective(decompose(symmetry), tied, block_weights={"alias": 4.0})
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(one.bundles, two.bundles, strict=True))
    with pytest.raises(MatchingError, match=r"block_weights: the models have no 'weight'; they have 0.weight"):
        Objective(decompose(symmetry), models, block_weights={"weight": 1.0})
