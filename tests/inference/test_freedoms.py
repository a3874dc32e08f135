"""Freedoms that were missed once: what may move must be found, whatever the example looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import infer, trace
from automerge._derive import infer_graph
from automerge.testing import assert_sound
from tests.inference.networks_hostile import Program


class _Nested(nn.Module):
    """A stream in halves and in pairs, with a code for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(40, 12))
        self.stem, self.out = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 2, 1)
        self.halves, self.pairs = nn.Conv1d(12, 12, 1, groups=2), nn.Conv1d(12, 12, 1, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x) + self.code[: x.shape[-1]].T
        x = x + self.halves(x).relu()
        return self.out(x + self.pairs(x).relu())


def test_units_in_units_are_found_where_several_lengths_are_read() -> None:
    """The lengths cut the codes of positions, of which each piece could have an order of its own (SqueezeBERT)."""
    torch.manual_seed(0)
    net, inputs = _Nested(), [torch.randn(2, 3, n) for n in (8, 16, 32)]
    symmetry, _ = infer_graph(*(trace(net, x, values=False) for x in inputs))
    assert sorted(g.size for g in symmetry.sets) == [2, 2, 2, 3, 3, 3, 3]
    assert symmetry.stats["unrepresentable"] == 0
    for x in inputs:
        assert_sound(net, x, symmetry)
    assert sorted(g.size for g in infer(net, inputs[0]).sets) == [2, 2, 2, 3, 3, 3, 3]


class _Deformable(nn.Module):
    """Attention at places that every head computes on each of several levels of an image (Deformable DETR)."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.query = nn.Linear(3, 4), nn.Linear(3, 5)
        self.places, self.weights = nn.Linear(5, 2 * 2 * 3 * 2), nn.Linear(5, 2 * 2 * 3)
        self.out = nn.Linear(4, 2)

    def forward(self, levels: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.query(x).relu()
        places = self.places(q).view(b, n, 2, 2, 3, 2).tanh()
        weights = self.weights(q).view(b, n, 2, 6).softmax(-1).transpose(1, 2).reshape(2 * b, 1, n, 6)
        sampled = []
        for i, level in enumerate(levels):
            value = self.value(level.flatten(2).mT).mT.reshape(2 * b, 2, *level.shape[2:])
            grid = places[:, :, :, i].transpose(1, 2).flatten(0, 1)
            sampled.append(F.grid_sample(value, grid, align_corners=False))
        mixed = (torch.stack(sampled, -2).flatten(-2) * weights).sum(-1)
        return self.out(mixed.view(b, 4, n).mT)


def test_every_head_has_an_order_of_its_points_on_each_level() -> None:
    torch.manual_seed(0)
    net, args = _Deformable(), ([torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 3)], torch.randn(2, 7, 3))
    symmetry = assert_sound(net, args, infer(net, args))
    # the queries; of each head the points on both levels and the values; the heads
    assert sorted(g.size for g in symmetry.sets) == [2, 2, 2, 3, 3, 3, 3, 5]
    assert {s.index.shape[1] for g in symmetry.sets if g.size == 3 for s in g.slots} == {1, 2}


@pytest.mark.parametrize("last", [lambda s, y: s.mean(y.sum(0)), lambda s, y: s.apart(y.transpose(0, 1).flatten(1))])
def test_stacked_heads_keep_an_order_each(last: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Each of two tensors has heads and their dimensions, and something for every head (its factor) beside these."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        heads = [f(x).unflatten(-1, (3, 4)).relu() * g(x)[..., None].tanh() for f, g in ((s.a, s.c), (s.b, s.d))]
        return last(s, torch.stack([(y / y.norm(dim=-1, keepdim=True)).flatten(1) for y in heads]))

    parts: dict[str, Any] = {n: lambda: nn.Linear(5, 12) for n in "ab"} | {n: lambda: nn.Linear(5, 3) for n in "cd"}
    torch.manual_seed(0)
    net = Program(forward, parts | {"mean": lambda: nn.Linear(12, 2), "apart": lambda: nn.Linear(24, 2)})
    symmetry = assert_sound(net, (torch.randn(4, 5),), infer(net, (torch.randn(4, 5),)))
    used = {s.param for g in symmetry.sets for s in g.slots}
    assert sorted(g.size for g in symmetry.sets) == ([3, 4, 4, 4] if "mean.weight" in used else [3, 3, *[4] * 6])


TWICE: list[tuple[Callable[[Any, torch.Tensor], torch.Tensor], list[int]]] = [
    (lambda s, x: torch.cat([s.a(x).relu(), s.a(x).relu()], -1), [2] * 6 + [6]),
    (lambda s, x: torch.stack([s.a(x).softmax(-1), s.a(x).softmax(-1)], 1).flatten(1), [2] * 6 + [6]),
    (lambda s, x: torch.cat([s.b(s.a(x).relu()).tanh(), s.b(s.a(x).relu()).tanh()], -1), [2] * 6 + [6, 6]),
    (lambda s, x: torch.cat([s.a(x), s.a(x)], -1) * torch.cat([s.a(x), s.a(x)], -1), [2] * 6 + [6]),
    # what is drawn, written between, or computed otherwise is another tensor
    (lambda s, x: torch.cat([s.a(x) + 1, s.a(x) + 1.5], -1), [6]),
    (lambda s, x: torch.cat([s.a(x).clone().mul_(2), s.a(x)], -1), [6]),
    (lambda s, x: torch.cat([s.a(x), s.a(x).add_(s.a(x).amax(-1, True))], -1), [6]),
    (lambda s, x: torch.cat([s.a(x) + torch.rand(()), s.a(x) + torch.rand(())], -1), [6]),
    (lambda s, x: torch.cat([s.a(x).relu(), s.a(x.flip(0)).relu()], -1), [6]),
]


@pytest.mark.parametrize(("forward", "sizes"), TWICE, ids=map(str, range(len(TWICE))))
def test_what_is_computed_twice_is_one_tensor(forward: Any, sizes: list[int]) -> None:
    """Two columns that read the same unit may be exchanged."""
    torch.manual_seed(0)
    net = Program(
        lambda s, x: s.out(forward(s, x)),
        {k: lambda: nn.Linear(6, 6) for k in "ab"} | {"out": lambda: nn.Linear(12, 2)},
    )
    args = (torch.randn(4, 6),)
    symmetry = infer(net, args, verify="rand" not in forward.__code__.co_names)
    assert sorted(g.size for g in symmetry.sets) == sizes
    if "rand" not in forward.__code__.co_names:
        assert_sound(net, args, symmetry)


def test_pieces_cut_twice_keep_their_promises() -> None:
    """One use of a piece is to be joined again, the other is not; neither loses what the other shows."""
    torch.manual_seed(0)
    forward = lambda s, x: s.out(torch.cat([s.a(x)[:, 3:], s.a(x)[:, :3]], -1)) + s.b(s.a(x)[:, :3].relu())  # noqa: E731
    net = Program(forward, {n: lambda: nn.Linear(6, 6) for n in ("a", "out")} | {"b": lambda: nn.Linear(3, 6)})
    args = (torch.randn(4, 6),)
    assert sorted(g.size for g in assert_sound(net, args, infer(net, args)).sets) == [3, 3]
