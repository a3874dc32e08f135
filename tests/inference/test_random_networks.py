"""Inference on random networks whose symmetry was decided while they were built."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from torch import nn

from automerge import Symmetry, infer
from automerge.testing import Network, assert_invariant, assert_same_symmetry, free_positions, networks


def check(network: Network) -> None:
    """Nothing wrong, nothing missing, and invariant in float64."""
    found = infer(network.model, network.args)
    assert tuple(sorted(g.size for g in found.generators())) == network.sizes
    assert free_positions(found) == dict(network.free)
    assert_same_symmetry(found, network)
    assert not found.unruled
    assert found.statistics == network.symmetry.statistics
    assert dict(found.aliases) == dict(network.symmetry.aliases)
    assert_invariant(network.model, network.args, found, tolerance=1e-10)


@settings(max_examples=60)
@given(networks(kinds=["vector"]))
def test_vectors(network: Network) -> None:
    check(network)


@settings(max_examples=40)
@given(networks(kinds=["tokens"], max_blocks=3))
def test_tokens(network: Network) -> None:
    check(network)


@settings(max_examples=60)
@given(networks(kinds=["image"]))
def test_images(network: Network) -> None:
    check(network)


def test_copies_of_the_input_are_interchangeable() -> None:
    """cat([x, x]): the two columns that read the same value, also where x itself is pinned."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.cat([x, x], 1))

    assert [g.size for g in infer(Twice(), torch.randn(2, 3)).generators()] == [2, 2, 2]


def test_copies_of_joint_positions_are_interchangeable() -> None:
    """Tokens and channels flattened, then concatenated with themselves; and the square of copies beside their tanh."""

    class Flat(nn.Module):
        def __init__(self, square: bool) -> None:
            super().__init__()
            self.mix, self.out, self.square = nn.Linear(2, 2), nn.Linear(24 if square else 12, 2), square

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.mix(x)
            if self.square:
                h = torch.cat([h, h], -1)
                return self.out(torch.cat([h.tanh(), h * h], -1).flatten(1))
            h = h.flatten(1)
            return self.out(torch.cat([h, h], 1))

    assert [g.size for g in infer(Flat(False), torch.randn(2, 3, 2)).generators()] == [2] * 7
    assert [g.size for g in infer(Flat(True), torch.randn(2, 3, 2)).generators()] == [2] * 13


@settings(max_examples=20)
@given(networks())
def test_the_answer_is_deterministic_and_leaves_the_model_alone(network: Network) -> None:
    before = copy.deepcopy(network.model.state_dict())
    network.model.train()
    first = infer(network.model, network.args, verify=False)
    second = infer(copy.deepcopy(network.model), tuple(torch.zeros_like(a) for a in network.args), verify=False)
    assert first.generators() == second.generators()
    assert [(p.param, p.axis, p.count, p.reason) for p in first.pins] == [
        (p.param, p.axis, p.count, p.reason) for p in second.pins
    ]
    assert network.model.training
    assert all(torch.equal(v, network.model.state_dict()[n]) for n, v in before.items())


@settings(max_examples=20)
@given(networks())
def test_the_answer_survives_json(network: Network) -> None:
    found = infer(network.model, network.args, verify=False)
    again = Symmetry.from_json(found.to_json())
    assert again.generators() == found.generators()
    assert again.to_json() == found.to_json()
    state = network.model.state_dict()
    moved = found.apply(state, found.random_element(3))
    assert all(torch.equal(v, moved[n]) for n, v in again.apply(state, again.random_element(3)).items())


@settings(max_examples=20)
@given(networks())
def test_every_position_is_free_or_pinned_for_a_reason(network: Network) -> None:
    found = infer(network.model, network.args, verify=False)
    free = free_positions(found)
    pinned = {(p.param, p.axis): 0 for p in found.pins}
    for p in found.pins:
        pinned[p.param, p.axis] += p.count
    for name, shape in found.shapes.items():
        for axis, n in enumerate(shape):
            if n > 1:
                assert len(free.get((name, axis), ())) + pinned.get((name, axis), 0) == n
    assert all(p.reason for p in found.pins)
