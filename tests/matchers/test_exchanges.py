"""Interchangeable modules: elements, files, every matcher, and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from automerge import (
    CCA,
    ActivationMatching,
    Element,
    Exchange,
    FrankWolfe,
    Generator,
    Matcher,
    Matching,
    MergeMany,
    PairwiseFrankWolfe,
    Repair,
    Slot,
    Symmetry,
    SymmetryError,
    Synchronised,
    WeightMatching,
    infer,
    match,
    merge,
)
from automerge.blocks import decompose
from automerge.objective import Objective
from automerge.testing import assert_cycle_consistent, assert_invariant, assert_sound, elements

COUNT, WIDTH, HIDDEN = 4, 6, 5
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


class Mixture(nn.Module):
    """Experts as modules between two linear layers, with normalisation inside."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inp, self.gate, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, COUNT), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
            for _ in range(COUNT)
        )
        for expert in self.experts:
            expert[1].running_mean.normal_()
            expert[1].running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x)
        g = self.gate(h).softmax(-1)
        return self.out(sum(g[:, e : e + 1] * expert(h) for e, expert in enumerate(self.experts)))


@pytest.fixture(scope="module")
def symmetry() -> Symmetry:
    return infer(Mixture(), X)


def _loaded(state: dict[str, torch.Tensor]) -> nn.Module:
    net = Mixture()
    net.load_state_dict(state)
    return net.eval()


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_elements_compose_invert_and_move_as_they_say(symmetry: Symmetry, data: st.DataObject) -> None:
    a, b = data.draw(elements(symmetry)), data.draw(elements(symmetry))
    state = Mixture().state_dict()
    twice = symmetry.apply(symmetry.apply(state, a), b)
    once = symmetry.apply(state, a.then(b))
    assert all(torch.equal(twice[n], once[n]) for n in state)
    assert a.then(a.inverse()).is_identity()
    assert a.inverse().then(a).is_identity()
    assert a.inverse().inverse() == a
    assert (a == symmetry.identity()) == a.is_identity()
    assert symmetry.apart(symmetry.together(a)) == a
    assert symmetry.apart(symmetry.together(a).then(symmetry.together(b))) == a.then(b)


def test_an_exchange_writes_what_its_definition_says(symmetry: Symmetry) -> None:
    (exchange,), state = symmetry.exchanges, Mixture().state_dict()
    p = np.array([2, 0, 3, 1])
    moved = symmetry.apply(state, symmetry.element([range(g.size) for g in symmetry.generators()], [p]))
    for u, names in enumerate(exchange.params):
        for name, source in zip(names, exchange.params[p[u]], strict=True):
            assert torch.equal(moved[name], state[source])
    assert torch.equal(moved["gate.bias"], state["gate.bias"][torch.from_numpy(p)])
    torch.testing.assert_close(_loaded(moved)(X), _loaded(state)(X))
    assert "experts.0.1.running_var" in exchange.params[0]


def test_soundness_tools_see_exchanges(symmetry: Symmetry) -> None:
    assert_sound(Mixture(), X, symmetry)
    (exchange,) = symmetry.exchanges
    wrong = Symmetry(symmetry.shapes, (), exchanges=(Exchange(COUNT, exchange.params),))
    with pytest.raises(AssertionError, match=r"experts\.0"):
        assert_sound(Mixture(), X, wrong)
    with pytest.raises(AssertionError):
        assert_invariant(Mixture(), X, wrong)


def test_json(symmetry: Symmetry) -> None:
    again = Symmetry.from_json(symmetry.to_json())
    assert again.exchanges == symmetry.exchanges
    assert again.sets == symmetry.sets
    assert "4 units: experts.0, experts.1" in str(again)


def _with(**change: Any) -> Symmetry:
    shapes = {"a.w": (2, 3), "b.w": (2, 3), "c.w": (3, 2), "g": (2,)}
    given = {"size": 2, "params": (("a.w",), ("b.w",)), "slots": (), **change}
    return Symmetry(shapes, (), exchanges=(Exchange(**given),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": (("a.w",), ("x.w",))}, r"no parameter x\.w"),
        ({"params": (("a.w",), ("c.w",))}, "different shapes"),
        ({"params": (("a.w",), ("a.w",))}, "two units"),
        ({"params": (("a.w", "b.w"), ("c.w",))}, "equally many"),
        ({"size": 3}, "equally many"),
        ({"slots": (Slot("g", 1, np.arange(2)[:, None]),)}, "1 axes"),
    ],
)
def test_exchanges_by_hand_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SymmetryError, match=message):
        _with(**change)
    assert _with().element([], [[1, 0]]).sources == {"a.w": "b.w", "b.w": "a.w"}
    with pytest.raises(SymmetryError, match="one for each exchange"):
        _with().element([], [[1, 0], [0, 1]])


