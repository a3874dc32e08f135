"""Parameters that share memory under several shapes move as one, or a merged model would hold two versions of one tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from automerge import infer
from tests.inference.test_networks import parse

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Transposed(nn.Module):
    """The second layer is the first one transposed: what looks like three hidden widths are two."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.up, self.down, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 2)
        self.down.weight = nn.Parameter(self.up.weight.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.down(self.up(self.inp(x).relu()).relu()).relu())


class Flat(nn.Module):
    """Views of one flat parameter beside that parameter."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        numbers = torch.randn(36)
        if first:
            self.numbers = nn.Parameter(numbers)
        self.a, self.b = nn.Parameter(numbers[:24].view(6, 4)), nn.Parameter(numbers[24:].view(2, 6))
        if not first:
            self.numbers = nn.Parameter(numbers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.a.T).relu() @ self.b.T + self.numbers.pow(2).sum()


class Overlapping(nn.Module):
    """Windows of one table: rows that both have would have to be in two places."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(8, 4)
        self.a, self.b = nn.Parameter(table[:6]), nn.Parameter(table[2:])
        self.one, self.two = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one((x @ self.a.T).relu()) + self.two((x @ self.b.T).relu())


class Apart(nn.Module):
    """Neighbours in one storage that share no entry."""

    def __init__(self) -> None:
        super().__init__()
        numbers = torch.randn(36)
        self.a, self.b = nn.Parameter(numbers[:24].view(6, 4)), nn.Parameter(numbers[24:].view(2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.a.T).relu() @ self.b.T


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (Transposed, "6 5"),
        (lambda: Flat(True), "6"),
        (lambda: Flat(False), "6"),
        (Overlapping, ""),
        (Apart, "6"),
    ],
    ids=["transposed", "flat first", "flat last", "overlapping", "apart"],
)
def test_what_is_one_memory_moves_as_one(make: Any, sizes: str) -> None:
    torch.manual_seed(0)
    model = make()
    symmetry = infer(model, X)
    assert sorted(g.size for g in symmetry.generators()) == parse(sizes), str(symmetry)
    before, state = model(X), model.state_dict()
    for seed in range(3):
        moved = symmetry.apply(state, symmetry.random_element(seed))
        other = make()
        other.load_state_dict(moved)  # one name after the other, into one memory
        assert all(torch.equal(v, moved[n]) for n, v in other.state_dict().items())
        assert torch.allclose(other(X), before, atol=1e-5)
