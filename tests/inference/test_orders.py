"""An order of units that is undone, and ranks: sorting an order moves with the units; what depends on their order pins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from automerge.testing import assert_sound
from tests.inference.networks_hostile import Program
from tests.inference.test_found_networks import found, lin

X, MORE = torch.randn(3, 4), torch.randn(5, 4)
READS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "allocation": lambda h: _unsorted(h, lambda ix: ix.argsort(1)),
    "by sort": lambda h: _unsorted(h, lambda ix: ix.sort(1)[1]),
    "stable": lambda h: _unsorted(h, lambda ix: torch.argsort(ix.clone(), dim=-1, stable=True)),
    "by take_along_dim": lambda h: torch.take_along_dim(_curve(h.sort(1)[0]), h.argsort(1).argsort(1), 1),
    "largest first": lambda h: _unsorted(h, lambda ix: ix.argsort(1), True),
    "all by topk": lambda h: _curve(h.topk(h.shape[1], 1)[0]).gather(1, h.topk(h.shape[1], 1)[1].argsort(1)),
    "rank mask": lambda h: h * (h.argsort(1).argsort(1) < 2),
    "rank weights": lambda h: h * torch.linspace(0, 1, h.shape[1], dtype=h.dtype)[h.argsort(1).argsort(1)],
    "of one row": lambda h: h * (h.mean(0).argsort().argsort() >= 3),
    "first dimension": lambda h: (h.t() * (h.t().argsort(0).argsort(0) > 1)).t(),
    "sorted numbers": lambda h: h.gather(1, h.argsort(1)).cumsum(1) @ _column(h) + 0 * h,
}


def _column(h: torch.Tensor) -> torch.Tensor:
    return torch.linspace(1, 2, h.shape[1], dtype=h.dtype)[:, None].expand(-1, h.shape[1])


def _curve(v: torch.Tensor) -> torch.Tensor:
    return (1 - v.sigmoid()) * v.sigmoid().cumsum(1)


def _unsorted(h: torch.Tensor, back: Callable[[torch.Tensor], torch.Tensor], down: bool = False) -> torch.Tensor:
    v, ix = h.sort(1, descending=down)
    return _curve(v).gather(1, back(ix))


@pytest.mark.parametrize("name", READS)
def test_ranks_move_with_the_units(name: str) -> None:
    net = {"inp": lin(4, 6), "out": lin(6, 2)}
    found(lambda: Program(lambda s, x: s.out(READS[name](s.inp(x))), net), "6", X, MORE)


@pytest.mark.parametrize(
    "read",
    [
        lambda h: h * h.argsort(1).argsort(1).argsort(1),  # the order again: positions as numbers
        lambda h: h * h.argsort(1).flip(1).argsort(1),
        lambda h: h * h.argsort(1).argsort(0),
        lambda h: h * h.argsort(1)[:, :6].roll(1, 1).argsort(1),
        lambda h: h * h.topk(3, 1)[1].argsort(1).repeat(1, 2),
        lambda h: h * h.argsort(1).argsort(1, descending=True),
        lambda h: h * (h.argsort(1) * 2).argsort(1),
        lambda h: h * h.argsort(1).sort(1)[0],
        lambda h: h * h.argsort(1).gather(1, h.argsort(1)).argsort(1),
    ],
)
def test_orders_that_are_something_else(read: Callable[[torch.Tensor], torch.Tensor]) -> None:
    net = Program(lambda s, x: s.out(read(s.inp(x))), {"inp": lin(4, 6), "out": lin(6, 2)})
    assert_sound(net.double().eval(), (X.double(),))


def test_heads_and_dimensions_within() -> None:
    """Dimensions within each head are ranked for themselves."""

    def forward(s: Program, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x).view(-1, 2, 3)
        return s.out((h * (h.argsort(-1).argsort(-1) < 2)).flatten(1))

    found(lambda: Program(forward, {"inp": lin(4, 6), "out": lin(6, 2)}), "2 3 3", X, MORE)
