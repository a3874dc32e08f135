"""Factories for the tests of the command line: good ones, and each way of being bad."""

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import TensorDataset


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def batchnorm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


def float16() -> nn.Module:
    return mlp().half()


def bfloat16() -> nn.Module:
    return mlp().bfloat16()


def float64() -> nn.Module:
    return mlp().double()


def meta() -> nn.Module:
    with torch.device("meta"):
        return mlp()


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))


def complex_filter() -> nn.Module:
    return nn.Linear(4, 4, dtype=torch.complex128)


class Chatty(nn.Module):
    """Prints while it runs, as do its factory and its data."""

    def __init__(self) -> None:
        super().__init__()
        print("chatter of the factory")
        self.layers = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("chatter of the model")
        return self.layers(x)


def chatty_batches() -> Iterator[torch.Tensor]:
    print("chatter of the data")
    yield torch.randn(8, 1, 4, 4)


INSTANCE = mlp()


class Table(nn.Module):
    """Has an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("index", torch.arange(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[:, self.get_buffer("index")]


table = Table


class Dead(nn.Module):
    """Its output is no number, whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) * torch.nan


class Masked(nn.Module):
    """An autoregressive network: units of one degree read the same inputs. The mask is a float buffer of the checkpoint."""

    def __init__(self, pruned: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 4)
        degree = torch.arange(12) % 3
        self.register_buffer("first", (degree[:, None] >= torch.arange(4)).float())
        self.register_buffer("second", (torch.arange(4)[:, None] > degree).float())
        if pruned:
            self.first = (torch.rand(12, 4) > 0.3).float()
        for layer in (self.a, self.b):
            layer.weight.data.mul_(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(nn.functional.linear(x, self.a.weight * self.first, self.a.bias))
        return nn.functional.linear(h, self.b.weight * self.second, self.b.bias)


def masked() -> nn.Module:
    return Masked()


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


def samples() -> TensorDataset:
    return TensorDataset(torch.randn(8, 1, 4, 4), torch.zeros(8))


def words() -> list[str]:
    return ["a", "b"]


def wide() -> list[torch.Tensor]:
    return [torch.randn(4, 7)]


def not_a_number() -> list[torch.Tensor]:
    return [torch.randn(4, 1, 4, 4), torch.full((4, 1, 4, 4), torch.nan)]


def broken_generator() -> Iterator[torch.Tensor]:
    yield torch.randn(4, 1, 4, 4)
    raise OSError("disk gone")


class _BrokenLater:
    def __iter__(self) -> Iterator[torch.Tensor]:
        return broken_generator()


def broken_later() -> _BrokenLater:
    return _BrokenLater()


class _NoIterator:
    def __iter__(self) -> Iterator[torch.Tensor]:
        raise OSError("disk gone")


def no_iterator() -> _NoIterator:
    return _NoIterator()


def on_meta() -> list[torch.Tensor]:
    return [torch.empty(4, 1, 4, 4, device="meta")]


def endless() -> Iterator[torch.Tensor]:
    return itertools.repeat(torch.randn(4, 1, 4, 4))


class _Once:
    """Gives its batches to the first who asks."""

    def __init__(self) -> None:
        self.items = iter([torch.randn(4, 1, 4, 4)])

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(list(self.items))


def once() -> _Once:
    return _Once()


def no_batches() -> list[torch.Tensor]:
    return []


def number() -> int:
    return 3


def needs_argument(width: int) -> nn.Module:
    return nn.Linear(width, 2)


def raises() -> nn.Module:
    raise RuntimeError("no such weights\nand a second line")


def leaves() -> nn.Module:
    sys.exit(7)


VALUE = 3


class ReadsValues(nn.Module):
    """Cannot be built on the meta device: it looks at its values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale = float(torch.ones(2).sum())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu() * self.scale)


class HiddenBuffer(nn.Module):
    """Holds values that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("shift", torch.linspace(0, 1, 4), persistent=False)
        self.steps = [torch.ones(1)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x + self.shift * self.steps[0]).relu())


reads_values_when_built, hidden_buffer = ReadsValues, HiddenBuffer
