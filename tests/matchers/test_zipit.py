"""ZipIt: its clusters against a slow reading of the paper, and networks that only it can merge exactly."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from automerge import Matching, Repair, ZipIt, infer, match, matchers, merge
from automerge._errors import MatchingError
from automerge._linear_maps import LinearElement
from automerge.matchers._zipit import zip_units
from tests.matchers import _families as families
from tests.matchers._families import family, network

torch.set_num_threads(1)


def slow(samples: np.ndarray, keep: int, models: int, within: bool) -> list[set[int]]:
    """From the activations themselves: the two groups whose means correlate most are joined, until ``keep`` are left."""
    groups = [{u} for u in range(samples.shape[1])]
    while len(groups) > keep:
        means = np.stack([samples[:, sorted(g)].mean(1) for g in groups], 1)
        score = np.corrcoef(means.T)
        for i, a in enumerate(groups):
            for j, b in enumerate(groups):
                clash = any(x // keep == y // keep for x in a for y in b)
                if i >= j:
                    score[i, j] = -np.inf
                elif clash and not within:
                    score[i, j] -= 4
        i, j = np.unravel_index(int(score.argmax()), score.shape)
        groups[int(i)] |= groups.pop(int(j))
    del models
    return groups


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 4), st.booleans())
def test_clusters(seed: int, n: int, models: int, within: bool) -> None:
    rng = np.random.default_rng(seed)
    samples = rng.normal(size=(50, models * n)) @ rng.normal(size=(models * n, models * n))
    labels = zip_units(np.cov(samples.T, ddof=0).reshape(models * n, -1), n, within)
    found = [{int(u) for u in np.flatnonzero(labels == c)} for c in range(n)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, slow(samples, n, models, within)))


def test_units_that_never_vary_meet_those_of_their_place() -> None:
    covariance = np.zeros((4, 4))
    covariance[np.ix_([0, 2], [0, 2])] = 1.0
    assert zip_units(covariance, 2).tolist() == [0, 1, 0, 1]


def net(seed: int, hidden: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def doubled(seed: int) -> nn.Sequential:
    """A network whose hidden units come in equal pairs."""
    model = net(seed)
    state = model.state_dict()
    for layer, n in (("0", 6), ("2", 4)):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            state[name][n // 2 :] = state[name][: n // 2]
    model.load_state_dict(state)
    return model


def test_two_networks_of_pairs_become_their_mean() -> None:
    """Within each model the pairs are merged, which makes room for the other: the ensemble in one network."""
    nets = [doubled(0), doubled(1)]
    x = torch.randn(200, 5, dtype=torch.float64)
    result = merge(nets, x, matcher=ZipIt(), data=x, repair="none")
    one = deepcopy(nets[0])
    one.load_state_dict(result.state_dict)
    with torch.no_grad():
        wanted = (nets[0](x) + nets[1](x)) / 2
        assert torch.allclose(one(x), wanted, atol=1e-9)
    assert list(result.matching.stats["within"].values()) == [12, 8]
    across = merge(nets, x, matcher=ZipIt(within=False), data=x, repair="none")
    one.load_state_dict(across.state_dict)
    with torch.no_grad():
        assert (one(x) - wanted).norm() > 0.1 * wanted.norm(), "permutations have no room"
    assert list(across.matching.stats["within"].values()) == [0, 0]


def test_the_average_is_the_formula_of_the_paper() -> None:
    nets = [net(k) for k in range(3)]
    x = torch.randn(100, 5, dtype=torch.float64)
    result = merge(nets, x, matcher=ZipIt(), data=x, repair="none")
    first, second = [], []
    for element in result.matching.to_universe:
        assert isinstance(element, LinearElement)
        a, b = (
            element.matrices[g] for g in sorted(element.matrices, key=lambda g: -element.matrices[g].forward.shape[0])
        )
        first.append((a.forward / 3, a.inverse))
        second.append((b.forward / 3, b.inverse))
    states = [n.state_dict() for n in nets]
    assert torch.allclose(sum(m for m, _ in first).sum(1), torch.ones(6).double()), "every cluster is a mean"
    middle = sum(m @ s["2.weight"] @ u for (m, _), (_, u), s in zip(second, first, states, strict=True))
    assert torch.allclose(result.state_dict["2.weight"], middle)
    bottom = sum(m @ s["0.weight"] for (m, _), s in zip(first, states, strict=True))
    assert torch.allclose(result.state_dict["0.weight"], bottom)
    top = sum(s["4.weight"] @ u for (_, u), s in zip(second, states, strict=True)) / 3
    assert torch.allclose(result.state_dict["4.weight"], top)


INSEPARABLE = {n: make() for n, make in matchers.MATCHERS.items() if not make().separable}
FEW = ("linear_only", "mlp_layernorm", "mlp", "conv_bn", "Residual", "ConcatenateTwice", "GroupedQuerySdpa", "zoo vit")


def mean(result: Matching, models: list[Any]) -> dict[str, torch.Tensor]:
    """What the matching is for: the average in the universe."""
    moved = result.apply(models)
    return {
        n: torch.stack([m[n].double() for m in moved]).mean(0) for n, v in moved[0].items() if v.is_floating_point()
    }


def given(name: str, models: list[dict[str, torch.Tensor]]) -> list[Any]:
    """The first model as a module."""
    own = deepcopy(network(name)[0])
    own.load_state_dict(models[0])
    own = own.to(next(v.dtype for v in models[0].values() if v.is_floating_point()))
    return [own, *models[1:]]


@pytest.mark.parametrize("name", families.NETWORKS)
@pytest.mark.parametrize("matcher", INSEPARABLE)
def test_what_is_owed_on_every_network(matcher: str, name: str, tmp_path: Path) -> None:
    """Shapes, types, finite numbers, the same answer again, files to the bit, and units permuted beforehand."""
    symmetry, made = network(name)[2], INSEPARABLE[matcher]
    models, _ = family(name, 3)
    copies = [{n: v.clone() for n, v in m.items()} for m in models]
    data = families.batches(name, 8)
    result = match(given(name, models), symmetry, made, data=data)
    assert all(torch.equal(m[n], c[n]) for m, c in zip(models, copies, strict=True) for n in m), "inputs changed"
    moved = result.apply(models)
    for own, before in zip(moved, models, strict=True):
        assert {n: (v.shape, v.dtype) for n, v in own.items()} == {n: (v.shape, v.dtype) for n, v in before.items()}
        assert all(torch.isfinite(v).all() for v in own.values() if v.is_floating_point())
    assert match(given(name, models), symmetry, made, data=data).to_universe == result.to_universe
    result.save(tmp_path / "m.safetensors")
    read = Matching.load(tmp_path / "m.safetensors").apply(models)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(read, moved, strict=True) for n in a)
    # in the coordinates of the first model the merged network does not depend on how the others are numbered
    others = [models[0], *(symmetry.apply(m, symmetry.random_element(k)) for k, m in enumerate(models[1:]))]
    again = mean(match(given(name, others), symmetry, made, data=data), others)
    for n, v in mean(result, models).items():
        assert torch.allclose(again[n], v, rtol=1e-5, atol=1e-6 * float(v.abs().max() + 1)), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("matcher", INSEPARABLE)
def test_any_number_of_models(matcher: str, count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype) for _ in range(count)]
    x = torch.randn(60, 5, dtype=dtype)
    result = match(nets, infer(nets[0], x), INSEPARABLE[matcher], data=[x[:30], x[30:]])
    assert len(result) == count
    assert all(v.dtype == dtype and torch.isfinite(v).all() for m in result.apply(nets) for v in m.values())


def test_interrupting_leaves_the_permutations() -> None:
    nets = [net(k) for k in range(3)]
    x = torch.randn(50, 5, dtype=torch.float64)

    def stop(numbers: object) -> None:
        raise KeyboardInterrupt

    result = match(nets, infer(nets[0], x), ZipIt(), progress=stop, data=x)
    assert result.stats["interrupted"]
    assert result.cycle_error() == 0


@pytest.mark.parametrize("name", FEW)
def test_copies_are_merged_to_what_they_are(name: str) -> None:
    """Permuted copies give the first model back, groups without matrices included."""
    model, _, symmetry = network(name)
    (state,), _ = family(name, 1)
    others = [symmetry.apply(state, symmetry.random_element(k)) for k in range(2)]
    own = deepcopy(model)
    own.load_state_dict(state)
    own = own.to(next(v.dtype for v in state.values() if v.is_floating_point()))
    result = match([own, *others], symmetry, ZipIt(), data=families.batches(name, 40))
    moved = result.apply([state, *others])
    for n, v in state.items():
        if v.is_floating_point():
            mean = torch.stack([m[n].double() for m in moved]).mean(0)
            assert torch.allclose(mean, v.double(), rtol=1e-5, atol=1e-6 * float(v.abs().max() + 1)), n


def test_what_it_cannot_do_it_says(tmp_path: Path) -> None:
    nets = [net(k) for k in range(2)]
    x = torch.randn(50, 5, dtype=torch.float64)
    symmetry = infer(nets[0], x)
    found = match(nets, symmetry, ZipIt(), data=x)
    for ask in (lambda: found.between(0, 1), found.cycle_error):
        with pytest.raises(MatchingError, match="no map from one model to another"):
            ask()
    found.save(tmp_path / "z.safetensors")
    read = Matching.load(tmp_path / "z.safetensors")
    assert read.to_universe == found.to_universe
    with pytest.raises(MatchingError, match="no map from one model to another"):
        read.between(0, 1)
    assert merge(nets, x, matcher=ZipIt(), data=x).repair.mode == "none", "auto finds nothing to repair towards"
    with pytest.raises(MatchingError, match="nothing to repair towards"):
        merge(nets, x, matcher=ZipIt(), data=x, repair="repair")
    with pytest.raises(MatchingError, match="nothing to repair towards"):
        merge(nets, x, matcher=ZipIt(), data=x, repair=Repair())
    with pytest.raises(MatchingError, match="equal weights in the universe"):
        merge(nets, x, matcher=ZipIt(), data=x, weights=[1, 2])
    with pytest.raises(MatchingError, match="equal weights in the universe"):
        merge(nets, x, matcher=ZipIt(), data=x, coordinates=0)
    with pytest.raises(MatchingError, match="looks at activations"):
        match(nets, symmetry, ZipIt())
    with pytest.raises(MatchingError, match="reference=2"):
        match(nets, symmetry, ZipIt(reference=2), data=x)
