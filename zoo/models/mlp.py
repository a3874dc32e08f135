"""A ReLU multilayer perceptron on flattened images."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        sizes: the width of every layer, input and output included.
        norm: put a BatchNorm before each ReLU.
    """

    def __init__(self, sizes: Sequence[int] = (64, 256, 256, 256, 256, 10), norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            layers.append(nn.Linear(fan_in, fan_out))
            if i < len(sizes) - 2:
                layers += [nn.BatchNorm1d(fan_out), nn.ReLU()] if norm else [nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, ...)`` images to ``(batch, classes)`` logits."""
        return self.layers(x)


def build() -> MLP:
    """The MLP of the demo: four hidden layers of 256 for 8x8 digits."""
    return MLP()


def build_batchnorm() -> MLP:
    """The same with BatchNorm."""
    return MLP(norm=True)
