"""Tensors without entries that a model holds: nothing is known of what will be in them, so that nothing follows from it.

Unless the pass itself fills them: then they are the beginning of a state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import infer
from automerge.testing import assert_sound

X = torch.randn(4, 5)


def _written(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(len(x), 4)
    out[: len(rows)] = rows
    return out


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "at": lambda x, r: x.new_zeros(len(x), 4).index_put((torch.arange(len(r)),), r),
    "added": lambda x, r: x.new_zeros(len(x), 4).index_add(0, torch.arange(len(r)), r),
    "copied": lambda x, r: x.new_zeros(len(x), 4).index_copy(0, torch.arange(len(r)), r),
    "scattered": lambda x, r: x.new_zeros(len(x), 4).scatter_add(0, torch.arange(len(r))[:, None].expand(-1, 4), r),
    "written": _written,
    "sum": lambda x, r: r.sum(0).expand(len(x), -1),
    "product": lambda x, r: torch.ones(len(x), len(r)) @ r,
    "attention": lambda x, r: F.scaled_dot_product_attention(x[None, :, :4], r[None], r[None])[0],
    "joined": lambda x, r: torch.cat([r, x.new_zeros(1, 4)]).amax(0).expand(len(x), -1),
}


class Memory(nn.Module):
    """Rows that come in between calls; none yet."""

    def __init__(self, read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.read, self.rows = read, torch.empty(0, 4)
        self.a, self.f, self.b = nn.Linear(5, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x) + self.f(self.read(x, self.rows))))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_will_be_read_keeps_its_order(way: str, verify: bool) -> None:
    net = Memory(WAYS[way])
    symmetry = infer(net, X, verify=verify)
    assert [g.size for g in symmetry.generators()] == [3]
    net.rows = torch.randn(2, 4)
    assert_sound(net, X, symmetry)


class Nodes(nn.Module):
    """Messages between nodes, stored between calls: where from and where to are one tensor as long as there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(6, 8))
        self.f, self.out = nn.Linear(16, 8), nn.Linear(8, 2)
        self.source = self.target = torch.empty(0, dtype=torch.long)

    def forward(self, n: torch.Tensor) -> torch.Tensor:
        sent = torch.cat([self.memory[self.source], self.memory[self.target]], -1)
        rows = self.memory.new_zeros(len(n), 16).index_add(0, self.target, sent)
        return self.out(self.f(rows).tanh() + self.memory[n])


def test_two_uses_of_one_empty_tensor_are_two() -> None:
    net, n = Nodes(), torch.arange(6)
    symmetry = infer(net, n)
    assert [g.size for g in symmetry.generators()] == [8]
    net.source, net.target = torch.tensor([0, 2]), torch.tensor([1, 3])
    assert_sound(net, n, symmetry)


class Cached(nn.Module):
    """Keys of earlier calls, none yet: what a pass joins to them is what the next one finds."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 2)
        self.keys: Any = torch.empty(0, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.keys = torch.cat([self.keys, self.k(x)])
        return self.out((self.q(x) @ self.keys.T).softmax(-1) @ self.keys)


def test_the_beginning_of_a_state_is_no_input() -> None:
    assert [g.size for g in infer(Cached(), X).generators()] == [6]


class Shared(nn.Module):
    """One weight as two parameters over one memory, and noise that every pass writes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(6, 5)), nn.Linear(6, 2)
        self.again = nn.Parameter(self.weight)
        self.register_buffer("noise", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.noise.data.normal_()
        return self.out((x @ self.again.T + x @ self.weight.T + self.noise).relu())


@pytest.mark.parametrize("verify", [False, True])
def test_one_memory_as_two_parameters_where_a_pass_writes(verify: bool) -> None:
    assert [g.size for g in infer(Shared(), X, verify=verify).generators()] == [6]
