"""Activations as further parameters: the square root of their inner products, and the objective that it makes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from automerge.blocks import decompose
from automerge.matchers import FrankWolfe, MergeMany, Synchronised, WeightMatching, match
from automerge.matchers._augment import Site, augment, correlation, features, restrict
from automerge.symmetry import Slot, Symmetry
from tests import _symmetries as hand

torch.set_num_threads(1)


def units(symmetry: Symmetry, g: int, param: str) -> dict[int, list[Slot]]:
    """The slots of a generator on the axis 0 of a parameter, as an activation of the same layout would have them."""
    return {g: [Slot("", 0, s.index, s.within) for s in symmetry.sets[g].slots if (s.param, s.axis) == (param, 0)]}


def samples(count: int, n: int, size: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(z: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ais,bjs->aibj", z, z)


@pytest.mark.parametrize("size", [3, 40])
def test_features_are_a_square_root(size: int) -> None:
    gram = gram_of(samples(3, 5, size))
    root = features(gram)
    assert root.shape[:2] == (3, 5)
    assert root.shape[2] == min(size, 15)
    assert torch.allclose(gram_of(root), gram, atol=1e-10)


def test_correlation_is_numpys_and_zero_for_a_constant_unit() -> None:
    z = samples(2, 4)
    z[1, 2] = 3.0
    centred = z - z.mean(dim=2, keepdim=True)
    ours = correlation(gram_of(centred) / z.shape[2], z.mean(dim=2)).reshape(8, 8).numpy()
    alive = [i for i in range(8) if i != 6]
    assert np.allclose(ours[np.ix_(alive, alive)], np.corrcoef(z.reshape(8, -1).numpy()[alive]))
    assert (ours[6] == 0).all()
    assert (ours[:, 6] == 0).all()


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_the_objective_is_the_mixture_of_both(mix: float) -> None:
    symmetry = hand.mlp((3, 5, 4, 2))
    models = [hand.weights(symmetry, seed) for seed in range(3)]
    z = {0: samples(3, 5, seed=1), 1: samples(3, 4, seed=2)}
    sites = [
        Site(f"layer {g}", v.shape[1:2], units(symmetry, g, f"{g}.weight"), features(gram_of(v))) for g, v in z.items()
    ]
    larger, grown = augment(symmetry, models, sites, mix)
    result = match(grown, larger, FrankWolfe(dtype="float64"))
    small = [restrict(e, symmetry) for e in result.to_universe]
    ends = [symmetry.apply(m, e) for m, e in zip(models, small, strict=True)]
    order = {g: [e.maps[f"{g}.bias"][0].reshape(-1) for e in _whole(symmetry, small)] for g in z}
    pairs = list(itertools.combinations(range(3), 2))
    moving = [n for n in symmetry.shapes if n != "2.bias"]
    on_weights = sum(float((ends[a][n] * ends[b][n]).sum()) for a, b in pairs for n in moving)
    norm_weights = sum(float(m[n].square().sum()) for m in models for n in moving) / 3
    on_values = sum(float((v[a][order[g][a]] * v[b][order[g][b]]).sum()) for a, b in pairs for g, v in z.items())
    norm_values = sum(float(v.square().sum()) for v in z.values()) / 3
    expected = mix * on_values / norm_values + (1 - mix) * on_weights / norm_weights
    assert result.stats["objective"] == pytest.approx(expected, rel=1e-9)


def _whole(symmetry: Symmetry, elements: list) -> list:
    """The elements with a map for every parameter."""
    from automerge.groups import Element, identity_index

    everything = {n: identity_index(s) for n, s in symmetry.shapes.items()}
    return [Element(symmetry.shapes, {**everything, **e.maps}) for e in elements]


@pytest.mark.parametrize("mix", [0.5, 1.0])
@pytest.mark.parametrize("solver", [FrankWolfe(), MergeMany(), WeightMatching(), Synchronised(WeightMatching())])
def test_planted_elements_of_nested_groups_are_found_from_activations(solver: object, mix: float) -> None:
    """Towers of blocks of units: only the innermost axis is observed, with all three levels acting on it."""
    symmetry = hand.towers()
    n = symmetry.shapes["w"][0]
    rng = np.random.default_rng(0)
    elements = [symmetry.random_element(rng) for _ in range(3)]
    base = hand.weights(symmetry, 0)
    models = [symmetry.apply(base, e) for e in elements]
    values = samples(1, n)[0]
    moved = torch.stack([e.apply_to("w", values[:, :4].contiguous()) for e in elements])
    full = torch.stack([values[torch.from_numpy(e.maps["w"][0].reshape(-1))] for e in elements])
    assert torch.equal(full[:, :, :4], moved)
    slots = {g: mine for g in range(len(symmetry.sets)) if (mine := units(symmetry, g, "w")[g])}
    larger, grown = augment(symmetry, models, [Site("w", (n,), slots, features(gram_of(full)))], mix)
    one, other = decompose(symmetry).structure, decompose(larger).structure
    assert [(r.size, r.path) for r in one.roles] == [(r.size, r.path) for r in other.roles]
    result = match(grown, larger, solver)  # type: ignore[arg-type]
    for a, b in itertools.permutations(range(3), 2):
        assert restrict(result.between(a, b), symmetry) == elements[a].inverse().then(elements[b])
