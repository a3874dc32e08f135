"""Matchers by linear maps: what they owe on every network, and known answers on linear ones.

Every matcher in `automerge.matchers.MATCHERS` with ``exact = False`` and ``separable = True`` is tested here without more.
"""

from __future__ import annotations

import json
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from automerge import CCA, ActivationMatching, FrankWolfe, Matching, Procrustes, ZipIt, infer, match, matchers, merge
from automerge._data import Batch
from automerge._errors import MatchingError, SymmetryError
from automerge._forward import bind, run_batch
from automerge._linear_maps import LinearElement, Matrix, linear_element, permutations_of
from automerge.matchers._linear import LinearMatcher, polar
from automerge.symmetry import Symmetry
from tests.matchers import _families as families
from tests.matchers._families import NETWORKS, family, network

torch.set_num_threads(1)
F64 = torch.float64
State = dict[str, torch.Tensor]
INEXACT: dict[str, Any] = {n: make() for n, make in matchers.MATCHERS.items() if not make().exact and make().separable}
MATCHERS: dict[str, LinearMatcher] = {**INEXACT, "procrustes to another": Procrustes(reference=1)}


def run(name: str, matcher: LinearMatcher, models: list[State]) -> Matching:
    own = deepcopy(network(name)[0])
    own.load_state_dict(models[0])
    dtypes = {v.dtype for v in models[0].values() if v.is_floating_point()}
    own = own.to(dtypes.pop()) if len(dtypes) == 1 else own
    return match([own, *models[1:]], network(name)[2], matcher, data=families.batches(name))


def close(a: State, b: State, tolerance: float) -> bool:
    return all(torch.allclose(a[n].double(), b[n].double(), rtol=0, atol=tolerance * (1 + scale(b[n]))) for n in b)


def scale(value: torch.Tensor) -> float:
    return float(value.double().abs().max()) if value.numel() else 0.0


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("matcher", MATCHERS)
def test_maps_are_invertible_and_complete(matcher: str, name: str, tmp_path: Path) -> None:
    symmetry = network(name)[2]
    models, _ = family(name, 3)
    copies = [{n: v.clone() for n, v in m.items()} for m in models]
    result = run(name, MATCHERS[matcher], models)
    assert all(torch.equal(m[n], c[n]) for m, c in zip(models, copies, strict=True) for n in m), "inputs changed"
    for element, model, moved in zip(result.to_universe, models, result.apply(models), strict=True):
        assert {n: (v.shape, v.dtype) for n, v in moved.items()} == {n: (v.shape, v.dtype) for n, v in model.items()}
        assert all(torch.isfinite(v).all() for v in moved.values() if v.is_floating_point())
        assert close(symmetry.apply(moved, element.inverse()), model, 1e-4)
    assert result.cycle_error() == 0.0
    stats = json.loads(json.dumps(dict(result.stats)))
    assert stats["inverse_error"] < 1e-8
    assert len(stats["linear_groups"]) + len(stats["permuted_groups"]) == len(symmetry.sets)
    assert stats["drift"][MATCHERS[matcher].reference] == 0
    result.save(tmp_path / "m.safetensors")
    read = Matching.load(tmp_path / "m.safetensors")
    assert read.to_universe == result.to_universe
    assert all(
        torch.equal(a[n], b[n]) for a, b in zip(read.apply(models), result.apply(models), strict=True) for n in a
    )


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("matcher", MATCHERS)
def test_identical_models_get_the_identity(matcher: str, name: str) -> None:
    models = family(name, 1)[0] * 3
    result = run(name, MATCHERS[matcher], models)
    assert all(result.between(a, b).is_identity() for a in range(3) for b in range(3))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("matcher", INEXACT)
def test_permuting_an_input_changes_nothing_but_its_map(matcher: str, name: str) -> None:
    """In the reference's coordinates the models are what they were."""
    symmetry = network(name)[2]
    models, _ = family(name, 3)
    rng = np.random.default_rng(0)
    r = MATCHERS[matcher].reference
    moved = [m if k == r else symmetry.apply(m, symmetry.random_element(rng)) for k, m in enumerate(models)]
    one, two = (run(name, MATCHERS[matcher], m) for m in (models, moved))
    again = run(name, MATCHERS[matcher], models)
    for a, b in zip(one.apply(models), two.apply(moved), strict=True):
        assert close(a, b, 1e-3)
    assert again.to_universe == one.to_universe, "the same input, the same answer"


