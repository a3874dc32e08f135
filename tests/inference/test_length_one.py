"""Groups found on an example of one token, one step, one pixel or one node hold on larger inputs, without verification, too."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import infer
from tests.inference.networks_hostile import Program
from tests.inference.test_networks import parse, worst_change
from tests.inference.test_other_inputs import FREQUENCIES, QKVO, SLOPES, attend, distances, draw, lin

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], list[tuple[Any, ...]], str]] = {}
ONE, LONGER = (draw(2, 1, 5),), [(draw(2, 4, 5),), (draw(1, 9, 5),)]
PIXEL, IMAGES = (draw(2, 5, 1, 1),), [(draw(2, 5, 3, 4),), (draw(1, 5, 1, 6),), (draw(1, 5, 4, 1),)]
NODE, NODES = (draw(1, 5),), [(draw(4, 5),), (draw(7, 5),)]
PARTS: dict[str, Any] = {"inp": lin(5, 8), "out": lin(8, 2)}
CONVOLUTIONS: dict[str, Any] = {"inp": lambda: nn.Conv2d(5, 8, 1), "out": lambda: nn.Conv2d(8, 2, 1)}


def add(name: str, sizes: str, args: Any, others: Any, forward: Callable[..., Any], **parts: Any) -> None:
    CASES[name] = (lambda: Program(forward, parts), args, others, sizes)


def waves(positions: torch.Tensor) -> torch.Tensor:
    """Sines and then cosines; at position 0 all of one kind are the same."""
    angles = positions.to(FREQUENCIES)[:, None] * FREQUENCIES[:4]
    return torch.cat([angles.sin(), angles.cos()], 1)


def by_einsum(n: int) -> torch.Tensor:
    angles = torch.einsum("i,j->ij", torch.arange(n).to(FREQUENCIES), FREQUENCIES[:4])
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def written(n: int) -> torch.Tensor:
    table, rates = torch.zeros(n, 8), torch.exp(torch.arange(0, 8, 2) * (-math.log(100.0) / 8))
    table[:, 0::2] = torch.sin(torch.arange(n).unsqueeze(1) * rates)
    table[:, 1::2] = torch.cos(torch.arange(n).unsqueeze(1) * rates)
    return table


EVEN, ODD = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0])
for _name, _sizes, _code in (
    ("arange", "", lambda n: waves(torch.arange(n))),
    ("linspace", "", lambda n: waves(torch.linspace(0, 1, n))),
    ("linspace of sizes", "", lambda n: waves(torch.linspace(0, n - 1, n))),
    ("cumsum", "", lambda n: waves(torch.ones(1, n, dtype=torch.long).cumsum(-1)[0] - 1)),
    ("einsum", "", by_einsum),
    ("written", "", written),
    ("one hot", "", lambda n: F.one_hot(torch.arange(n) % 8, 8)),
    ("index_put", "", lambda n: torch.zeros(n, 8).index_put((torch.arange(n), torch.arange(n) % 8), torch.tensor(1.0))),
    ("thresholds", "", lambda n: torch.arange(n)[:, None] < torch.arange(1, 9)),
    ("parity", "2x4", lambda n: torch.where((torch.arange(n) % 2 == 0)[:, None], EVEN, ODD)),
    ("no channels", "8", lambda n: torch.arange(n)[:, None] / n),
    ("diagonal", "", lambda n: torch.eye(n).sum(0)[:, None] * torch.arange(8)),
):  # fmt: skip
    add(f"Code, {_name}", _sizes, ONE, LONGER, lambda s, x, f=_code: s.out((s.inp(x) + f(x.shape[1])).relu()), **PARTS)

HEADS, TWO_ALIKE = "3x8", "2 3x8"
for _name, _sizes, _change in (
    ("eye", HEADS, lambda a, n: a + torch.eye(n) * SLOPES[:, None, None]),
    ("tril", HEADS, lambda a, n: a + torch.tril(torch.ones(n, n), -1) * SLOPES[:, None, None]),
    ("triu of slopes", HEADS, lambda a, n: a + torch.triu(SLOPES[:, None, None].repeat(1, n, n), 1)),
    ("windows", HEADS, lambda a, n: a.masked_fill(distances(n).abs() >= torch.tensor([2, 3, 4, 5])[:, None, None], -1e9)),
    ("dilated", HEADS, lambda a, n: a.masked_fill(distances(n) % torch.arange(1, 5)[:, None, None] != 0, -1e9)),
    ("directions", TWO_ALIKE, lambda a, n: a.masked_fill(
        torch.stack([*[torch.ones(n, n).triu(1)] * 2, torch.ones(n, n).tril(-1), torch.zeros(n, n)]) > 0, -1e9)),
    ("two masks", TWO_ALIKE, lambda a, n: a.masked_fill(
        torch.stack([*(torch.ones(n, n).triu(1) for _ in range(2)), torch.ones(n, n).tril(-1), torch.zeros(n, n)]) > 0, -1e9)),
    ("cumsum", HEADS, lambda a, n: a + (lambda c: c[:, :, None] - c[:, None])(SLOPES.log()[:, None].expand(4, n).cumsum(1))),
    ("causal", "3x8 4", lambda a, n: a.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -1e9)),
):  # fmt: skip
    add(f"Heads, {_name}", _sizes, ONE, LONGER, lambda s, x, f=_change: attend(s, x, f), **QKVO)


def flat_waves(height: int, width: int) -> torch.Tensor:
    """As RT-DETR has it: a few frequencies for each axis."""
    grid = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    angles = [g.flatten()[:, None] @ FREQUENCIES[None, :2].to(g) for g in grid]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)


for _name, _grid in (
    ("waves", lambda h, w: flat_waves(h, w).T.unflatten(1, (h, w))),
    ("centres", lambda h, w: ((torch.arange(w) + 0.5) / w * torch.arange(1.0, 9)[:, None, None]).sin()),
    ("distances", lambda h, w: torch.exp(-((torch.arange(w) - (w - 1) / 2) ** 2) * torch.arange(1.0, 9)[:, None, None])),
):  # fmt: skip
    add(
        f"Pixel, {_name}",
        "",
        PIXEL,
        IMAGES,
        lambda s, x, f=_grid: s.out((s.inp(x) + f(*x.shape[2:])).relu()),
        **CONVOLUTIONS,
    )

add(
    "Node, without itself",
    "",
    NODE,
    NODES,
    lambda s, x: s.out(((1 - torch.eye(len(x)))[..., None] * torch.arange(8.0) * s.inp(x)).sum(1) + s.inp(x)),
    **PARTS,
)
add("Node, self loops", "8", NODE, NODES, lambda s, x: s.out((torch.eye(len(x)) + 1) @ s.inp(x).relu()), **PARTS)


@pytest.mark.parametrize("name", CASES)
def test_what_one_position_cannot_show_is_not_free(name: str) -> None:
    factory, args, others, sizes = CASES[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return factory()

    symmetry = infer(make(), args, verify=False)
    assert sorted(g.size for g in symmetry.generators()) == parse(sizes), str(symmetry)
    for given in (args, *others):
        assert worst_change(make, given, {}, symmetry) < 1e-6


@functools.lru_cache
def _cached(n: int) -> torch.Tensor:
    return waves(torch.arange(n))


def _counted() -> Callable[[int], int]:
    @functools.lru_cache
    def square(n: int) -> int:
        return n * n

    return square


class Cached(nn.Module):
    """A table that its first pass leaves in a cache of python."""

    square = staticmethod(_counted())

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out((self.inp(x) + _cached(x.shape[1])).relu()) * self.square(3)


def test_a_table_in_a_cache_of_python_is_computed_again() -> None:
    model = Cached()
    before = model(ONE[0])
    assert infer(model, ONE, verify=False).sets == ()
    assert infer(model, ONE).sets == ()
    assert Cached.square.cache_info().currsize == 1  # what holds no tensors is not touched
    torch.testing.assert_close(model(ONE[0]), before)
    assert _cached(1).dtype is torch.float32  # and not as verification computed it


def _recurrent(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = torch.zeros(len(x), 8)
    for t in range(x.shape[1]):
        h = torch.where(torch.tensor(t) % (1 + torch.arange(8) // 4) == 0, (h @ s.w + s.inp(x[:, t])).tanh(), h)
    return s.out(h)


HIDDEN: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "a view that mixes": (lambda s, x: s.out(s.inp(x).transpose(1, 2).reshape(len(x), -1, 8).relu()), "", PARTS),
    "heads by a view": (
        lambda s, x: s.out((lambda q: (q @ q.mT).softmax(-1) @ q)(s.inp(x).view(len(x), 4, -1, 2)).flatten(1)[:, :8]),
        "2",
        PARTS,
    ),
    "a table from lists": (
        lambda s, x: s.out(s.inp(x) + torch.tensor([[(t * c) % 5 + 0.0 for c in range(8)] for t in range(x.shape[1])])),
        "2 2 2",
        PARTS,
    ),
    "the state of a recurrence": (_recurrent, "4 4", {"w": lambda: nn.Parameter(torch.randn(8, 8)), **PARTS}),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_longer_inputs_are_read_where_a_length_of_one_hides_what_is_done(name: str) -> None:
    forward, sizes, parts = HIDDEN[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Program(forward, parts)

    symmetry = infer(make(), ONE, verify=False)
    assert sorted(g.size for g in symmetry.generators()) == parse(sizes), str(symmetry)
    for given in (ONE, *LONGER):
        assert worst_change(make, given, {}, symmetry) < 1e-6


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("rows", [2, 4, 16])
def test_of_a_large_batch_few_rows_are_made_larger(rows: int, verify: bool) -> None:
    """The whole batch is too large with larger images; the positions come from numpy, and here there is one."""

    def program(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x)
        angles = np.outer(np.arange(h.shape[2] * h.shape[3]), [1, 0.5, 0.2, 0.1])
        places = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], 1)).to(h)
        return s.out((h + places.T.unflatten(1, h.shape[2:])).relu())

    def make() -> nn.Module:
        torch.manual_seed(0)
        parts = {"inp": lambda: nn.Conv2d(3, 8, 32, 32), "out": lambda: nn.Conv2d(8, 2, 1)}
        return Program(program, parts)

    symmetry = infer(make(), draw(rows, 3, 32, 32), verify=verify)
    assert not symmetry.generators()
    assert worst_change(make, (draw(1, 3, 64, 64),), {}, symmetry) < 1e-9


def test_branches_that_all_inputs_show_are_exchanged_without_verification() -> None:
    def program(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x)
        same = h.transpose(0, 1).transpose(0, 1).reshape(len(x), -1, 8)
        return s.out(same) + sum(part(h.transpose(0, 1).reshape(same.shape)).tanh() for part in s.parts)

    parts = {**PARTS, "parts": lambda: nn.ModuleList(nn.Linear(8, 2) for _ in range(3))}
    for verify in (True, False):
        assert [e.size for e in infer(Program(program, parts), draw(1, 6, 5), verify=verify).exchanges] == [3]
