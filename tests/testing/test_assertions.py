"""The assertions pass on what is true and fail, with a message, on what is not."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from automerge import AutomergeError, Element, Generator, Matching, Slot, Symmetry, infer
from automerge.testing import (
    Checkpoints,
    assert_cycle_consistent,
    assert_invariant,
    assert_same_symmetry,
    assert_sound,
    checkpoints,
    elements,
)

NET = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
ARGS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
TRUTH = infer(NET, ARGS)


def unit(n: int) -> np.ndarray:
    return np.arange(n)[:, None]


def without(param: str) -> Symmetry:
    """The truth with one slot forgotten: wrong."""
    (g,) = TRUTH.generators()
    return Symmetry(TRUTH.shapes, (Generator(g.size, tuple(s for s in g.slots if s.param != param)),), TRUTH.statistics)


def test_true_symmetries_pass() -> None:
    assert_invariant(NET, ARGS, TRUTH)
    assert assert_sound(NET, ARGS, TRUTH) is TRUTH
    assert_same_symmetry(assert_sound(NET, ARGS), TRUTH)
    assert_invariant(NET, ARGS, Symmetry(TRUTH.shapes, ()))


@pytest.mark.parametrize("param", ["0.weight", "0.bias", "3.weight"])
def test_a_forgotten_parameter_fails(param: str) -> None:
    with pytest.raises(
        AssertionError, match=r"exchanging the units of generator 0 \(4 units: .*no symmetry of Sequential"
    ):
        assert_invariant(NET, ARGS, without(param))
    with pytest.raises(AssertionError, match="changes the output by"):
        assert_sound(NET, ARGS, without(param))


def test_a_fresh_initialisation_hides_mistakes_from_one_and_not_from_the_other() -> None:
    wrong = without("1.running_mean")
    assert_invariant(NET, ARGS, wrong)  # all zeros: a permutation changes nothing
    with pytest.raises(AssertionError, match="changes the output by"):
        assert_sound(NET, ARGS, wrong)


def test_pairs_of_wrong_generators_do_not_hide() -> None:
    """Each generator is wrong alone, though one of them is tiny."""
    pair = Generator(2, (Slot("3.bias", 0, unit(2)),))
    with pytest.raises(AssertionError, match=r"generator 1 \(2 units: 3.bias\[0\]\)"):
        assert_sound(NET, ARGS, Symmetry(TRUTH.shapes, (*TRUTH.sets, pair), TRUTH.statistics))


def test_two_units_do_not_hide_by_staying() -> None:
    net = nn.Linear(3, 2)
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters()}
    wrong = Symmetry(shapes, (Generator(2, (Slot("weight", 0, np.arange(2)[:, None]),)),))
    for seed in range(20):
        with pytest.raises(AssertionError, match="generator 0"):
            assert_invariant(net, torch.randn(4, 3), wrong, elements=1, seed=seed)


def test_a_foreign_symmetry_fails() -> None:
    with pytest.raises(AssertionError, match="no parameter 'elsewhere'"):
        assert_invariant(NET, ARGS, Symmetry({"elsewhere": (2,)}, (Generator(2, (Slot("elsewhere", 0, unit(2)),)),)))


def test_a_symmetry_of_another_width_fails() -> None:
    other = infer(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), ARGS)
    for check in (assert_invariant, assert_sound):
        with pytest.raises(AssertionError, match=r"0.bias has the shape \(4,\), and \(6,\) in the symmetry"):
            check(NET, ARGS, other)


class Odd(nn.Module):
    """A hidden layer, and an output that a function makes of it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.down(torch.relu(self.up(x))))


WRONG = Symmetry({"up.weight": (4, 3)}, (Generator(4, (Slot("up.weight", 0, np.arange(4)[:, None]),)),))


