"""Symmetric functions taken axis after axis: the groups are those of all these axes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from automerge.rules._nodes import liveness
from automerge.testing import assert_sound
from automerge.trace import trace
from tests.inference.networks_hostile import Program
from tests.inference.test_found_networks import found, lin

X, NORM = torch.randn(2, 5), torch.linalg.vector_norm
AFTER_ANOTHER: dict[str, Callable[[torch.Tensor], Any]] = {
    "sum": lambda h: h.sum(1).sum(1),
    "mean": lambda h: h.mean(2).mean(1, keepdim=True),
    "amax": lambda h: h.amax(1).amax(-1),
    "max": lambda h: h.max(1).values.max(1)[0],
    "min, all of it": lambda h: torch.min(h.min(2).values.min(1).values),
    "any": lambda h: (h > 0).any(1).any(1).float(),
    "all": lambda h: (h < 3).all(1, keepdim=True).all(2).float(),
    "logsumexp": lambda h: h.logsumexp((1,), keepdim=True).logsumexp(2, keepdim=True),
    "norm": lambda h: h.norm(dim=2).norm(dim=1),
    "three": lambda h: h.view(-1, 2, 2, 2).sum(1).sum(1).sum(1),
}
KEPT: dict[str, Callable[[torch.Tensor], Any]] = {
    "another norm": lambda h: h.norm(1, 1).norm(2, 1),
    "another function": lambda h: h.amax(1).sum(1),
    "the first is used too": lambda h: torch.cat([(m := h.mean(1)).mean(1), m.amax(1)]),
}


def _net(read: Callable[[torch.Tensor], Any]) -> nn.Module:
    return Program(lambda s, x: read(s.a(x).view(-1, 4, 2)), {"a": lin(5, 8)})


@pytest.mark.parametrize("name", AFTER_ANOTHER)
def test_all_units(name: str) -> None:
    found(lambda: _net(AFTER_ANOTHER[name]), "8", X)


@pytest.mark.parametrize("name", KEPT)
def test_only_the_same(name: str) -> None:
    """Other functions one after the other tell their axes apart, as does what reads the first."""
    symmetry = assert_sound(_net(KEPT[name]), (X,))
    assert 8 not in {g.size for g in symmetry.generators()}


def test_places() -> None:
    """The place of the largest of the largest tells its axis apart."""
    net = _net(lambda h: (h.max(1).values.max(1).indices).float() + h.sum())
    symmetry = assert_sound(net, (X,))
    assert 8 not in {g.size for g in symmetry.generators()}


def test_of_correlations() -> None:
    """Autocorrelations averaged over heads, then over their dimensions."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        q, k = (m(x).view(*x.shape[:2], 2, 3).permute(0, 2, 3, 1) for m in (s.q, s.k))
        corr = torch.fft.irfft(torch.fft.rfft(q) * torch.conj(torch.fft.rfft(k)), n=x.shape[1])
        return torch.mean(torch.mean(corr, dim=1), dim=1)

    found(lambda: Program(forward, {"q": lin(3, 6), "k": lin(3, 6)}), "6", torch.randn(2, 8, 3))


@given(st.data())
def test_same_numbers(data: st.DataObject) -> None:
    """A recorded chain gives what it gave, over whatever axes, which may be kept or not."""
    name = data.draw(st.sampled_from(["sum", "mean", "amax", "amin", "logsumexp", "nansum", "norm"]))
    steps: list[tuple[list[int], bool]] = []
    rank = 4
    while rank and len(steps) < 3:
        dims = data.draw(st.lists(st.integers(0, rank - 1), min_size=1, unique=True))
        steps.append(([d - data.draw(st.sampled_from([0, rank])) for d in dims], data.draw(st.booleans())))
        rank -= 0 if steps[-1][1] else len(dims)

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        for dims, keep in steps:
            x = NORM(x, dim=dims, keepdim=keep) if name == "norm" else getattr(x, name)(dims, keepdim=keep)
        return x

    x = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    net = Program(forward, {})
    graph = trace(net, (x,))
    (again,) = torch.utils._pytree.tree_leaves(graph(x))
    torch.testing.assert_close(again, net(x))
    live, _ = liveness(graph, [])
    assert sum(n.op == "call_function" and "view" not in str(n.target) for n in live) == 1
