"""The same slice written at constant places of several axes: a choice by a mask, as with `torch.where`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from automerge import infer
from automerge.testing import assert_sound

torch.set_num_threads(1)


class Filtered(nn.Module):
    """One filter of the state for every channel, written into a dense kernel (Dance Diffusion's change of length)."""

    def __init__(self, column: Any) -> None:
        super().__init__()
        self.inp, self.out, self.column = nn.Conv1d(2, 6, 3), nn.Conv1d(6, 3, 1), column
        self.register_buffer("kernel", torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x).relu()
        weight, row = h.new_zeros(6, 6, 4), torch.arange(6)
        weight[row, self.column(row)] = self.kernel[None].expand(6, -1)
        return self.out(nn.functional.conv1d(h, weight))


COLUMNS = {"its own": lambda row: row, "the next": lambda row: (row + 1) % 6, "the first": lambda row: row * 0}


@pytest.mark.parametrize("column", COLUMNS)
def test_a_slice_that_is_written_at_constant_places_of_two_axes(column: str) -> None:
    net, x = Filtered(COLUMNS[column]), torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0))
    found = infer(net, x, verify=False)
    assert_sound(net, x, found)
    if column == "its own":
        assert [{(s.param, s.axis) for s in g.slots} for g in found.sets] == [
            {("inp.weight", 0), ("inp.bias", 0), ("out.weight", 1)}
        ]
