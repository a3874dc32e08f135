"""Factories for the tests of the command line: good ones, and each way of being bad."""

from collections.abc import Iterator

import torch
from torch import nn


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def batchnorm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 20))


class Keyword(nn.Module):
    """Takes its second input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) * scale


@torch.library.custom_op("automerge_tests::odd", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    """An operator that no rule knows: a cumulative product of sines."""
    return torch.cumsum(x.sin(), dim=-1) * x


class Odd(nn.Module):
    """A free hidden layer, and one that the odd operator pins."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 6)
        self.third = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(odd(self.second(torch.relu(self.first(x)))))


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield torch.randn(16, 1, 4, 4, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def no_batches() -> list[torch.Tensor]:
    return []


def number() -> int:
    return 3


def needs_argument(width: int) -> nn.Module:
    return nn.Linear(width, 2)


def raises() -> nn.Module:
    raise RuntimeError("no such weights\nand a second line")


VALUE = 3
