"""VGG for small images, with and without BatchNorm."""

from collections.abc import Sequence

import torch
from torch import nn

VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
SMALL = (32, 32, "M", 64, 64, "M", 128, 128, "M")


class VGG(nn.Module):
    """3x3 convolutions with ReLU, pooling by two at every ``"M"``, and a two-layer head.

    Args:
        plan: channels of each convolution, or ``"M"`` for a pooling.
        norm: put a BatchNorm after each convolution.
        hidden: the width of the head.
        channels: input channels.
        classes: outputs.
    """

    def __init__(
        self,
        plan: Sequence[int | str] = SMALL,
        norm: bool = False,
        hidden: int = 128,
        channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for item in plan:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(channels, item, 3, padding=1))
            layers += [nn.BatchNorm2d(item), nn.ReLU()] if norm else [nn.ReLU()]
            channels = item
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, channels, height, width)`` images, pooled down to one pixel, to ``(batch, classes)`` logits."""
        return self.head(self.features(x))


def build() -> VGG:
    """A small VGG without normalisation, for 8x8 images."""
    return VGG()


def build_batchnorm() -> VGG:
    """The same with BatchNorm."""
    return VGG(norm=True)


def build_vgg11(norm: bool = False, width: float = 1.0) -> VGG:
    """VGG11 for 32x32 images of three channels, without normalisation or with BatchNorm, ``64 * width`` channels at first."""
    plan = [item if isinstance(item, str) else round(item * width) for item in VGG11]
    return VGG(plan, norm=norm, hidden=round(512 * width), channels=3)


def build_vgg16(norm: bool = True) -> VGG:
    """VGG16 for 32x32 images of three channels, with BatchNorm or without normalisation."""
    return VGG(VGG16, norm=norm, hidden=512, channels=3)
