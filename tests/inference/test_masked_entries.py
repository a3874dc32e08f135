"""Entries that a mask among units chooses: read, changed one by one, written back, and summed up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge.testing import assert_sound
from automerge.trace import trace
from tests.inference.networks_hostile import Program
from tests.inference.test_found_networks import found, lin

X, MORE = torch.randn(3, 4), torch.randn(5, 4)
Change = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _in_place(s: Any, h: torch.Tensor, m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    h[m] *= 0.5
    return h


def _again(s: Any, h: torch.Tensor, m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    h[h.abs() < 0.3] = h[h.abs() < 0.3].tanh() + 1
    return h


def _other(s: Any, h: torch.Tensor, m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    h[m] = g[m] * h[m]
    return h


def _piecewise(s: Any, h: torch.Tensor, m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(h)
    out[m] = s.slope * torch.expm1(h[m])
    out[~m] = F.softplus(h[~m] - s.slope)
    return out


def _scattered(s: Any, h: torch.Tensor, m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return h.masked_scatter(m, torch.masked_select(g, m).clone())


def _added(s: Any, h: torch.Tensor, m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return h.index_put((m,), g[m].clamp(min=0), accumulate=True)


def _units(s: Any, h: torch.Tensor, m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    strong = g.mean(0) > 0
    h[:, strong] = h[:, strong] * g[:, strong] + g[:, strong].exp()
    return h


def _converted(s: Any, h: torch.Tensor, m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    h[m] = h[m].float().detach().to(h.dtype).clone()
    return h + g


@pytest.mark.parametrize("how", [_in_place, _again, _other, _piecewise, _scattered, _added, _units, _converted])
def test_entries_changed_one_by_one(how: Change) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h, g = s.inp(x).clone(), s.inp(x) * 0.5 + 0.2
        return s.out(how(s, h, h < 0, g))

    parts = {"inp": lin(4, 6), "out": lin(6, 2), "slope": lambda: nn.Parameter(torch.rand(1) + 0.5)}
    found(lambda: Program(forward, parts), "6", X, MORE)


@pytest.mark.parametrize(
    "read",
    [
        lambda h, m: h[m].sum(),
        lambda h, m: h[m].mean(),
        lambda h, m: (h[m] ** 2).sum(0).sqrt(),
        lambda h, m: h[m].max() + torch.amax(h[m], 0) - h[m].min(),
        lambda h, m: torch.masked_select(h, m).sigmoid().prod(),
        lambda h, m: h[m].norm() + h[:, m[0]].mean() + h[:, m.any(0)].sum(),
    ],
)
def test_entries_summed_up(read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x)
        return s.out(h) + read(h, h > -0.2)

    found(lambda: Program(forward, {"inp": lin(4, 6), "out": lin(6, 2)}), "6", X, MORE)


@pytest.mark.parametrize(
    "read",
    [
        lambda h, m: h[m].sort()[0],
        lambda h, m: h[m].flip(0),
        lambda h, m: h[m].cumsum(0),
        lambda h, m: h[m] * torch.arange(int(m.sum()), dtype=h.dtype),
        lambda h, m: h[m.roll(1, 1)],
        lambda h, m: h[m] + h[m][:1],
        lambda h, m: h[m][: int(m.sum())] * h.flatten()[: int(m.sum())],
        lambda h, m: h[m] / h[m].softmax(0),
    ],
)
def test_entries_in_their_order(read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x).clone()
        m = h < h.median()
        h[m] = read(h, m)
        return s.out(h)

    net = Program(forward, {"inp": lin(4, 6), "out": lin(6, 2)}).double().eval()
    assert_sound(net, (X.double(),))


def test_a_list_of_one_entry_meets_a_parameter() -> None:
    """A parameter of one entry is the same for all; a number that was made from the list is not."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x).clone()
        m = h == h.max()
        h[m] = h[m] + s.slope
        return s.out(h)

    parts = {"inp": lin(4, 6), "out": lin(6, 2), "slope": lambda: nn.Parameter(torch.rand(1))}
    assert_sound(Program(forward, parts).double().eval(), (X.double(),))


def test_known_positions_stay_a_choice() -> None:
    """A mask that is the same for all data chooses certain units."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x).clone()
        m = torch.tensor([True, True, False, True, False, False])
        h[:, m] = h[:, m] * 2
        return s.out(h)

    found(lambda: Program(forward, {"inp": lin(4, 6), "out": lin(6, 2)}), "3 3", X, MORE)


def test_nothing_is_listed() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x).clone()
        h[h < 0] *= 0.5
        return s.out(h) + h[h > 1].sum()

    graph = trace(Program(forward, {"inp": lin(4, 6), "out": lin(6, 2)}).eval(), (X,))
    names = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
    assert "aten.where.self" in names
    assert "aten.index_put.default" not in names