@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("matcher", MATCHERS)
def test_any_number_of_models_and_both_dtypes(matcher: str, count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype) for _ in range(count)]
    x = torch.randn(40, 5, dtype=dtype)
    result = match(nets, infer(nets[0], x), MATCHERS[matcher], data=[x[:30], x[30:]])
    assert len(result) == count
    assert all(v.dtype == dtype for m in result.apply(nets) for v in m.values())
    assert all(len(e.matrices) == 1 for e in result.to_universe if isinstance(e, LinearElement))
    assert result.cycle_error() == 0


@pytest.mark.parametrize("matcher", MATCHERS)
def test_interrupting_leaves_the_permutations(matcher: str) -> None:
    """Ctrl-C ends with the best permutations so far, and says so."""
    models, _ = family("mlp", 4, noise=0.8)

    def stop(numbers: object) -> None:
        raise KeyboardInterrupt

    own = deepcopy(network("mlp")[0])
    own.load_state_dict(models[0])
    given = [own, *models[1:]]
    result = match(given, network("mlp")[2], MATCHERS[matcher], progress=stop, data=families.batches("mlp"))
    assert result.stats["interrupted"]
    assert "interrupted" in str(result)
    assert not any(isinstance(e, LinearElement) for e in result.to_universe)
    assert result.cycle_error() == 0


# -------------------------------------------------------------------- linear networks
def linear_network(seed: int, *sizes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes))).double()


def rotated(net: nn.Sequential, seed: int, orthogonal: bool = True) -> State:
    """The same function with every hidden layer turned."""
    torch.manual_seed(seed)
    state = {n: v.clone() for n, v in net.state_dict().items()}
    for k in range(len(net) - 1):
        n = len(state[f"{k}.bias"])
        turn = torch.randn(n, n, dtype=F64)
        turn = torch.linalg.qr(turn)[0] if orthogonal else turn + 2 * torch.eye(n, dtype=F64)
        state[f"{k}.weight"], state[f"{k}.bias"] = turn @ state[f"{k}.weight"], turn @ state[f"{k}.bias"]
        state[f"{k + 1}.weight"] = state[f"{k + 1}.weight"] @ torch.linalg.inv(turn)
    return state


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_linear_networks_stay_the_same_function(seed: int, same: bool) -> None:
    """Trained apart or together: with full-rank activations the moved model computes exactly what it did."""
    a, b = linear_network(seed, 9, 6, 5, 3), linear_network(seed + 1, 9, 6, 5, 3)
    state = rotated(a, seed, orthogonal=False) if same else b.state_dict()
    x = torch.randn(200, 9, dtype=F64)
    symmetry = infer(a, x, verify=False)
    result = match([a, state], symmetry, CCA(ridge=0), data=x)
    moved = symmetry.apply(state, result.between(1, 0))
    before, after = (run_batch(a, bind(a, s), Batch((x,))).detach() for s in (state, moved))
    assert torch.allclose(before, after, rtol=1e-9, atol=1e-9)
    assert max(result.stats["drift"]) < 1e-9
    if same:
        assert close(moved, a.state_dict(), 1e-7)


def test_a_planted_rotation_is_found_by_linear_maps_and_not_by_permutations() -> None:
    net = linear_network(0, 12, 8, 7, 4)
    turned = rotated(net, 1)
    x = torch.randn(300, 12, dtype=F64)
    symmetry = infer(net, x)
    target = run_batch(net, None, Batch((x,))).detach()
    errors = {}
    for matcher in (CCA(ridge=0), Procrustes(), ActivationMatching(), FrankWolfe()):
        merged = merge([net, turned], x, symmetry=symmetry, matcher=matcher, data=x, repair="none").state_dict
        output = run_batch(net, bind(net, merged), Batch((x,))).detach()
        errors[type(matcher).__name__] = float((output - target).norm() / target.norm())
    assert errors["CCA"] < 1e-8
    assert errors["Procrustes"] < 1e-8
    assert errors["ActivationMatching"] > 0.3
    assert errors["FrankWolfe"] > 0.3


