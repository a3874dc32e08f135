"""What CCA and Procrustes owe where statistics are awkward: crossed groups, silent units, few samples, bad numbers."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from automerge import CCA, FrankWolfe, Matching, Procrustes, infer, match
from automerge._errors import AutomergeError, MatchingError
from automerge._linear_maps import LinearElement
from tests.matchers import _families as families
from tests.matchers._families import family, network

torch.set_num_threads(1)
F64 = torch.float64


def nets(count: int, width: int = 12) -> list[nn.Sequential]:
    out = []
    for seed in range(count):
        torch.manual_seed(seed)
        layers = [nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)]
        out.append(nn.Sequential(*layers).double())
    return out


def inputs(count: int = 300) -> torch.Tensor:
    return torch.randn(count, 5, dtype=F64, generator=torch.Generator().manual_seed(0))


def run(matcher: CCA | Procrustes, models: list[nn.Sequential], x: torch.Tensor) -> Matching:
    return match(models, infer(models[0], inputs(2), verify=False), matcher, data=[x])


@pytest.mark.parametrize("matcher", [CCA(), Procrustes()])
def test_where_a_value_carries_two_groups_the_order_of_the_other_does_not_matter(matcher: CCA | Procrustes) -> None:
    """An MLP-Mixer's token units are read once per channel; the channels of two models first have to correspond."""
    model, _, symmetry = network("zoo mixer")
    models, _ = family("zoo mixer", 2, noise=0.3)
    first = deepcopy(model)
    first.load_state_dict(models[0])
    data = families.batches("zoo mixer")
    element = symmetry.random_element(np.random.default_rng(5))
    other = symmetry.apply(models[1], element)
    one, two = (match([first, m], symmetry, matcher, data=data) for m in (models[1], other))
    assert any("tokens" in g for g in one.stats["linear_groups"])
    here, there = symmetry.apply(models[1], one.between(1, 0)), symmetry.apply(other, two.between(1, 0))
    for n, value in here.items():
        assert torch.allclose(value, there[n], rtol=0, atol=1e-6 * (1 + float(value.abs().max()))), n


def test_a_group_that_never_varies_keeps_its_permutation() -> None:
    models, x = nets(3), inputs()
    with torch.no_grad():
        models[1][2].bias.fill_(-100.0)
    result = run(CCA(), models, x)
    assert list(result.stats["permuted_groups"].values()) == ["its units never vary in model 1"]
    assert len(result.stats["linear_groups"]) == 1


def test_silent_units_need_a_ridge() -> None:
    models, x = nets(2), inputs()
    with torch.no_grad():
        models[1][0].bias[0] = -100.0
    ridged = run(CCA(ridge=0.1), models, x)
    assert ridged.stats["inverse_error"] < 1e-8
    assert max(float(m.forward.abs().max()) for m in matrices(ridged)) < 100


def matrices(result: Matching) -> list[object]:
    return [m for e in result.to_universe if isinstance(e, LinearElement) for m in e.matrices.values()]


def test_fewer_samples_than_units() -> None:
    models = nets(2)
    result = run(CCA(), models, inputs(4))
    assert result.stats["inverse_error"] < 1e-8
    assert len(result.stats["notes"]) == 2
    assert "4 samples for 12 units" in result.stats["notes"][0]
    assert run(CCA(), models, inputs(50)).stats["notes"] == []
    with pytest.raises(MatchingError, match=r"singular to working precision.*give a larger ridge"):
        run(CCA(ridge=0.0), models, inputs(4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("matcher", [CCA(), Procrustes(), CCA(permutations=FrankWolfe())])
def test_activations_that_are_no_numbers(matcher: CCA | Procrustes, value: float) -> None:
    x = inputs()
    x[3, 2] = value
    with pytest.raises(AutomergeError, match="NaN among its inputs" if value != value else "NaN or infinite"):
        run(matcher, nets(2), x)
