"""A MobileNet-like network: inverted residuals with depthwise convolutions and squeeze-and-excitation."""

import torch
import torch.nn.functional as F
from torch import nn


class Squeeze(nn.Module):
    """A gate per channel, computed from the channels' means."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 1)
        self.up = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, channels, height, width)`` to the same."""
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class InvertedResidual(nn.Module):
    """Expand, convolve each channel on its own, gate, project; a shortcut where shapes allow."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = fan_in * expand
        self.shortcut = stride == 1 and fan_in == fan_out
        self.layers = nn.Sequential(
            nn.Conv2d(fan_in, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            Squeeze(hidden, max(hidden // 4, 4)),
            nn.Conv2d(hidden, fan_out, 1, bias=False),
            nn.BatchNorm2d(fan_out),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, fan_in, height, width)`` to ``(batch, fan_out, ...)``."""
        y = self.layers(x)
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """A stem, inverted residuals, global pooling, a linear head."""

    def __init__(self, width: int = 16, expand: int = 3, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.Hardswish()
        )
        self.blocks = nn.Sequential(
            InvertedResidual(width, width, 1, expand),
            InvertedResidual(width, 2 * width, 2, expand),
            InvertedResidual(2 * width, 2 * width, 1, expand),
        )
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, channels, height, width)`` images to ``(batch, classes)`` logits."""
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def build() -> MobileNet:
    """A network of three inverted residuals for 8x8 images."""
    return MobileNet()
