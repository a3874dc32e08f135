"""A layer of experts that a program keeps as modules, and mixes in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from automerge import Symmetry

WIDTH, HIDDEN, COUNT = 6, 5, 3
X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) * 2


def small_expert() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))


class Mixture(nn.Module):
    """A layer of experts between two linear ones."""

    def __init__(self, mix: Callable[..., torch.Tensor], expert: Callable[[], nn.Module] = small_expert) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inp, self.gate, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, COUNT), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(expert() for _ in range(COUNT))
        self.mix = mix
        with torch.no_grad():
            self.gate.weight.normal_(0, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x)
        return self.out(self.mix(h, self.gate(h), self.experts))

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        """Of some rows those that are not sent to the last expert first, and one that is."""
        last = self.gate(self.inp(x)).argmax(-1) == COUNT - 1
        return torch.cat([x[~last], x[last][:1]])


def summed(h: Any, scores: Any, experts: Any) -> Any:
    g = scores.softmax(-1)
    return sum(g[:, e : e + 1] * expert(h) for e, expert in enumerate(experts))


def modules(symmetry: Symmetry) -> list[tuple[int, int]]:
    return [(e.size, len(e.params[0])) for e in symmetry.exchanges]
