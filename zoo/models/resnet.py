"""Residual networks for small images: basic and bottleneck blocks, BatchNorm or LayerNorm, a width multiplier."""

from collections.abc import Callable

import torch
from torch import nn

Norm = Callable[[int], nn.Module]


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an image, at each pixel on its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, channels, height, width)`` to the same."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, fan_in: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, 1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = norm(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, width, 1, stride, bias=False), norm(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, fan_in, height, width)`` to ``(batch, width, height / stride, width / stride)``."""
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, four times as wide outside as inside."""

    expansion = 4

    def __init__(self, fan_in: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(fan_in, width, 1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = norm(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.norm3 = norm(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != out:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, out, 1, stride, bias=False), norm(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, fan_in, height, width)`` to ``(batch, 4 width, height / stride, width / stride)``."""
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return torch.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network of three stages, each half as large and twice as wide as the one before.

    Args:
        width: channels of the first stage.
        depth: blocks per stage (three make a ResNet20).
        block: `BasicBlock` or `Bottleneck`.
        norm: the normalisation, from a number of channels.
        channels: input channels.
        classes: outputs.
    """

    def __init__(
        self,
        width: int = 16,
        depth: int = 1,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        norm: Norm = nn.BatchNorm2d,
        channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = norm(width)
        blocks: list[nn.Module] = []
        fan_in = width
        for stage in range(3):
            for i in range(depth):
                inner = width * 2**stage
                blocks.append(block(fan_in, inner, 2 if stage and i == 0 else 1, norm))
                fan_in = inner * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(fan_in, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, channels, height, width)`` images to ``(batch, classes)`` logits."""
        x = torch.relu(self.norm(self.stem(x)))
        x = self.blocks(x)
        return self.head(x.mean(dim=(2, 3)))


def build(width: float = 2.0) -> ResNet:
    """The residual CNN of the demo: BatchNorm, one block per stage, ``16 * width`` channels at first."""
    return ResNet(width=round(16 * width))


def build_layernorm(width: float = 1.0) -> ResNet:
    """The same with LayerNorm over channels."""
    return ResNet(width=round(16 * width), norm=ChannelNorm)


def build_bottleneck() -> ResNet:
    """Bottleneck blocks, as in ResNet50."""
    return ResNet(width=8, block=Bottleneck)


def build_resnet20(width: float = 1.0) -> ResNet:
    """ResNet20 for three-channel images (CIFAR), ``16 * width`` channels at first."""
    return ResNet(width=round(16 * width), depth=3, channels=3)


def build_resnet20_layernorm(width: float = 1.0) -> ResNet:
    """The same with LayerNorm over channels."""
    return ResNet(width=round(16 * width), depth=3, norm=ChannelNorm, channels=3)