@pytest.mark.parametrize("check", [assert_invariant, assert_sound])
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x * torch.nan, "no finite number"),
        (lambda x: None, "no finite number"),
        (lambda x: x.shape[0], "no finite number"),
    ],
    ids=["nan", "none", "number"],
)
def test_outputs_that_agree_with_any_claim_fail(check: Any, function: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check(Odd(function), ARGS, WRONG)


@pytest.mark.parametrize("check", [assert_invariant, assert_sound])
def test_random_draws_hide_no_mistake(check: Any) -> None:
    """Without one seed for all runs every difference was within the model's own noise."""

    class Noisy(Odd):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)) + torch.randn(1, 1, dtype=x.dtype))

    net = Noisy(None)
    with pytest.raises(AssertionError, match="no symmetry of Noisy"):
        check(net, ARGS, WRONG)
    truth = infer(net, ARGS)
    state = torch.get_rng_state()
    check(net, ARGS, truth)
    assert torch.equal(torch.get_rng_state(), state)


def test_dead_units_hide_no_mistake() -> None:
    """With the model's signs every unit is dead, and any claim would pass."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.abs_().neg_()
        net[0].bias.fill_(-1.0)
    wrong = Symmetry({"0.weight": (4, 3), "0.bias": (4,)}, (Generator(4, (Slot("0.weight", 0, unit(4)),)),))
    with pytest.raises(AssertionError, match="no symmetry of Sequential"):
        assert_sound(net, ARGS.abs(), wrong)


def test_assertions_that_could_not_fail_are_refused() -> None:
    for check in (assert_invariant, assert_sound):
        for options in ({"elements": 0}, {"elements": -1}, {"tolerance": 2.0}, {"tolerance": float("nan")}):
            with pytest.raises(AutomergeError, match=f"{next(iter(options))}="):
                check(NET, ARGS, without("0.bias"), **options)
        with pytest.raises(AutomergeError, match="expected a Symmetry, as infer gives it, got a list"):
            check(NET, ARGS, TRUTH.generators())
    with pytest.raises(AutomergeError, match="got a NoneType"):
        assert_same_symmetry(TRUTH, None)  # type: ignore[arg-type]
    with pytest.raises(AutomergeError, match="expected a Matching, as match gives it, got a int"):
        assert_cycle_consistent(5)
    with pytest.raises(AssertionError, match="no cycle"):
        assert_cycle_consistent(Matching((TRUTH.identity(),), TRUTH))


def test_generators_that_are_there_twice_and_other_shapes_are_told() -> None:
    with pytest.raises(AssertionError, match=r"found, not expected: 1 \(4 units"):
        assert_same_symmetry(Symmetry(TRUTH.shapes, TRUTH.sets * 2), TRUTH)
    pair = (Generator(2, (Slot("w", 0, unit(2)),)),)
    with pytest.raises(AssertionError, match=r"w has the shape \(2, 4\), expected \(3, 4\)"):
        assert_same_symmetry(Symmetry({"w": (2, 4)}, pair), Symmetry({"w": (3, 4)}, pair))


def test_models_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = {n: v.clone() for n, v in net.state_dict().items()}
    assert_sound(net, ARGS)
    assert net.training
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


def test_missing_and_wrong_generators_are_listed() -> None:
    with pytest.raises(AssertionError, match=r"expected, not found: 0 \(4 units: 0.weight\[0\]"):
        assert_same_symmetry(Symmetry(TRUTH.shapes, ()), TRUTH)
    with pytest.raises(AssertionError, match="found, not expected"):
        assert_same_symmetry(without("0.bias"), TRUTH)


def test_the_choice_of_corresponding_positions_does_not_count() -> None:
    shapes = {"w": (4,)}
    inner = tuple(Generator(2, (Slot("w", 0, np.array([[i], [i + 1]])),)) for i in (0, 2))
    straight = Generator(2, (Slot("w", 0, np.array([[0, 1], [2, 3]])),))
    crossed = Generator(2, (Slot("w", 0, np.array([[0, 1], [3, 2]])),))
    assert_same_symmetry(Symmetry(shapes, (*inner, straight)), Symmetry(shapes, (crossed, *inner[::-1])))


# -------------------------------------------------------------------- matchings
class Pairwise:
    """Independent maps between pairs, as pairwise matchers make them."""

    def __init__(self, maps: dict[tuple[int, int], Element]) -> None:
        self.maps = maps

    def __len__(self) -> int:
        return 3

    def between(self, a: int, b: int) -> Element:
        return self.maps[a, b]


@settings(max_examples=20)
@given(st.tuples(*(elements(TRUTH),) * 3))
def test_maps_through_a_universe_are_consistent(maps: tuple[Element, ...]) -> None:
    assert_cycle_consistent(Matching(maps, TRUTH))


def test_inconsistent_maps_fail() -> None:
    turn = TRUTH.element([[1, 2, 3, 0]])
    stay = TRUTH.identity()
    maps = {(a, b): stay for a in range(3) for b in range(3)}
    assert_cycle_consistent(Pairwise(maps))
    with pytest.raises(AssertionError, match="around the cycle 0 -> 1 -> 0 displace"):
        assert_cycle_consistent(Pairwise(maps | {(0, 1): turn}))
    with pytest.raises(AssertionError, match=r"around the cycle 0 -> 1 -> 2 -> 0 displace \d+ positions"):
        assert_cycle_consistent(Pairwise(maps | {(0, 1): turn, (1, 0): turn.inverse()}))
    with pytest.raises(AssertionError, match="cycle 1 -> 1 displace"):
        assert_cycle_consistent(Pairwise(maps | {(1, 1): turn}))


# -------------------------------------------------------------------- strategies
@settings(max_examples=20)
@given(checkpoints(NET, 3, symmetry=TRUTH))
def test_checkpoints_compute_the_same_function(family: Checkpoints) -> None:
    assert len(family) == 3
    outputs = []
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    for state in family.state_dicts:
        net.load_state_dict(state)
        outputs.append(net(ARGS.double()))
    assert all(torch.allclose(o, outputs[0], rtol=1e-10, atol=1e-10) for o in outputs)
    back = [family.symmetry.apply(s, e.inverse()) for s, e in zip(family.state_dicts, family.elements, strict=True)]
    assert all(torch.equal(b[n], back[0][n]) for b in back for n in b)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give symmetry="),
        ({"args": ARGS, "n": 0}, "n of at least 1"),
        ({"args": ARGS, "noise": -1.0}, "noise of at least 0"),
        ({"args": ARGS, "noise": float("nan")}, "finite noise"),
        ({"args": ARGS, "dtype": torch.int32}, "float dtype"),
    ],
)
def test_unsuitable_families_are_refused_where_they_are_asked_for(options: Any, words: str) -> None:
    with pytest.raises(AutomergeError, match=words):
        checkpoints(NET, **options)


def test_strategies_of_something_else_are_refused_where_they_are_asked_for() -> None:
    with pytest.raises(AutomergeError, match="expected a Symmetry, as infer gives it, got a NoneType"):
        elements(None)  # type: ignore[arg-type]
    with pytest.raises(AutomergeError, match="of a module or a Network, got a int"):
        checkpoints(5, symmetry=TRUTH)  # type: ignore[arg-type]


@settings(max_examples=3)
@given(checkpoints(NET, 2, args=ARGS))
def test_a_family_prints_in_one_line(family: Checkpoints) -> None:
    assert repr(family).startswith(f"Checkpoints(n=2, seed={family.seed}, noise=0, elements=(")
    assert "tensor" not in repr(family)


@settings(max_examples=5)
@given(checkpoints(NET, 2, args=ARGS, noise=0.1))
def test_noise_is_relative(family: Checkpoints) -> None:
    back = [family.symmetry.apply(s, e.inverse()) for s, e in zip(family.state_dicts, family.elements, strict=True)]
    gap = (back[0]["0.weight"] - back[1]["0.weight"]).std() / back[0]["0.weight"].std()
    assert 0.01 < float(gap) < 1


@pytest.mark.parametrize("name", ["_assertions", "_strategies", "_networks", "_ledger", "__init__"])
def test_the_examples_run(name: str) -> None:
    module = importlib.import_module("automerge.testing" if name == "__init__" else f"automerge.testing.{name}")
    assert doctest.testmod(module).failed == 0
