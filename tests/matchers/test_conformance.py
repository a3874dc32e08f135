"""What every matcher owes on every network. A matcher in `automerge.matchers.MATCHERS` is tested here without more."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from automerge import matchers
from automerge._data import Batch
from automerge._errors import CheckpointError, MatchingError, SymmetryError
from automerge._forward import bind, run_batch
from automerge.groups import Element
from automerge.matchers import (
    MATCHERS,
    ActivationMatching,
    FrankWolfe,
    Identity,
    Matcher,
    Matching,
    MergeMany,
    PairwiseFrankWolfe,
    Synchronised,
    WeightMatching,
    match,
)
from tests import _symmetries as hand
from tests.matchers import _families as families
from tests.matchers import test_linear_matchers, test_zipit
from tests.matchers._families import NETWORKS, family, network, pairs

torch.set_num_threads(1)

# matchers by linear maps change the function a little; what they owe is in test_linear_matchers
DEFAULTS: dict[str, Matcher] = {name: make() for name, make in MATCHERS.items() if make().exact}
VARIANTS: dict[str, Matcher] = {
    "float64": FrankWolfe(dtype="float64"),
    "simultaneous": FrankWolfe(schedule="simultaneous"),
    "anchored": FrankWolfe(anchor=1),
    "restarts": FrankWolfe(start="barycentre", restarts=1, seed=3),
    "normalised": FrankWolfe(block_weights="normalised"),
    "plain": FrankWolfe(start="identity", softness=0, polish=0, max_iterations=3),
    "weights restarts": WeightMatching(reference=1, restarts=2, dtype="float64"),
    "weights as published": WeightMatching(start="identity"),
    "many restarts": MergeMany(restarts=1, block_weights="normalised"),
    "many as published": MergeMany(start="identity", seed=5),
    "pairwise to another": PairwiseFrankWolfe(reference=2, solver=FrankWolfe(dtype="float64", restarts=1)),
    "synchronised weights": Synchronised(WeightMatching(reference=1)),
    "activations alone": ActivationMatching(WeightMatching(reference=1), mix=1.0),
    "activations to many": ActivationMatching(MergeMany(), kind="inner", mix=0.2),
    "activations synchronised": ActivationMatching(Synchronised(WeightMatching())),
}
EVERY = {**DEFAULTS, **VARIANTS}
# every matcher with its defaults on every network, and its variants where structures differ most
FEW = ("linear_only", "conv_bn", "Mamba", "WreathDeep")
GRID = [*itertools.product(DEFAULTS, NETWORKS), *itertools.product(VARIANTS, FEW)]
SMALL_GRID = [*itertools.product(EVERY, ("mlp_layernorm", "WreathDeep"))]
# from a given vertex the end depends on the order in which each model's units happen to stand
# (and units that are silent on the data are all alike to the activations)
NOT_DETERMINED = {"identity", "plain", "weights as published", "many as published", "activations alone"}


def run(name: str, matcher: Matcher, models: Sequence[dict[str, torch.Tensor]]) -> Matching:
    """Match state dicts of a network; the first is given as a module, so that data-driven matchers can run it."""
    model, _, symmetry = network(name)
    return match([module(model, models[0]), *models[1:]], symmetry, matcher, data=families.batches(name))


@cache
def matched(matcher: str, name: str) -> tuple[list[dict[str, torch.Tensor]], list[Element], Matching]:
    """Three noisy copies of one network, the elements planted in them, and their matching."""
    models, elements = family(name, 3)
    return models, elements, run(name, EVERY[matcher], models)


def module(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of a network with other weights."""
    own = deepcopy(model)
    own.load_state_dict(state)
    dtypes = {v.dtype for v in state.values() if v.is_floating_point()}
    return own.to(dtypes.pop()) if len(dtypes) == 1 else own


