"""What every matcher owes on every symmetry."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from automerge import matchers
from automerge._errors import CheckpointError, MatchingError, SymmetryError
from automerge.matchers import FrankWolfe, Identity, Matcher, match
from tests import _symmetries as hand

torch.set_num_threads(1)

MATCHERS: dict[str, Matcher] = {
    "identity": Identity(),
    "frank_wolfe": FrankWolfe(),
    "float64": FrankWolfe(dtype="float64"),
    "simultaneous": FrankWolfe(schedule="simultaneous"),
    "anchored": FrankWolfe(anchor=1),
    "restarts": FrankWolfe(start="barycentre", restarts=1, seed=3),
    "normalised": FrankWolfe(block_weights="normalised"),
    "plain": FrankWolfe(start="identity", softness=0, polish=0, max_iterations=3),
}


def pair_sum(symmetry: hand.Symmetry, models: list[dict[str, torch.Tensor]]) -> float:
    names = [n for n in symmetry.shapes if n not in symmetry.statistics]
    pairs = itertools.combinations(models, 2)
    return math.fsum(float((a[n].double() * b[n].double()).sum()) for a, b in pairs for n in names)


@pytest.mark.parametrize("name", hand.ALL)
@pytest.mark.parametrize("matcher", MATCHERS)
def test_conformance(matcher: str, name: str) -> None:
    symmetry = hand.ALL[name]()
    models = [hand.weights(symmetry, seed, torch.float32) for seed in range(3)]
    copies = [{n: v.clone() for n, v in m.items()} for m in models]
    result = match(models, symmetry, MATCHERS[matcher])
    assert len(result.to_universe) == 3
    assert all(torch.equal(m[n], c[n]) for m, c in zip(models, copies, strict=True) for n in m), "inputs changed"
    for element, model, moved in zip(result.to_universe, models, result.apply(models), strict=True):
        back = symmetry.apply(moved, element.inverse())
        assert all(torch.equal(back[n], model[n]) for n in model)
    assert result.cycle_error() == 0.0
    for a, b, c in itertools.permutations(range(3)):
        assert result.between(a, b).then(result.between(b, c)) == result.between(a, c)
    if matcher != "normalised":
        assert pair_sum(symmetry, result.apply(models)) >= pair_sum(symmetry, models) - 1e-4
    assert result.stats["objective"] >= result.stats["start_objective"]
    assert repr(MATCHERS[matcher]) in str(result)


@pytest.mark.parametrize("name", hand.ALL)
@pytest.mark.parametrize("matcher", ["identity", "frank_wolfe"])
def test_same_inputs_same_answer(matcher: str, name: str) -> None:
    symmetry = hand.ALL[name]()
    models = [hand.weights(symmetry, seed, torch.float32) for seed in range(2)]
    first, second = (match(models, symmetry, MATCHERS[matcher]) for _ in range(2))
    assert first.to_universe == second.to_universe


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", hand.ALL)
def test_planted_elements_are_recovered_exactly(name: str, count: int) -> None:
    symmetry = hand.ALL[name]()
    for seed in range(2):
        models = hand.planted(symmetry, seed, count, torch.float32)
        moved = match(models, symmetry).apply(models)
        assert all(torch.equal(moved[0][n], other[n]) for other in moved for n in other)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("sizes", [(10, 20, 20, 20, 20, 20, 5), (6, 40, 30, 40, 4)])
def test_planted_permutations_of_deep_chains(sizes: tuple[int, ...], count: int) -> None:
    symmetry = hand.mlp(sizes)
    base = hand.weights(symmetry, 0, torch.float32)
    element = symmetry.random_element(1)
    moved = symmetry.apply(base, element)
    assert match([base, moved], symmetry).between(0, 1) == element
    models = hand.planted(symmetry, 2, count, torch.float32)
    ends = match(models, symmetry, FrankWolfe(start="identity", softness=0)).apply(models)
    assert all(torch.equal(ends[0][n], other[n]) for other in ends for n in other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_matched_and_keep_their_type(dtype: torch.dtype) -> None:
    symmetry = hand.mlp()
    models = hand.planted(symmetry, 0, 3, dtype)
    moved = match(models, symmetry).apply(models)
    assert moved[0]["0.weight"].dtype == dtype
    assert all(torch.equal(moved[0][n], other[n]) for other in moved for n in other)


def test_modules_and_tied_names() -> None:
    symmetry = hand.mlp((3, 4, 2))
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)) for _ in range(2)]
    assert match(nets, symmetry).cycle_error() == 0.0
    tied = type(symmetry)(symmetry.shapes, symmetry.sets, aliases={"twin": "0.weight"})
    models = [m | {"twin": m["0.weight"]} for m in hand.planted(symmetry, 0, 2)]
    moved = match(models, tied).apply(models)
    assert all(torch.equal(moved[0][n], moved[1][n]) for n in models[0])
    assert torch.equal(moved[1]["twin"], moved[1]["0.weight"])


def test_a_symmetry_without_generators() -> None:
    empty = hand.Symmetry({"w": (2, 2)}, ())
    models = [hand.weights(empty, i) for i in range(2)]
    for matcher in MATCHERS.values():
        assert all(e.is_identity() for e in match(models, empty, matcher).to_universe)


@pytest.mark.parametrize("matcher", [Identity(), FrankWolfe()])
def test_bad_models(matcher: Matcher) -> None:
    symmetry = hand.mlp()
    models = [hand.weights(symmetry, i) for i in range(3)]
    with pytest.raises(MatchingError, match="at least 2"):
        match(models[:1], symmetry, matcher)
    with pytest.raises(MatchingError, match="at least 2"):
        match(models[0], symmetry, matcher)  # type: ignore[arg-type]
    for change, message in [
        ({"extra": torch.zeros(1)}, "model 2 has the extra key 'extra'"),
        ({"0.bias": torch.zeros(3)}, r"model 2: 0\.bias has the shape \(3,\)"),
        ({"0.bias": torch.full((7,), torch.nan)}, r"model 2: 0\.bias .* NaN"),
        ({"0.bias": torch.full((7,), torch.inf)}, r"model 2: 0\.bias .* infinite"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            match([*models[:2], models[2] | change], symmetry, matcher)
    short = {n: v for n, v in models[1].items() if n != "1.weight"}
    with pytest.raises(CheckpointError, match=r"model 1 has no key '1\.weight'"):
        match([models[0], short, models[2]], symmetry, matcher)
    with pytest.raises(SymmetryError, match="infer it again"):
        match(models, hand.mlp((5, 8, 6, 3)), matcher)


def test_exported_names() -> None:
    assert sorted(matchers.__all__) == ["FrankWolfe", "Identity", "Matcher", "Matching", "check_models", "match"]
