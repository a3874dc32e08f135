"""Mixtures of experts with a dense softmax router: the experts' weights in one tensor, or one module for every expert."""

import torch
from torch import nn


class Experts(nn.Module):
    """``experts`` two-layer MLPs, weighted at each input by a router; all weights of a kind are one tensor."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts)
        self.up = nn.Parameter(torch.randn(experts, dim, hidden) * (2 / dim) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(experts, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, dim) * hidden**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, dim)`` to the same."""
        weight = torch.softmax(self.router(x), dim=-1)
        hidden = torch.relu(torch.einsum("bd,edh->beh", x, self.up) + self.bias)
        return torch.einsum("be,beh,ehd->bd", weight, hidden, self.down)


class ExpertList(nn.Module):
    """The same with a module for every expert."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)) for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, dim)`` to the same."""
        weight = torch.softmax(self.router(x), dim=-1)
        return sum((weight[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts)), torch.zeros_like(x))


class MoE(nn.Module):
    """A linear stem, residual expert layers (their experts in one tensor, or in a list), a linear head."""

    def __init__(
        self,
        features: int = 64,
        dim: int = 32,
        hidden: int = 24,
        experts: int = 4,
        depth: int = 2,
        classes: int = 10,
        *,
        listed: bool = False,
    ) -> None:
        super().__init__()
        layer = ExpertList if listed else Experts
        self.stem = nn.Linear(features, dim)
        self.layers = nn.ModuleList(layer(dim, hidden, experts) for _ in range(depth))
        self.head = nn.Linear(dim, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, ...)`` images to ``(batch, classes)`` logits."""
        x = self.stem(x.flatten(1))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def build() -> MoE:
    """Two layers of four experts for 8x8 images."""
    return MoE()