@torch.no_grad()
def outputs(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    model, args, _ = network(name)
    wide = {n: v.double() if v.is_floating_point() else v for n, v in state.items()}
    out = run_batch(model, bind(model, wide), Batch(args))
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize(("matcher", "name"), GRID)
def test_valid_maps(matcher: str, name: str) -> None:
    """Every map is a group element: the function stays, the inverse restores bit by bit, cycles close exactly."""
    symmetry = network(name)[2]
    models, _, result = matched(matcher, name)
    copies = family(name, 3)[0]
    assert len(result) == 3
    assert all(torch.equal(m[n], c[n]) for m, c in zip(models, copies, strict=True) for n in m), "inputs changed"
    for element, model, moved in zip(result.to_universe, models, result.apply(models), strict=True):
        assert {n: (v.shape, v.dtype) for n, v in moved.items()} == {n: (v.shape, v.dtype) for n, v in model.items()}
        back = symmetry.apply(moved, element.inverse())
        assert all(torch.equal(back[n], model[n]) for n in model)
        before, after = outputs(name, model), outputs(name, moved)
        assert torch.allclose(before, after, rtol=1e-9, atol=1e-10 * float(before.abs().max()))
    assert result.cycle_error() == 0.0
    for a, b, c in itertools.permutations(range(3)):
        assert result.between(a, b).then(result.between(b, c)) == result.between(a, c)
    assert repr(EVERY[matcher]) in str(result)
    json.dumps(dict(result.stats))


@pytest.mark.parametrize(("matcher", "name"), [(m, n) for m, n in GRID if m not in NOT_DETERMINED])
def test_permuting_an_input_changes_nothing_but_its_map(matcher: str, name: str) -> None:
    symmetry = network(name)[2]
    models, _, result = matched(matcher, name)
    rng = np.random.default_rng(1)
    elements = [symmetry.random_element(rng) for _ in models]
    moved = run(name, EVERY[matcher], [symmetry.apply(m, e) for m, e in zip(models, elements, strict=True)])
    for a, b in pairs(3):
        expected = elements[a].inverse().then(result.between(a, b)).then(elements[b])
        assert moved.between(a, b) == expected


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("matcher", [n for n in DEFAULTS if n != "identity"])
def test_planted_elements_are_recovered(matcher: str, name: str) -> None:
    """Noisy copies are matched by exactly the elements that were planted."""
    _, elements, result = matched(matcher, name)
    for a, b in pairs(3):
        assert result.between(a, b) == elements[a].inverse().then(elements[b])


@pytest.mark.parametrize(("matcher", "name"), SMALL_GRID)
def test_same_inputs_same_answer(matcher: str, name: str) -> None:
    """Far from any copy, where a search that is not determined would go astray."""
    models, _ = family(name, 3, noise=0.9)
    first, second = (run(name, EVERY[matcher], models) for _ in range(2))
    assert first.to_universe == second.to_universe


@pytest.mark.parametrize(("matcher", "name"), SMALL_GRID)
def test_identical_models_have_the_identity_between_them(matcher: str, name: str) -> None:
    models = family(name, 1)[0] * 3
    result = run(name, EVERY[matcher], models)
    assert all(result.between(a, b).is_identity() for a, b in pairs(3))


@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("matcher", DEFAULTS)
def test_two_to_eight_models(matcher: str, count: int) -> None:
    models, elements = family("mlp", count, seed=3)
    result = run("mlp", DEFAULTS[matcher], models)
    assert len(result) == count
    assert result.cycle_error() == 0.0
    if matcher != "identity":
        assert all(result.between(a, b) == elements[a].inverse().then(elements[b]) for a, b in pairs(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("matcher", DEFAULTS)
def test_types_are_kept(matcher: str, dtype: torch.dtype) -> None:
    models, elements = family("mlp", 3, dtype=dtype)
    if dtype not in (torch.float32, torch.float64) and getattr(DEFAULTS[matcher], "needs_data", False):
        pytest.skip("networks of 16 bits need inputs of 16 bits")
    result = run("mlp", DEFAULTS[matcher], models) if dtype == torch.float64 else _narrow(matcher, models, dtype)
    assert all(v.dtype == dtype for m in result.apply(models) for v in m.values())
    if matcher != "identity":
        assert all(result.between(a, b) == elements[a].inverse().then(elements[b]) for a, b in pairs(3))


def _narrow(matcher: str, models: Sequence[dict[str, torch.Tensor]], dtype: torch.dtype) -> Matching:
    model, _, symmetry = network("mlp")
    data = [tuple(x.to(dtype) for x in batch) for batch in families.batches("mlp")]
    first = module(model, models[0])
    return match([first, *models[1:]], symmetry, DEFAULTS[matcher], data=data)


@pytest.mark.parametrize("matcher", EVERY)
def test_a_symmetry_without_generators(matcher: str) -> None:
    models, _ = family("linear_only", 3)
    result = run("linear_only", EVERY[matcher], models)
    assert all(e.is_identity() for e in result.to_universe)


@pytest.mark.parametrize("matcher", DEFAULTS)
def test_files(matcher: str, tmp_path: Path) -> None:
    models, _ = family("grouped", 3)
    result = run("grouped", DEFAULTS[matcher], models)
    result.save(tmp_path / "m.safetensors")
    again = Matching.load(tmp_path / "m.safetensors")
    assert again.to_universe == result.to_universe
    assert again.matcher == result.matcher == repr(DEFAULTS[matcher])
    assert dict(again.stats) == json.loads(json.dumps(dict(result.stats)))


@pytest.mark.parametrize("matcher", DEFAULTS)
def test_interrupting_leaves_a_valid_matching(matcher: str) -> None:
    """Ctrl-C at the first, at a later and at no message: a matching all the same, which says so."""
    symmetry = network("Mamba")[2]
    models, _ = family("Mamba", 4, noise=0.8)
    for after in (1, 3):
        seen: list[Any] = []

        def stop(numbers: dict[str, Any], seen: list[Any] = seen, after: int = after) -> None:
            seen.append(numbers)
            if len(seen) == after:
                raise KeyboardInterrupt

        first = module(network("Mamba")[0], models[0])
        result = match([first, *models[1:]], symmetry, DEFAULTS[matcher], progress=stop, data=families.batches("Mamba"))
        assert bool(result.stats.get("interrupted")) == (len(seen) >= after)
        assert len(result) == 4
        assert result.cycle_error() == 0.0


# -------------------------------------------------------------------- symmetries written by hand, weights alone
WEIGHTS_ALONE = {n: m for n, m in EVERY.items() if not getattr(m, "needs_data", False)}


@pytest.mark.parametrize("name", hand.ALL)
@pytest.mark.parametrize("matcher", [n for n in WEIGHTS_ALONE if n in DEFAULTS or "restarts" in n])
def test_unrelated_weights(matcher: str, name: str) -> None:
    symmetry = hand.ALL[name]()
    models = [hand.weights(symmetry, seed, torch.float32) for seed in range(3)]
    result = match(models, symmetry, EVERY[matcher])
    for element, model, moved in zip(result.to_universe, models, result.apply(models), strict=True):
        back = symmetry.apply(moved, element.inverse())
        assert all(torch.equal(back[n], model[n]) for n in model)
    assert result.cycle_error() == 0.0


@pytest.mark.parametrize("name", hand.ALL)
@pytest.mark.parametrize("matcher", [n for n in DEFAULTS if n in WEIGHTS_ALONE and n != "identity"])
def test_exact_copies_are_recovered_exactly(matcher: str, name: str) -> None:
    symmetry = hand.ALL[name]()
    models = hand.planted(symmetry, 3, 3, torch.float32)
    moved = match(models, symmetry, DEFAULTS[matcher]).apply(models)
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


def test_modules_and_tied_names() -> None:
    symmetry = hand.mlp((3, 4, 2))
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2)]
    assert match(nets, symmetry).cycle_error() == 0.0
    tied = type(symmetry)(symmetry.shapes, symmetry.sets, aliases={"twin": "0.weight"})
    models = [m | {"twin": m["0.weight"]} for m in hand.planted(symmetry, 0, 2)]
    moved = match(models, tied).apply(models)
    assert all(torch.equal(moved[0][n], moved[1][n]) for n in models[0])
    assert torch.equal(moved[1]["twin"], moved[1]["0.weight"])


# -------------------------------------------------------------------- bad input
@pytest.mark.parametrize("matcher", DEFAULTS)
def test_bad_models(matcher: str) -> None:
    symmetry = hand.mlp()
    models = [hand.weights(symmetry, i) for i in range(3)]

    def go(models: Any, symmetry: Any = symmetry) -> None:
        match(models, symmetry, DEFAULTS[matcher], data=[torch.randn(2, 5)])

    with pytest.raises(MatchingError, match="at least 2"):
        go(models[:1])
    with pytest.raises(MatchingError, match="at least 2"):
        go(models[0])
    for change, message in [
        ({"extra": torch.zeros(1)}, "model 2 has the extra key 'extra'"),
        ({"0.bias": torch.zeros(3)}, r"model 2: 0\.bias has the shape \(3,\)"),
        ({"0.bias": torch.full((7,), torch.nan)}, r"model 2: 0\.bias .* NaN"),
        ({"0.bias": torch.full((7,), torch.inf)}, r"model 2: 0\.bias .* infinite"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            go([*models[:2], models[2] | change])
    short = {n: v for n, v in models[1].items() if n != "1.weight"}
    with pytest.raises(CheckpointError, match=r"model 1 has no key '1\.weight'"):
        go([models[0], short, models[2]])
    with pytest.raises(SymmetryError, match="infer it again"):
        go(models, hand.mlp((5, 8, 6, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightMatching(start="random"), r"WeightMatching\(start='random'\): expected one of signature, ident"),
        (lambda: WeightMatching(restarts=-1), r"WeightMatching\(restarts=-1\): expected a number of at least 0"),
        (lambda: WeightMatching(max_sweeps=0), r"max_sweeps=0"),
        (lambda: WeightMatching(dtype="float16"), r"dtype='float16'"),
        (lambda: MergeMany(block_weights="no"), r"MergeMany\(block_weights='no'\)"),
        (lambda: MergeMany(max_rounds=0), r"MergeMany\(max_rounds=0\)"),
        (lambda: PairwiseFrankWolfe(solver=FrankWolfe(anchor=1)), r"set PairwiseFrankWolfe\(reference"),
        (lambda: ActivationMatching(kind="cosine"), r"kind='cosine'\): expected one of correlation, inner"),
        (lambda: ActivationMatching(mix=1.1), r"mix=1.1\): expected a share between 0 and 1"),
        (lambda: ActivationMatching(ActivationMatching()), r"the solver must be a matcher of weights"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(MatchingError, match=message):
        make()


@pytest.mark.parametrize(
    "matcher", [WeightMatching(3), PairwiseFrankWolfe(-1), Synchronised(WeightMatching(3)), FrankWolfe(anchor=3)]
)
def test_a_reference_that_is_no_model(matcher: Matcher) -> None:
    symmetry = hand.mlp()
    with pytest.raises(MatchingError, match="there are the models 0 to 2"):
        match([hand.weights(symmetry, i) for i in range(3)], symmetry, matcher)


def test_every_registered_matcher_is_under_test() -> None:
    """One file and one line in `MATCHERS`: the rest is found by what the class says of itself."""
    linear = set(test_linear_matchers.INEXACT) | set(test_zipit.INSEPARABLE)
    assert set(DEFAULTS) | linear == set(MATCHERS)
    assert not set(DEFAULTS) & linear


def test_exported_names() -> None:
    assert {type(m).__name__ for m in DEFAULTS.values()} <= set(matchers.__all__)
    assert type(DEFAULTS["identity"]) is Identity
    assert matchers.__all__ == sorted(matchers.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
