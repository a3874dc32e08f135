"""Positions that short example inputs do not reach are no freedom: a merge must be right on longer inputs, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from automerge import infer


class Table(nn.Module):
    """Tokens, a table of positions and a mask, both longer than the inputs; ``read`` says how the table is read."""

    def __init__(self, read: Callable[[Any, int], torch.Tensor]) -> None:
        super().__init__()
        self.read = read
        self.tokens = nn.Embedding(7, 6)
        self.places = nn.Parameter(torch.randn(9, 6))
        self.shift, self.first = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1, 6))
        self.register_buffer("mask", torch.tril(torch.ones(9, 9)))
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        x = self.tokens(x) + self.read(self, n)
        x = (x @ x.mT).masked_fill(self.mask[:n, :n] == 0, -torch.inf).softmax(-1) @ x
        return self.head(self.inner(x).relu())


READS: dict[str, Callable[[Any, int], torch.Tensor]] = {
    "slice": lambda m, n: m.places[:n],
    "embedding": lambda m, n: nn.functional.embedding(torch.arange(n), m.places),
    "index": lambda m, n: m.places[torch.arange(n)[None]],
    "index_select": lambda m, n: m.places.index_select(0, torch.arange(n)),
    "narrow": lambda m, n: m.places.narrow(0, 0, n),
    "split": lambda m, n: m.places.split([n, 9 - n])[0],
    "unbind": lambda m, n: torch.stack(m.places.unbind(0)[:n]),
    "transposed": lambda m, n: m.places.t()[:, :n].t(),
    "unsqueezed": lambda m, n: m.places[None].expand(2, -1, -1)[:, :n],
    "cast": lambda m, n: m.places.to(torch.float64).to(torch.float32)[:n],
    "one by one": lambda m, n: torch.stack([m.places[k] for k in range(n)]),
    "scaled": lambda m, n: (m.places * 0.5)[:n],
    "summed": lambda m, n: (m.places + m.shift.tanh())[:n],
    "joined": lambda m, n: torch.cat([m.first, m.places])[:n],
    "repeated": lambda m, n: m.places.repeat(2, 1, 1)[:, :n],
    "gather": lambda m, n: m.places.gather(0, torch.arange(n)[:, None].expand(-1, 6)),
    "take": lambda m, n: torch.take(m.places, torch.arange(n)[:, None] * 6 + torch.arange(6)),
    "one hot": lambda m, n: nn.functional.one_hot(torch.arange(n), 9).to(m.places.dtype) @ m.places,
    "mask": lambda m, n: m.places[torch.arange(9) < n],
    "strided": lambda m, n: torch.as_strided(m.places, (n, 6), (6, 1)),
    "narrow copy": lambda m, n: torch.narrow_copy(m.places, 0, 0, n),
    "negative padding": lambda m, n: nn.functional.pad(m.places, (0, 0, 0, n - 9)),
    "windows": lambda m, n: m.places.unfold(0, n, 1)[0].T,
    "twice": lambda m, n: m.places[:n] + m.places[1 : n + 1],
}


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("how", READS)
def test_a_merge_of_short_inputs_holds_for_long_ones(how: str, length: int) -> None:
    """The groups found on short inputs leave the output on the longest ones alone."""
    torch.manual_seed(0)
    model = Table(READS[how]).eval()
    symmetry = infer(model, torch.randint(7, (2, length)))
    assert sorted(g.size for g in symmetry.generators()) == [5, 6]
    moving = {s.param for g in symmetry.generators() for s in g.slots if g.size == 6}
    assert {"tokens.weight", "inner.weight", "places"} <= moving
    assert any("do not read all of" in note and "places" in note for note in symmetry.notes)
    longest = torch.randint(7, (2, 8))
    before = model(longest)
    for seed in range(3):
        model.load_state_dict(symmetry.apply(model.state_dict(), symmetry.random_element(seed)))
        assert torch.allclose(model(longest), before, atol=1e-5)


class Flat(nn.Module):
    """A table of positions in one row: position after position, or channel after channel."""

    def __init__(self, channels_first: bool) -> None:
        super().__init__()
        self.steps = (1, 9) if channels_first else (6, 1)
        self.tokens, self.head = nn.Embedding(7, 6), nn.Linear(6, 3)
        self.inner = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))
        self.places = nn.Parameter(torch.randn(54))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        position, channel = torch.arange(x.shape[1])[:, None], torch.arange(6)
        places = torch.take(self.places, position * self.steps[0] + channel * self.steps[1])
        return self.head(self.inner(self.tokens(x) + places))


@pytest.mark.parametrize("channels_first", [False, True])
def test_a_flattened_table_read_in_part_stays(channels_first: bool) -> None:
    """Units own positions that only longer inputs read; where these are cannot be known."""
    torch.manual_seed(0)
    model = Flat(channels_first).eval()
    assert [g.size for g in infer(model, torch.randint(7, (2, 4))).generators()] == [5, 6]
    assert [g.size for g in infer(model, torch.randint(7, (2, 9))).generators()] == [5, 6, 6]


def test_pieces_that_are_read_keep_orders_of_their_own() -> None:
    """Two pieces of one parameter with different readers, and a third that nobody reads: it goes with the second."""

    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 4))
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
            self.c, self.d = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left = torch.relu(self.a(x) + self.table[:2].sum(0))
            return self.c(left) + self.d(torch.relu(self.b(x) * self.table[2:5].sum(0)))

    symmetry = infer(Pieces(), torch.randn(2, 3))
    windows = {(s.axis, s.within) for g in symmetry.generators() for s in g.slots if s.param == "table"}
    assert windows == {(0, ()), (1, ((0, 0, 2),)), (1, ((0, 2, 7),))}
    moved = {
        int(k)
        for g in symmetry.generators()
        for s in g.slots
        if (s.param, s.axis) == ("table", 0)
        for k in np.ravel(s.index)
    }
    assert moved == {0, 1, 2, 3, 4}
    assert any(p.reason == "not read with these inputs" for p in symmetry.pins)


def test_a_parameter_read_whole_somewhere_is_read() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 4))
            self.out = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x[:, :1] * self.table[:2].sum(0) + (self.table.relu().sum() + x).sum(1, keepdim=True))

    symmetry = infer(Both(), torch.randn(2, 3))
    assert sorted(g.size for g in symmetry.generators()) == [2, 4, 4, 4]  # rows, rows, and each one's other axis
    assert not any("do not read" in note for note in symmetry.notes)


def test_experts_that_no_token_reached_are_named() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.out = nn.Linear(3, 5), nn.Linear(5, 2)
            self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.inp(x)
            return self.out(self.experts[int(x.sum() > 1e9)](x))

    symmetry = infer(Routed(), torch.randn(2, 3))
    assert any("does not depend on experts.1.weight" in note and "2.weight" in note for note in symmetry.notes), (
        symmetry.notes
    )
