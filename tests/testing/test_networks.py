"""Random networks: the ground truth itself is checked, without inference."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from torch import nn

from automerge import AutomergeError
from automerge.testing import (
    Checkpoints,
    Network,
    assert_same_symmetry,
    assert_sound,
    checkpoints,
    free_positions,
    networks,
    rebuild,
)
from automerge.testing._blocks import BLOCKS
from automerge.testing._builder import Builder
from automerge.testing._ledger import Cell, Ledger, Units, cells, distinct, grouped, whole
from automerge.testing._networks import _head, build
from automerge.testing._spatial import IMAGE, TOKENS, to_vector


def random_network(seed: int, **options: Any) -> Network:
    rng = np.random.default_rng(seed)
    return build(lambda choices: choices[int(rng.integers(len(choices)))], **options)


@settings(max_examples=40)
@given(networks())
def test_the_ground_truth_is_sound(network: Network) -> None:
    assert_sound(network.model, network.args, network.symmetry)


@settings(max_examples=20)
@given(networks())
def test_a_network_runs_and_knows_its_parameters(network: Network) -> None:
    before = copy.deepcopy(network.model.state_dict())
    out = network.model.eval()(*network.args)
    assert bool(torch.isfinite(out).all())
    named = dict(network.model.named_parameters()) | dict(network.model.named_buffers())
    for name, shape in network.symmetry.shapes.items():
        assert tuple(named[name].shape) == shape
    assert network.sizes == tuple(sorted(g.size for g in network.generators))
    assert dict(network.free) == free_positions(network.symmetry)
    assert all(torch.equal(v, network.model.state_dict()[n]) for n, v in before.items())


def test_the_algebra_is_covered() -> None:
    """Every block is drawn, and its ground truth is not always empty."""
    drawn: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    within = 0
    for seed in range(400):
        network = random_network(seed)
        drawn.update(type(m).__name__ for m in network.model.modules())
        drawn.update(m.text.split()[0] for m in network.model.modules() if hasattr(m, "text"))
        sizes.update(network.sizes)
        within += any(s.within for g in network.generators for s in g.slots)
    wanted = {
        "attention",
        "grouped",
        "experts",
        "glu",
        "se",
        "shared,",
        "cat([x,",
        "cat",
        "x",
        "flip",
        "cumsum",
        "tanh(f(x))",
    }
    wanted |= {
        "LayerNorm",
        "RMSNorm",
        "GroupNorm",
        "BatchNorm1d",
        "BatchNorm2d",
        "ConvTranspose2d",
        "ParametrizedLinear",
    }
    assert wanted <= set(drawn)
    assert all(sizes[n] > 20 for n in (2, 3, 4, 5))
    assert within > 8


@pytest.mark.parametrize("kind", ["vector", "tokens", "image"])
def test_every_block_is_sound_alone(kind: str) -> None:
    table = BLOCKS | (IMAGE if kind == "image" else TOKENS if kind == "tokens" else {})
    for name, make in table.items():
        rng = np.random.default_rng(len(name))
        for _ in range(3):
            b = Builder(lambda choices, rng=rng: choices[int(rng.integers(len(choices)))], kind, 4)
            first = cells(Units(6))
            inp = b.mix(cells(Units(2, pinned=True)), first)
            made = make(b, first)
            if made is None:
                continue
            head = b.mix(made[1], cells(Units(2, pinned=True)))
            model = nn.Sequential(inp, made[0], head)
            shape = {"vector": (2, 2), "tokens": (2, 4, 2), "image": (2, 2, 4, 4)}[kind]
            assert_sound(model, torch.randn(shape), b.ledger.symmetry(model))


@pytest.mark.parametrize("kind", ["image", "tokens"])
def test_a_block_after_flattening_is_sound_at_other_sizes(kind: str) -> None:
    """A list of positions, or a slice, of flattened pixels cuts elsewhere when there are more of them."""
    runs: Counter[str] = Counter()
    for name, make in BLOCKS.items():
        rng = np.random.default_rng(len(name))
        for _ in range(12):
            b = Builder(lambda choices, rng=rng: choices[int(rng.integers(len(choices)))], kind, 2)
            x = cells(Units(2)) + cells(Units(3))
            modules = [b.mix(cells(Units(2, pinned=True)), x)]
            draw, b.pick = b.pick, lambda choices: choices[-1]
            flat, x = to_vector(b, x)
            b.pick = draw
            made = make(b, x)
            if made is None:
                continue
            model = nn.Sequential(*modules, flat, made[0], _head(b, made[1]))
            larger = torch.randn((2, 2, 3, 3) if kind == "image" else (2, 3, 2))
            try:
                model(larger)
            except RuntimeError:
                continue  # refused
            runs[name] += 1
            assert_sound(model, larger, b.ledger.symmetry(model))
    assert not runs["dense"]
    assert runs["drop" if kind == "tokens" else "softmax"]


@settings(max_examples=25)
@given(networks())
def test_a_network_s_repr_builds_it_again(network: Network) -> None:
    """Weights, inputs and truth included, whatever torch's random state is."""
    call = repr(network).splitlines()[-1].strip().removesuffix(")")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = eval(call, {"rebuild": rebuild})
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(again) == repr(network)
    own = network.model.state_dict()
    assert all(torch.equal(v, own[n]) for n, v in again.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(again.args, network.args, strict=True))
    assert_same_symmetry(again.symmetry, network.symmetry)


