"""Writes on a diagonal: the unit matrix chooses them, so that rows and columns move together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from automerge.testing import assert_sound
from tests.inference.networks_hostile import Program
from tests.inference.test_found_networks import found, lin

X, MORE = torch.randn(12, 3), torch.randn(17, 3)
UNITS = torch.arange(6)


def _diagonal(g: torch.Tensor) -> torch.Tensor:
    g.diagonal().add_(1.0)
    return g


def _named(g: torch.Tensor) -> torch.Tensor:
    d = g.diagonal(dim1=-1, dim2=-2)
    d *= 1.5
    return g


def _by_index(g: torch.Tensor) -> torch.Tensor:
    g[UNITS, UNITS] += 1.0
    return g


def _by_mask(g: torch.Tensor) -> torch.Tensor:
    g[torch.eye(6, dtype=torch.bool)] *= 2.0
    return g


def _batched(g: torch.Tensor) -> torch.Tensor:
    wide = torch.stack([g, 2 * g])
    wide[:, UNITS, UNITS] = wide.sum(-1).tanh() + 3
    return wide.sum(0)


def _behind(g: torch.Tensor) -> torch.Tensor:
    wide = torch.stack([g, g * g], -1)
    wide[UNITS, UNITS] = wide.mean(0)
    return wide.prod(-1)


def _apart(g: torch.Tensor) -> torch.Tensor:
    wide = torch.stack([g, g.sin()], 1)
    wide[UNITS, :, UNITS] = wide.mean(0).t() + 1
    return wide[:, 0] + wide[:, 1]


WRITES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    _diagonal,
    _named,
    _by_index,
    _by_mask,
    _batched,
    _behind,
    _apart,
    lambda g: g.diagonal_scatter(g.mean(0)),
    lambda g: torch.diagonal_scatter(g, torch.ones(6, dtype=g.dtype)),
    lambda g: g.index_put((UNITS, UNITS), g.sum(0), accumulate=True),
    lambda g: g.fill_diagonal_(3.0),
]


@pytest.mark.parametrize("write", WRITES)
def test_a_square_with_its_diagonal_written(write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def forward(s: Program, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x)
        return s.out(torch.tanh(h @ write(h.mT @ h)))

    found(lambda: Program(forward, {"inp": lin(3, 6), "out": lin(6, 2)}), "6", X, MORE)


def test_rows_and_columns_of_two_layers() -> None:
    """The diagonal pairs the units of one layer with those of another one."""

    def forward(s: Program, x: torch.Tensor) -> torch.Tensor:
        h, k = s.inp(x), s.other(x)
        g = h.mT @ k
        g[UNITS, UNITS] += 1.0
        return s.out(torch.tanh(h @ g)) + s.rest(k)

    parts = {"inp": lin(3, 6), "other": lin(3, 6), "out": lin(6, 2), "rest": lin(6, 2)}
    found(lambda: Program(forward, parts), "6", X, MORE)


@pytest.mark.parametrize(
    "write",
    [
        lambda g: g.diagonal_scatter(g[0, :5], 1),
        lambda g: g.index_put((UNITS, UNITS.flip(0)), g.sum(0)),
        lambda g: g.index_put((UNITS[:4], UNITS[:4]), g.sum(0)[:4]),
        lambda g: g.index_put((UNITS, UNITS), torch.arange(6, dtype=g.dtype)),
        lambda g: g.index_put((UNITS, UNITS.roll(1)), g.sum(1)),
        lambda g: g.index_put((UNITS.roll(1), UNITS.roll(1)), g.sum(1)),
        lambda g: g[:, :5].diagonal_scatter(g[:5, 0]) @ g[:5],
        lambda g: g.view(36)[None].expand(36, 36).diagonal_scatter(g.flatten().flip(0)).mean(0).view(6, 6),
    ],
)
def test_other_places(write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def forward(s: Program, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x)
        return s.out(torch.tanh(h @ write(h.mT @ h)))

    assert_sound(Program(forward, {"inp": lin(3, 6), "out": lin(6, 2)}).double().eval(), (X.double(),))
