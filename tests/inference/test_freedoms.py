"""Freedoms that were missed once: what may move must be found, whatever the example looks like."""

from __future__ import annotations

import torch
from torch import nn

from automerge import infer, trace
from automerge._derive import infer_graph
from automerge.testing import assert_sound


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
