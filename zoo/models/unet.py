"""A U-Net: an encoder and a decoder joined by concatenating skips; GroupNorm and transposed convolutions."""

import torch
from torch import nn


def stage(fan_in: int, fan_out: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with GroupNorm and SiLU."""
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, 3, padding=1),
        nn.GroupNorm(4, fan_out),
        nn.SiLU(),
        nn.Conv2d(fan_out, fan_out, 3, padding=1),
        nn.GroupNorm(4, fan_out),
        nn.SiLU(),
    )


class UNet(nn.Module):
    """Two halvings down, two doublings up, one logit map per class."""

    def __init__(self, width: int = 16, channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        self.down1 = stage(channels, width)
        self.down2 = stage(width, 2 * width)
        self.middle = stage(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join2 = stage(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join1 = stage(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, channels, height, width)`` images to ``(batch, classes, height, width)`` logits."""
        a = self.down1(x)
        b = self.down2(nn.functional.max_pool2d(a, 2))
        c = self.middle(nn.functional.max_pool2d(b, 2))
        b = self.join2(torch.cat([self.up2(c), b], dim=1))
        a = self.join1(torch.cat([self.up1(b), a], dim=1))
        return self.head(a)


def build() -> UNet:
    """A U-Net for 8x8 images and two classes."""
    return UNet()