def covariances(seed: int, n: int, samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(samples, n, generator=rng, dtype=F64) for _ in range(2))
    y = 0.3 * y + x @ torch.randn(n, n, generator=rng, dtype=F64)
    x, y = x - x.mean(0), y - y.mean(0)
    return x.T @ x / samples, y.T @ y / samples, x.T @ y / samples


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 40), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_the_matrix_and_its_inverse(seed: int, n: int, samples: int, ridge: float) -> None:
    """Also with fewer samples than units. T carries the model's ridged covariance to the reference's."""
    own, other, cross = covariances(seed, n, samples)
    found = CCA(ridge=ridge).solve(own, other, cross, torch.eye(n, dtype=F64))
    assert found.error() < 1e-8
    eye = torch.eye(n, dtype=F64)
    x, y = (c + ridge * c.trace() / n * eye for c in (own, other))
    assert torch.allclose(found.forward @ y @ found.forward.T, x, rtol=1e-6, atol=1e-8 * scale(x))
    turn = Procrustes().solve(own, other, cross, eye)
    assert turn.error() < 1e-10


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_both_coincide_for_white_activations(seed: int, n: int) -> None:
    _, _, cross = covariances(seed, n, 50)
    eye = torch.eye(n, dtype=F64)
    one, two = CCA(ridge=0).solve(eye, eye, cross, eye), Procrustes().solve(eye, eye, cross, eye)
    assert torch.allclose(one.forward, two.forward, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_procrustes_is_the_best_rotation(seed: int, n: int) -> None:
    """No other orthogonal matrix tried is nearer."""
    own, other, cross = covariances(seed, n, 60)
    best = Procrustes().solve(own, other, cross, torch.eye(n, dtype=F64)).forward
    rng = torch.Generator().manual_seed(seed)
    for step in (1e-3, 1.0):
        skew = step * torch.randn(n, n, generator=rng, dtype=F64)
        other_turn = torch.linalg.matrix_exp(skew - skew.T) @ best
        assert (cross * other_turn).sum() <= (cross * best).sum() + 1e-10


def test_where_activations_say_nothing_the_permutation_decides() -> None:
    half = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=F64))
    nearest = torch.eye(4, dtype=F64)[[0, 1, 3, 2]]
    assert torch.allclose(polar(half, nearest), nearest)
    assert torch.allclose(polar(torch.zeros(4, 4, dtype=F64), nearest), nearest)


# -------------------------------------------------------------------- fallback, files, errors
def test_models_that_drift_fall_back_to_permutations() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)) for _ in range(3)]
    x = torch.randn(100, 5)
    symmetry = infer(nets[0], x)
    free = match(nets, symmetry, CCA(), data=x)
    drift = free.stats["drift"]
    assert drift[0] == 0
    assert min(drift[1:]) > 0.05
    # what is reported is what a run of the moved model shows
    with torch.no_grad():
        before, after = (
            nets[1](x),
            run_batch(nets[1], symmetry.apply(nets[1].state_dict(), free.to_universe[1]), Batch((x,))),
        )
    assert drift[1] == pytest.approx(float((after - before).norm() / (before - before.mean()).norm()), rel=1e-5)
    assert free.stats["kept_predictions"][1] == pytest.approx(
        float((after.argmax(1) == before.argmax(1)).double().mean())
    )
    low = match(nets, symmetry, CCA(fallback=0.0), data=x)
    permuted = match(nets, symmetry, CCA().permutations, data=x)
    assert low.stats["fell_back"] == [1, 2]
    assert [type(e).__name__ for e in low.to_universe] == ["Element"] * 3
    assert low.between(1, 2) == permuted.between(1, 2)
    middle = match(nets, symmetry, CCA(fallback=(drift[1] + drift[2]) / 2), data=x)
    worse = 1 if drift[1] > drift[2] else 2
    assert middle.stats["fell_back"] == [worse]
    moved, expected = middle.apply(nets)[worse], symmetry.apply(nets[worse].state_dict(), permuted.between(worse, 0))
    assert close(moved, expected, 0)
    assert middle.cycle_error() == 0


def test_reports_tell_of_drift_and_permutations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.LayerNorm(7), nn.Linear(7, 3)) for _ in "ab"]
    x = torch.randn(100, 5)
    result = merge(nets, x, matcher=CCA(), data=x)
    drift, kept = result.matching.stats["drift"][1], result.matching.stats["kept_predictions"][1]
    result.matching.save(tmp_path / "m.safetensors")
    for text in (result.report(), str(result.matching), str(Matching.load(tmp_path / "m.safetensors"))):
        assert f"model 1 drifts by {drift:.3f}" in text
        assert f"{kept:.1%} of its predictions stay" in text
        assert "model 0 drifts" not in text, "the reference stays"
        assert "by permutations only: " in text
        assert "native_layer_norm with weights of each unit in 3" in text
    back = match(nets, result.symmetry, CCA(fallback=drift / 2), data=x)
    assert f"model 1 would drift by {drift:.3f}: permutations instead" in str(back)
    assert "drift" not in str(match(nets, result.symmetry, ActivationMatching(), data=x))


