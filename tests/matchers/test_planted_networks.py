"""Inference and matching together: a planted group element of one network is recovered exactly, on any architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from automerge import FrankWolfe, infer, match
from automerge.symmetry import Symmetry
from tests.inference.networks import CASES
from zoo.models import ZOO

# units that overlap are no set of blocks: such a generator is left out of the match, and listed
OVERLAPPING = {"OuterSquare"}


def random_state(model: torch.nn.Module, symmetry: Symmetry, seed: int) -> dict[str, torch.Tensor]:
    """Continuous random weights in every float entry, tied ones alike."""
    generator = torch.Generator().manual_seed(seed)
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return state | {alias: state[name] for alias, name in symmetry.aliases.items()}


def recovered(model: torch.nn.Module, args: Any, n: int = 2) -> None:
    symmetry = infer(model, args, verify=False)
    base = random_state(model, symmetry, 0)
    elements = [symmetry.identity(), *(symmetry.random_element(seed) for seed in range(1, n))]
    models = [symmetry.apply(base, e) for e in elements]
    matching = match(models, symmetry, FrankWolfe(dtype="float64"))
    assert not matching.stats.get("left_out_generators")
    assert matching.cycle_error() == 0
    for i in range(1, n):
        moved = symmetry.apply(base, matching.between(0, i))
        assert all(torch.equal(moved[k], models[i][k]) for k in moved)


@pytest.mark.parametrize("name", [n for n in CASES if n not in OVERLAPPING])
def test_small_networks(name: str) -> None:
    torch.manual_seed(0)
    factory, args, _ = CASES[name]
    recovered(factory(), args)


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    torch.manual_seed(0)
    factory, args = ZOO[name]
    recovered(factory(), args, n=3)
