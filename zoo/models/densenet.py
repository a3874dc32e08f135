"""A DenseNet-like network: every layer reads the concatenation of all before it."""

import torch
from torch import nn


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution whose output is appended to its input."""

    def __init__(self, fan_in: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(fan_in)
        self.conv = nn.Conv2d(fan_in, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, fan_in, height, width)`` to ``(batch, fan_in + growth, height, width)``."""
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], dim=1)


class DenseNet(nn.Module):
    """Two dense stages with a halving transition between them."""

    def __init__(self, width: int = 16, growth: int = 12, depth: int = 3, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.stage1 = nn.Sequential(*(DenseLayer(width + i * growth, growth) for i in range(depth)))
        middle = width + depth * growth
        self.norm1 = nn.BatchNorm2d(middle)
        self.transition = nn.Conv2d(middle, middle // 2, 1, bias=False)
        self.stage2 = nn.Sequential(*(DenseLayer(middle // 2 + i * growth, growth) for i in range(depth)))
        last = middle // 2 + depth * growth
        self.norm2 = nn.BatchNorm2d(last)
        self.head = nn.Linear(last, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, channels, height, width)`` images to ``(batch, classes)`` logits."""
        x = self.stage1(self.stem(x))
        x = nn.functional.avg_pool2d(self.transition(torch.relu(self.norm1(x))), 2)
        x = torch.relu(self.norm2(self.stage2(x)))
        return self.head(x.mean(dim=(2, 3)))


def build() -> DenseNet:
    """Two stages of three layers for 8x8 images."""
    return DenseNet()
