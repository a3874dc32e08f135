"""What the first pass multiplies with numbers of its own, or drops after it was joined, has no order of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import Symmetry, infer
from automerge.testing import assert_sound

WIDTH, FEATURES = 6, 5
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
FIRST: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "zeros": lambda x, w: torch.zeros(len(x), WIDTH),
    "new_zeros": lambda x, w: x.new_zeros(len(x), WIDTH),
    "new_zeros of a weight": lambda x, w: w.new_zeros(len(x), WIDTH),
    "zeros_like": lambda x, w: torch.zeros_like(w[:1, :1]).expand(len(x), WIDTH),
    "zeros_like of features": lambda x, w: torch.zeros_like(x[:, :1] @ w[:1, :1]).expand(-1, WIDTH).clone(),
    "new_full": lambda x, w: x.new_full((len(x), WIDTH), 0.0),
    "full_like": lambda x, w: torch.full_like(x[:, :1], 0.0).repeat(1, WIDTH),
    "new_empty": lambda x, w: x.new_empty(len(x), WIDTH).zero_(),
    "where it is done": lambda x, w: torch.zeros(len(x), WIDTH) * (1 - (x[:, :1] > 9).float()),
}
EQUAL: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ones": lambda x, w: torch.ones(len(x), WIDTH),
    "new_ones": lambda x, w: x.new_ones(len(x), WIDTH),
    "full": lambda x, w: torch.full((len(x), WIDTH), 0.1),
    "ones_like": lambda x, w: torch.ones_like(x[:, :1]).expand(-1, WIDTH),
}


class Cell(nn.Module):
    def __init__(self, first: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], joined: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.out = nn.Linear(4, FEATURES), nn.Linear(WIDTH, 2)
        self.hidden = nn.Linear(FEATURES + WIDTH, WIDTH) if joined else nn.GRUCell(FEATURES, WIDTH)
        self.first, self.joined = first, joined

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        if self.joined == "pad":
            return self.hidden(F.pad(x, (0, WIDTH))).tanh()
        if self.joined:
            h = torch.stack([*x.unbind(1), *h.unbind(1)], 1) if self.joined == "stack" else torch.cat([x, h], 1)
            return self.hidden(h).tanh()
        return self.hidden(x, h)

    def forward(self, x: torch.Tensor, h: torch.Tensor | None = None) -> torch.Tensor:
        if h is None:
            h = self.first(x, self.out.weight)
        for part in x.unbind(1) if x.dim() == 3 else [x]:
            h = self.step(part, h)
        return self.out(h)


def _columns(symmetry: Symmetry, name: str) -> set[int]:
    """The columns of a matrix that move."""
    slots = [s for g in symmetry.generators() for s in g.slots if s.param == name and s.axis == 1]
    return {int(k) for s in slots for k in s.index.flat}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("first", FIRST)
def test_what_a_first_state_of_zeros_meets_stays(first: str, verify: bool) -> None:
    model = Cell(FIRST[first]).eval()
    found = infer(model, X, verify=verify)
    assert not _columns(found, "hidden.weight_hh")
    assert any("do not read all of hidden.weight_hh" in note for note in found.notes)
    assert_sound(model, X, found)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("joined", ["cat", "stack", "pad"])
@pytest.mark.parametrize("first", [*FIRST, "ones", "new_ones", "full", "ones_like"])
def test_also_where_it_is_joined_to_features(first: str, joined: str, verify: bool) -> None:
    model = Cell((FIRST | EQUAL)[first], joined).eval()
    found = infer(model, X, verify=verify)
    assert _columns(found, "hidden.weight") == set(range(FEATURES))
    assert any("do not read all of hidden.weight" in note for note in found.notes)
    assert_sound(model, X, found)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("joined", ["", "cat"])
@pytest.mark.parametrize("first", ["zeros", "new_zeros", "zeros_like", "new_ones"])
def test_loops_are_read_over_several_steps(first: str, joined: str, steps: int, verify: bool) -> None:
    if not joined and first == "new_ones" and steps == 1:
        pytest.skip("one step of equal numbers without features beside them reads sums of columns")
    model = Cell((FIRST | EQUAL)[first], joined).eval()
    x = torch.randn(3, steps, 4, generator=torch.Generator().manual_seed(1))
    found = infer(model, x, verify=verify)
    assert sorted(g.size for g in found.generators()) == [FEATURES, WIDTH]
    name, beside = ("hidden.weight", FEATURES) if joined else ("hidden.weight_hh", 0)
    assert _columns(found, name) == set(range(beside + WIDTH))
    assert_sound(model, x, found)
    assert_sound(model, torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(2)), found)


def test_units_under_a_mask_of_zeros_are_read() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
            self.register_buffer("mask", torch.tensor([1.0, 0, 1, 1, 0, 1]), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.inp(x) * self.mask)

    assert sorted(g.size for g in infer(Masked(), X).generators()) == [2, 4]


# -------------------------------------------------------------------- results that are joined, and then cut away
CUTS: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    "select": lambda heads: torch.stack(heads)[-1],
    "unbind": lambda heads: torch.stack(heads, 1).unbind(1)[2],
    "index": lambda heads: torch.stack(heads, 1)[:, [2]],
    "index_select": lambda heads: torch.stack(heads).index_select(0, torch.tensor([2])),
    "flip": lambda heads: torch.stack(heads).flip(0)[0],
    "narrow": lambda heads: torch.cat(heads, -1).narrow(-1, 8, 4),
    "split": lambda heads: torch.cat(heads, -1).split(4, -1)[2],
    "chunk": lambda heads: torch.cat(heads, -1).chunk(3, -1)[2],
    "view": lambda heads: torch.cat(heads, -1).view(-1, 3, 4)[:, 2],
    "none joined": lambda heads: heads[2],
}


class Deep(nn.Module):
    """Auxiliary heads, whose results are all returned in training (deep supervision)."""

    def __init__(self, cut: Callable[[list[torch.Tensor]], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(3))
        self.cut = cut

    def all(self, x: torch.Tensor) -> list[torch.Tensor]:
        x, heads = self.inp(x), []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = x + block(x).tanh()
            heads.append(head(x))
        return heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cut(self.all(x))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_heads_that_are_dropped_have_no_order_of_their_own(cut: str, verify: bool) -> None:
    model = Deep(CUTS[cut]).eval()
    found = infer(model, X, verify=verify)
    assert [g.size for g in found.generators()] == [WIDTH]
    assert any("heads.0.weight" in note for note in found.notes)
    assert_sound(model, X, found)
    moved: Any = Deep(CUTS[cut]).eval()
    moved.load_state_dict(found.apply(model.state_dict(), found.random_element(1)))
    torch.testing.assert_close(moved(X), model(X))
    if cut != "none joined":  # what no operator reads stays as it is, and with it the columns of the heads
        torch.testing.assert_close(moved.all(X), model.all(X))