def test_hypothesis_prints_what_builds_a_failing_network_again() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))

    @settings(database=None, derandomize=True)
    @given(networks(kinds=["vector"]), checkpoints(net, 2, args=torch.ones(1, 2)))
    def fails(network: Network, family: Checkpoints) -> None:
        assert len(network.sizes) < 2

    with pytest.raises(AssertionError) as info:
        fails()
    told = "\n".join(info.value.__notes__)
    assert "tensor" not in told
    call = next(line for line in told.splitlines() if "rebuild(" in line)
    assert len(eval(call.strip().removesuffix(",").removesuffix(")"), {"rebuild": rebuild}).sizes) >= 2
    assert "family=Checkpoints(n=2, seed=0, noise=0, elements=(" in told


def test_choices_of_no_network_are_refused() -> None:
    for choices in ([], [0, 0, 0], [99], "x"):
        with pytest.raises(AutomergeError, match="choices"):
            rebuild(choices)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": "vector"}, "expected a list of some of vector, tokens, image"),
        ({"kinds": ["pictures"]}, "pictures"),
        ({"kinds": []}, "kinds"),
        ({"max_blocks": 0}, "at least 1"),
        ({"max_blocks": 2.5}, "whole number"),
    ],
)
def test_unsuitable_options_are_refused_where_they_are_given(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AutomergeError, match=words):
        networks(**options)


def test_a_failing_network_shrinks_to_a_small_one() -> None:
    bounds = settings(database=None, max_examples=200)
    found = find(networks(), lambda n: len(n.sizes) > 1, settings=bounds, random=Random(0))
    assert len(repr(found).splitlines()) < 20
    assert sum(p.numel() for p in found.model.parameters()) < 60


# -------------------------------------------------------------------- the books
def test_copies_are_units_inside_units() -> None:
    x = cells(Units(3))
    apart = distinct(x + x)
    assert len(set(apart)) == 6
    assert apart[0].units.parent is x[0].units
    assert distinct(x) == x


def test_grouping_changes_units_in_place() -> None:
    x = cells(Units(6))
    parts = grouped(x, 2)
    assert parts is not None
    assert x[0].units.size == 3
    assert [(outer is x[0].units.parent, number) for outer, number, _ in parts] == [(True, 0), (True, 1)]
    assert grouped(x, 3) is None
    both = cells(Units(2)) + cells(Units(2))
    assert [outer for outer, _, _ in grouped(both, 2) or []] == [None, None]


def test_a_slice_of_whole_sets_singles_out_nothing() -> None:
    x = cells(Units(3)) + cells(Units(2))
    assert whole(x, range(3))
    assert not whole(x, range(2))


def test_nested_ownership_becomes_a_wreath_product() -> None:
    outer = Units(2)
    inner = Units(3, outer)
    layer = nn.Linear(1, 6)
    books = Ledger()
    books.own(layer.bias, 0, cells(inner))
    generators = books.generators(layer)
    assert [g.size for g in generators] == [3, 3, 2]
    assert generators[-1].slots[0].index.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert Cell(inner, 4).under(outer) == (1, 1)
    inner.pin()
    assert books.generators(layer) == []


# -------------------------------------------------------------------- imports
def test_importing_has_no_side_effects() -> None:
    program = """
import sys, automerge
assert "automerge.testing" not in sys.modules
import automerge.testing
automerge.testing.assert_sound
assert "hypothesis" not in sys.modules
automerge.testing.networks
assert "hypothesis" in sys.modules and "pytest" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_unknown_names_are_refused() -> None:
    import automerge.testing

    assert "networks" in dir(automerge.testing)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        automerge.testing.nonsense  # noqa: B018
