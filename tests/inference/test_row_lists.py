"""Lists of rows that are used as an index, as Mixtral did up to transformers 4.44; and used as numbers besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from automerge import infer
from automerge.testing import assert_sound

torch.set_num_threads(1)
COUNT, WIDTH, HIDDEN = 4, 6, 5
X = torch.randn(24, 3, generator=torch.Generator().manual_seed(3))
Look = Callable[["Listed", Tensor, list[int]], Any]


class Listed(nn.Module):
    """Two experts for every token, whose rows are taken by lists."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.inp, self.gate, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, COUNT), nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(COUNT)
        )
        self.look, self.kept = look, None

    def forward(self, x: Tensor) -> Any:
        h = self.inp(x)
        weights, chosen = self.gate(h).softmax(-1).topk(2, -1)
        mask, out, seen = F.one_hot(chosen, COUNT).permute(2, 1, 0), torch.zeros_like(h), None
        for expert, where in zip(self.experts, mask, strict=True):
            slot, token = torch.where(where)
            rows, slots = token.tolist(), slot.tolist()
            state = h[None, rows].reshape(-1, WIDTH)
            seen = self.look(self, state, rows)
            state = seen if isinstance(seen, Tensor) else state
            out.index_add_(0, token, expert(state) * weights[rows, slots, None])
        return (self.out(h + out), seen) if isinstance(seen, list) else self.out(h + out)


def _keep(s: Listed, h: Tensor, rows: list[int]) -> None:
    s.kept = rows


LOOKS: dict[str, Look] = {
    "an entry": lambda s, h, rows: h * (1 + sum(rows[:1])),
    "sum": lambda s, h, rows: h + sum(rows),
    "comparison": lambda s, h, rows: h if rows == [0, 1, 2] else 2 * h,
    "tensor": lambda s, h, rows: h + torch.tensor(rows)[:, None],
    "unpacked": lambda s, h, rows: h + max([*rows, 0]),
    "added": lambda s, h, rows: h + sum((rows + rows)[-1:]),
    "lengths": lambda s, h, rows: h + h.new_ones(sum(rows) + 1).split([*rows, 1])[0].sum(),
}
LEFT: dict[str, Look] = {"returned": lambda s, h, rows: rows, "kept": _keep}


def _experts(net: Listed, **kwargs: Any) -> list[int]:
    return [e.size for e in infer(net, X, **kwargs).exchanges]


def test_lists_that_are_an_index_are_the_index() -> None:
    net = Listed(lambda s, h, rows: len(rows))
    symmetry = infer(net, X)
    assert [e.size for e in symmetry.exchanges] == [COUNT]
    assert_sound(net, X, symmetry)


@pytest.mark.parametrize("name", LOOKS)
def test_lists_that_are_looked_at_as_well_tell_the_experts_apart(name: str) -> None:
    assert _experts(Listed(LOOKS[name]), verify=False) == []


@pytest.mark.parametrize("name", LEFT)
def test_the_list_that_a_pass_leaves_tells_its_expert_apart(name: str) -> None:
    assert _experts(Listed(LEFT[name]), verify=False) == [COUNT - 1]