def test_equal_options_have_equal_texts() -> None:
    """No address in memory: the text is part of the provenance."""
    for matcher in (CCA(), Procrustes(), ActivationMatching(), ZipIt()):
        assert " at 0x" not in repr(matcher)


def test_groups_that_admit_permutations_only_are_listed() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(20, 3)
    result = match([net, deepcopy(net)], infer(net, x), CCA(), data=x)
    assert result.stats["linear_groups"] == []
    assert list(result.stats["permuted_groups"].values()) == ["native_layer_norm with weights of each unit in 1"]
    assert not isinstance(result.to_universe[0], LinearElement)


def test_merging_with_matrices() -> None:
    """Through merge(), in any coordinates; the reference's coordinates are the universe."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)) for _ in range(3)]
    x = torch.randn(100, 5)
    here = merge(nets, x, matcher=CCA(reference=1), data=x, repair="none")
    there = merge(nets, x, matcher=CCA(reference=1), data=x, repair="none", coordinates=1)
    assert close(here.state_dict, there.state_dict, 1e-6)
    other = merge(nets, x, matcher=CCA(reference=1), data=x, repair="none", coordinates=2)
    back = here.symmetry.apply(other.state_dict, here.matching.to_universe[2])
    assert close(back, here.state_dict, 1e-5)
    assert "CCA(reference=1" in here.report()


def test_bad_input() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(20, 3)
    symmetry = infer(net, x)
    with pytest.raises(MatchingError, match="looks at activations"):
        match([net, net], symmetry, CCA())
    with pytest.raises(MatchingError, match="as a module"):
        match([net.state_dict(), net.state_dict()], symmetry, CCA(), data=x)
    with pytest.raises(MatchingError, match=r"reference=2\): there are the models 0 to 1"):
        match([net, net], symmetry, Procrustes(reference=2), data=x)
    with pytest.raises(MatchingError, match="drift of at least 0"):
        match([net, net], symmetry, CCA(fallback=-1.0), data=x)
    with pytest.raises(MatchingError, match="matcher by permutations"):
        match([net, net], symmetry, CCA(permutations=Procrustes()), data=x)
    with pytest.raises(MatchingError, match="ridge"):
        CCA(ridge=-1)


# -------------------------------------------------------------------- elements
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_elements_with_matrices_are_a_group(seed: int) -> None:
    """Permutations on one group, matrices on another of the same parameter."""
    symmetry = two_groups()
    rng = np.random.default_rng(seed)
    state = {n: torch.from_numpy(rng.normal(size=s)) for n, s in symmetry.shapes.items()}

    def draw() -> LinearElement:
        made = torch.from_numpy(np.eye(4) + 0.3 * rng.normal(size=(4, 4)))
        matrix = Matrix(made, torch.linalg.inv(made))
        perm = symmetry.element([rng.permutation(5), np.arange(4)])
        return linear_element(symmetry, perm, {1: (True, False)}, {1: matrix})

    a, b = draw(), draw()
    assert close(symmetry.apply(symmetry.apply(state, a), b), symmetry.apply(state, a.then(b)), 1e-10)
    assert close(symmetry.apply(symmetry.apply(state, a), a.inverse()), state, 1e-10)
    assert a.then(a.inverse()).is_identity()
    assert a.moved() > 0
    product = state["c"] @ state["b"]
    moved = symmetry.apply(state, a)
    order = permutations_of(symmetry, a, {0})[0]
    assert torch.allclose(moved["c"] @ moved["b"], product[:, order], atol=1e-9)


def two_groups() -> Symmetry:
    from automerge.symmetry import Generator, Slot

    five, four = np.arange(5)[:, None], np.arange(4)[:, None]
    sets = (
        Generator(5, (Slot("a", 0, five), Slot("b", 1, five))),
        Generator(4, (Slot("b", 0, four), Slot("c", 1, four))),
    )
    return Symmetry({"a": (5, 2), "b": (4, 5), "c": (3, 4)}, sets)


def test_matrices_that_do_not_fit() -> None:
    symmetry = two_groups()
    one = Matrix.permutation(np.arange(3))
    with pytest.raises(SymmetryError, match="has 4 units and 2 slots, got a matrix of shape"):
        linear_element(symmetry, symmetry.identity(), {1: (True, False)}, {1: one})
    fits = linear_element(symmetry, symmetry.identity(), {1: (True, False)}, {1: Matrix.permutation(np.arange(4))})
    with pytest.raises(SymmetryError, match="only with elements that have matrices"):
        fits.then(symmetry.identity())
