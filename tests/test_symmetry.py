"""Symmetries: generators and their slots, JSON, and every message of a `SymmetryError`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge import Generator, Pin, Slot, Symmetry, SymmetryError
from automerge.symmetry import slots_by_parameter
from automerge.testing._witness import permuted
from tests._symmetries import ALL, units, weights

NAMES = sorted(ALL)
PAIR = Generator(2, (Slot("w", 0, units(2)),))


@settings(max_examples=60)
@given(st.sampled_from(NAMES), st.integers(0, 99))
def test_an_element_acts_as_its_slots_say(name: str, seed: int) -> None:
    """``new[index[u]] = old[index[p[u]]]``, one generator after the other."""
    symmetry = ALL[name]()
    rng = np.random.default_rng(seed)
    perms = [rng.permutation(g.size) for g in symmetry.generators()]
    state = weights(symmetry, seed)
    moved = symmetry.apply(state, symmetry.element(perms))
    for g, perm in zip(symmetry.generators(), perms, strict=True):
        state = permuted(state, g, perm)
    assert all(torch.equal(v, moved[n]) for n, v in state.items())


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name: str) -> None:
    symmetry = ALL[name]()
    again = Symmetry.from_json(symmetry.to_json())
    assert again.generators() == symmetry.generators()
    assert dict(again.shapes) == dict(symmetry.shapes)
    assert again.to_json() == symmetry.to_json()
    assert again.random_element(5) == symmetry.random_element(5)


def test_json_keeps_everything_else() -> None:
    symmetry = Symmetry(
        {"w": (2,), "mean": (2,)}, (PAIR,), frozenset({"mean"}), {"v": "w"}, (Pin("mean", 0, 2, "why", "where"),),
        ("aten::odd",), ("a note",), {"seconds": 1.5},
    )  # fmt: skip
    again = Symmetry.from_json(symmetry.to_json())
    for field in ("shapes", "sets", "statistics", "aliases", "pins", "unruled", "notes", "stats"):
        assert getattr(again, field) == getattr(symmetry, field)


def test_random_elements_follow_the_seed() -> None:
    symmetry = ALL["mlp"]()
    assert symmetry.random_element(3) == symmetry.random_element(3)
    assert symmetry.random_element(3) != symmetry.random_element(4)
    rng = np.random.default_rng(3)
    assert symmetry.random_element(rng) == symmetry.random_element(3)
    assert symmetry.random_element(rng) != symmetry.random_element(3)


def test_tied_names_move_together_and_others_pass() -> None:
    symmetry = Symmetry({"w": (2,)}, (PAIR,), aliases={"v": "w"})
    state = {"w": torch.tensor([1.0, 2.0]), "v": torch.tensor([1.0, 2.0]), "count": torch.tensor(3)}
    moved = symmetry.apply(state, symmetry.element([[1, 0]]))
    assert moved["v"].tolist() == moved["w"].tolist() == [2.0, 1.0]
    assert moved["count"] is state["count"]


def test_the_free_share_counts_positions() -> None:
    assert Symmetry({"w": (4, 1)}, (PAIR,)).free_share == 0.5
    assert Symmetry({"w": (4, 2)}, ()).free_share == 0.0
    assert Symmetry({}, ()).free_share == 0.0


def test_slots_by_parameter() -> None:
    table = slots_by_parameter(ALL["mlp"]().generators())
    assert [number for number, _ in table["1.weight"]] == [0, 1]
    assert [slot.axis for _, slot in table["1.weight"]] == [1, 0]


def test_slots_compare_by_value() -> None:
    assert Slot("w", 0, units(2)) == Slot("w", 0, units(2))
    assert Slot("w", 0, units(2)) != Slot("w", 1, units(2))
    assert Slot("w", 0, units(2)) != Slot("w", 0, units(2)[::-1])
    assert len({Slot("w", 0, units(2)), Slot("w", 0, units(2))}) == 1
    assert Slot("w", 0, units(2)) != 3


# -------------------------------------------------------------------- errors
def with_slot(*slot: object, size: int = 2) -> Symmetry:
    return Symmetry({"w": (2, 3)}, (Generator(size, (Slot(*slot),), "mine"),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        (("v", 0, units(2)), r"generator mine of size 2, slot v axis 0: no such parameter"),
        (("w", 2, units(2)), r"slot w axis 2: the parameter has 2 axes"),
        (("w", -1, units(2)), r"the parameter has 2 axes"),
        (("w", 0, units(3)), r"the index must be an integer table of shape \(2, k\), got \(3, 1\)"),
        (("w", 0, units(2)[:, 0]), r"integer table of shape \(2, k\), got \(2,\)"),
        (("w", 0, units(2) * 1.0), r"integer table"),
        (("w", 0, units(2) + 1), r"the index leaves the axis \(length 2\) or names a position twice"),
        (("w", 0, units(2) * 0), r"names a position twice"),
        (("w", 1, units(2) - 1), r"leaves the axis"),
        (("w", 0, units(2), ((0, 0, 1),)), r"within \(0, 0, 1\) is not a slice of another axis"),
        (("w", 0, units(2), ((1, 2, 4),)), r"within \(1, 2, 4\) is not a slice"),
        (("w", 0, units(2), ((1, 2, 2),)), r"within \(1, 2, 2\) is not a slice"),
        (("w", 0, units(2), ((5, 0, 1),)), r"within \(5, 0, 1\) is not a slice"),
    ],
)
def test_inconsistent_slots(slot: tuple[object, ...], message: str) -> None:
    with pytest.raises(SymmetryError, match=message):
        with_slot(*slot)


def test_wrong_permutations() -> None:
    symmetry = ALL["mlp"]()
    with pytest.raises(SymmetryError, match="expected 2 permutations, one for each generator, got 1"):
        symmetry.element([range(7)])
    with pytest.raises(SymmetryError, match=r"permutation 1 is not a permutation of range\(6\)"):
        symmetry.element([range(7), [0, 0, 1, 2, 3, 4]])
    with pytest.raises(SymmetryError, match="permutation 0 is not a permutation"):
        symmetry.element([range(6), range(6)])


def test_a_foreign_state_dict() -> None:
    symmetry = Symmetry({"w": (2,)}, (PAIR,))
    with pytest.raises(
        SymmetryError, match=r"w has the shape \(3,\), but the symmetry was inferred for \(2,\); infer again"
    ):
        symmetry.apply({"w": torch.zeros(3)}, symmetry.identity())
    with pytest.raises(SymmetryError, match="the state dict has no 'w', which the element moves"):
        symmetry.apply({}, symmetry.element([[1, 0]]))
    assert symmetry.apply({}, symmetry.identity()) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a symmetry file"),
        ("[]", "not a symmetry file"),
        ("{}", r"expected the format 'automerge.symmetry/1', got None"),
        ('{"format": "automerge.symmetry/9"}', "got 'automerge.symmetry/9'"),
        ('{"format": "automerge.symmetry/1"}', "KeyError"),
        ('{"format": "automerge.symmetry/1", "shapes": 3, "generators": []}', "not a symmetry file"),
        ('{"format": "automerge.symmetry/1", "shapes": {}, "generators": [{"size": 2, "slots": [{}]}]}', "KeyError"),
    ],
)
def test_damaged_json(text: str, message: str) -> None:
    with pytest.raises(SymmetryError, match=message):
        Symmetry.from_json(text)


def test_json_with_an_index_out_of_range() -> None:
    data = json.loads(Symmetry({"w": (2,)}, (PAIR,)).to_json())
    data["generators"][0]["slots"][0]["index"] = [[0], [7]]
    with pytest.raises(SymmetryError, match="leaves the axis"):
        Symmetry.from_json(json.dumps(data))