MATCHERS: list[Matcher] = [
    *(FrankWolfe(), FrankWolfe(dtype="float64"), WeightMatching(), MergeMany(), PairwiseFrankWolfe()),
    *(Synchronised(), ActivationMatching(), ActivationMatching(mix=1.0)),
]


@pytest.mark.parametrize("matcher", MATCHERS, ids=lambda m: repr(m)[:40])
def test_planted_modules_are_found(matcher: Matcher, symmetry: Symmetry, tmp_path: Path) -> None:
    state = Mixture(3).state_dict()
    planted = [symmetry.random_element(seed) for seed in range(3)]
    models = [_loaded(symmetry.apply(state, e)) for e in planted]
    found = match(models, symmetry, matcher, data=X if matcher.needs_data else None)
    for a in range(3):
        for b in range(3):
            assert found.between(a, b) == planted[a].inverse().then(planted[b])
    assert found.cycle_error() == 0
    assert_cycle_consistent(found)
    found.save(tmp_path / "m.safetensors")
    again = Matching.load(tmp_path / "m.safetensors")
    assert all(x == y for x, y in zip(again.to_universe, found.to_universe, strict=True))


def test_linear_maps_stay_within_the_modules_that_weights_paired(symmetry: Symmetry) -> None:
    state = Mixture(3).state_dict()
    models = [_loaded(symmetry.apply(state, symmetry.random_element(seed))) for seed in range(2)]
    found = match(models, symmetry, CCA(), data=X)
    there = found.to_universe[1].then(found.to_universe[0].inverse())
    moved = symmetry.apply(models[1].state_dict(), there)
    torch.testing.assert_close(moved["gate.weight"], models[0].state_dict()["gate.weight"], rtol=1e-2, atol=1e-2)
    assert any("interchangeable" in reason for reason in found.stats["permuted_groups"].values())
    back = symmetry.apply(moved, there.inverse())
    for name, value in models[1].state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=1e-4, atol=1e-4)


def test_a_search_goes_on_from_exchanged_modules(symmetry: Symmetry) -> None:
    models = [Mixture(seed) for seed in range(3)]
    first = match(models, symmetry, FrankWolfe(max_iterations=2))
    again = match(models, symmetry, FrankWolfe(resume=first))
    assert again.stats["objective"] >= first.stats["objective"] * (1 - 1e-6)


def test_independent_networks_match_better_with_exchanges(symmetry: Symmetry) -> None:
    models = [Mixture(seed) for seed in range(3)]
    held = Symmetry(symmetry.shapes, symmetry.sets, symmetry.statistics)
    with_, without = (match(models, s, FrankWolfe(restarts=4)) for s in (symmetry, held))
    assert with_.stats["objective"] > without.stats["objective"]
    assert not any(e.sources for e in without.to_universe)


def test_the_objective_is_that_of_the_moved_parameters(symmetry: Symmetry) -> None:
    states = [Mixture(seed).state_dict() for seed in range(3)]
    blocks = decompose(symmetry)
    rng = np.random.default_rng(0)
    perms = [
        {k: v for root in blocks.structure.roots for k, v in blocks.structure.random(root, rng).items()} for _ in states
    ]
    objective = Objective(blocks, states, dtype=torch.float64)
    sigma = [torch.tensor(np.stack(s)) for s in zip(*(blocks.induced(p) for p in perms), strict=True)]
    moved = [symmetry.apply(s, blocks.structure.element(symmetry, p)) for s, p in zip(states, perms, strict=True)]
    names = symmetry.moved - symmetry.statistics
    pairs = [(0, 1), (0, 2), (1, 2)]
    value = sum(float((moved[a][n].double() * moved[b][n].double()).sum()) for a, b in pairs for n in names)
    assert objective.value(sigma) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("weights", ["normalised", {"experts.1.0.weight": 4.0, "gate.weight": 0.0}])
