"""Inference and matching together: a planted group element of one network is recovered exactly, on any architecture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from automerge import ActivationMatching, FrankWolfe, WeightMatching, infer, match
from automerge.symmetry import Symmetry
from automerge.testing import Network, networks
from tests.inference import networks_hostile
from tests.inference.networks import CASES
from zoo.models import ZOO


def random_state(model: torch.nn.Module, symmetry: Symmetry, seed: int) -> dict[str, torch.Tensor]:
    """Continuous random weights in every float entry, tied ones alike."""
    generator = torch.Generator().manual_seed(seed)
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return state | {alias: state[name] for alias, name in symmetry.aliases.items()}


def recovered(model: torch.nn.Module, args: Any, n: int = 2, kwargs: dict[str, Any] | None = None) -> None:
    symmetry = infer(model, args, kwargs, verify=False)
    base = random_state(model, symmetry, 0)
    elements = [symmetry.identity(), *(symmetry.random_element(seed) for seed in range(1, n))]
    models = [symmetry.apply(base, e) for e in elements]
    matching = match(models, symmetry, FrankWolfe(dtype="float64"))
    assert not matching.stats.get("left_out_generators")
    assert matching.cycle_error() == 0
    for i in range(1, n):
        moved = symmetry.apply(base, matching.between(0, i))
        assert all(torch.equal(moved[k], models[i][k]) for k in moved)


@pytest.mark.parametrize("name", CASES)
def test_small_networks(name: str) -> None:
    torch.manual_seed(0)
    factory, args, _ = CASES[name]
    recovered(factory(), args)


@pytest.mark.parametrize("name", [n for n in networks_hostile.CASES if n not in networks_hostile.OPEN])
def test_hostile_networks(name: str) -> None:
    torch.manual_seed(0)
    factory, args, _ = networks_hostile.CASES[name]
    recovered(factory(), args, kwargs=networks_hostile.KWARGS.get(name))


def test_blocks_that_torch_would_lay_out_as_images() -> None:
    """A stack of grouped kernels: torch puts the channels last, unless told otherwise."""

    class Grouped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = torch.nn.Conv2d(3, 6, 1), torch.nn.Conv2d(6, 16, 3, padding=1, groups=2)
            self.f, self.out = torch.nn.Conv2d(8, 16, 1), torch.nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.c(self.a(x).relu()).relu()
            weight = self.f(sum(h.split(8, 1))).view(2, 2, 8, 8, 8).softmax(1).flatten(1, 2)  # type: ignore[arg-type]
            return self.out(sum((h * weight).split(8, 1)))  # type: ignore[arg-type]

    torch.manual_seed(0)
    recovered(Grouped(), torch.randn(2, 3, 8, 8), n=3)


def test_groups_of_two_sizes_on_one_stream() -> None:
    """Pairs in halves (SqueezeBERT): rows of a kernel that hold both pairs of a half stay where these are swapped."""

    class Stream(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.out = torch.nn.Conv1d(3, 12, 1), torch.nn.Conv1d(12, 2, 1)
            self.halves, self.pairs = torch.nn.Conv1d(12, 12, 1, groups=2), torch.nn.Conv1d(12, 12, 1, groups=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = x + self.halves(x).relu()
            return self.out(x + self.pairs(x).relu())

    torch.manual_seed(0)
    recovered(Stream(), torch.randn(2, 3, 5), n=3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_random_networks(network: Network) -> None:
    recovered(network.model, network.args, n=3)


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    torch.manual_seed(0)
    factory, args = ZOO[name]
    recovered(factory(), args, n=3)


@pytest.mark.parametrize("matcher", [FrankWolfe(dtype="float64"), ActivationMatching(), WeightMatching()], ids=repr)
def test_only_the_imaginary_parts_tell_units_apart(matcher: Any) -> None:
    class Spectral(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(1 + 1j * torch.randn(3, 5))
            self.v = torch.nn.Parameter(1 + 1j * torch.randn(5, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ((x.to(self.w.dtype) @ self.w).tanh() @ self.v).abs()

    torch.manual_seed(0)
    model, x = Spectral(), torch.randn(40, 3)
    symmetry = infer(model, x)
    assert [g.size for g in symmetry.generators()] == [5]
    state = model.state_dict()
    other = symmetry.apply(state, symmetry.random_element(1))
    twin = copy.deepcopy(model)
    twin.load_state_dict(other)
    data = [(x,)] if matcher.needs_data else None
    moved = symmetry.apply(state, match([model, twin], symmetry, matcher, data=data).between(0, 1))
    assert all(torch.equal(moved[n], other[n]) for n in other)