def test_block_weights_by_the_names_of_modules(symmetry: Symmetry, weights: Any) -> None:
    state = Mixture(3).state_dict()
    planted = [symmetry.random_element(seed) for seed in range(2)]
    models = [symmetry.apply(state, e) for e in planted]
    found = match(models, symmetry, FrankWolfe(block_weights=weights))
    assert np.isfinite(found.stats["objective"])


@pytest.mark.parametrize("offload", [False, True])
def test_merging_copies_gives_the_network_back(symmetry: Symmetry, tmp_path: Path, offload: bool) -> None:
    state = Mixture(3).state_dict()
    copies = [_loaded(symmetry.apply(state, symmetry.random_element(seed))) for seed in range(3)]
    merged = merge(copies, X[:8], coordinates=0, repair="none", offload=tmp_path if offload else None)
    torch.testing.assert_close(_loaded(merged.state_dict)(X), copies[0](X), rtol=1e-4, atol=1e-4)
    for name, value in copies[0].state_dict().items():
        torch.testing.assert_close(merged.state_dict[name], value, rtol=1e-5, atol=1e-6)
    assert "interchangeable modules" in str(merged)


def test_the_repaired_merge_of_copies_is_the_network(symmetry: Symmetry) -> None:
    state = Mixture(3).state_dict()
    copies = [_loaded(symmetry.apply(state, symmetry.random_element(seed))) for seed in range(2)]
    merged = merge(copies, X[:8], data=X, repair=Repair())
    torch.testing.assert_close(_loaded(merged.state_dict)(X), copies[0](X), rtol=1e-3, atol=1e-3)


def test_units_by_hand_beside_modules_by_hand() -> None:
    """Two modules of three units each, by hand: the units inside a module are nested in the exchange."""
    unit = np.arange(3)[:, None]
    shapes = {f"{m}.{n}": s for m in "ab" for n, s in (("up", (3, 2)), ("down", (2, 3)))}
    inner = tuple(Generator(3, (Slot(f"{m}.up", 0, unit), Slot(f"{m}.down", 1, unit))) for m in "ab")
    s = Symmetry(shapes, inner, exchanges=(Exchange(2, (("a.up", "a.down"), ("b.up", "b.down"))),))
    assert [role.size for role in decompose(s).structure.roles] == [2, 3]
    state = {n: torch.randn(shape) for n, shape in shapes.items()}
    element = s.element([[2, 0, 1], [1, 0, 2]], [[1, 0]])
    assert isinstance(element, Element)
    other = s.apply(state, element)
    assert torch.equal(other["a.up"], state["b.up"][[1, 0, 2]])
    assert FrankWolfe().match([state, other], s).between(0, 1) == element


class Layer(nn.Module):
    """A mixture of experts."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(count)
        )

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        g = self.gate(h).softmax(-1)
        return torch.stack([g[:, e, None] * expert(h) for e, expert in enumerate(self.experts)]).sum(0)


class Ensemble(nn.Module):
    """Members with a mixture of experts each: the experts of a member are exchanged among themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            nn.Sequential(nn.Linear(4, WIDTH), Layer(3), nn.Linear(WIDTH, 2)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


class Hierarchy(nn.Module):
    """A mixture of mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out, self.gate = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)
        self.parts = nn.ModuleList(Layer(3) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x)
        return self.out((torch.stack([p(h) for p in self.parts], 1) * self.gate(h).softmax(-1)[..., None]).sum(1))


@pytest.mark.parametrize("matcher", [FrankWolfe(), WeightMatching(), MergeMany()], ids=lambda m: repr(m)[:12])
@pytest.mark.parametrize(
    ("build", "sizes"), [(Ensemble, [3, 3, 3, 3]), (Hierarchy, [2, 3, 3])], ids=["ensemble", "hierarchy"]
)
def test_planted_modules_within_modules_are_found(build: Any, sizes: list[int], matcher: Matcher) -> None:
    torch.manual_seed(0)
    net = build()
    symmetry = infer(net, X[:8])
    assert sorted(e.size for e in symmetry.exchanges) == sizes
    assert not decompose(symmetry).structure.dropped
    planted = [symmetry.random_element(seed) for seed in range(3)]
    found = match([symmetry.apply(net.state_dict(), e) for e in planted], symmetry, matcher)
    assert not any("not searched" in remark for remark in found.remarks())
    for a in range(3):
        for b in range(3):
            assert found.between(a, b) == planted[a].inverse().then(planted[b])
