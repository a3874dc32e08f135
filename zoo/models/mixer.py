"""An MLP-mixer: MLPs over the patches and over the channels in turn."""

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    """Two linear layers with GELU between them, on the last axis."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, hidden)
        self.down = nn.Linear(hidden, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., size)`` to the same."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Token mixing, then channel mixing."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.tokens = MLP(tokens, 2 * tokens)
        self.norm2 = nn.LayerNorm(dim)
        self.channels = MLP(dim, 2 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, tokens, dim)`` to the same."""
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Patches, mixing blocks, the mean over patches, a linear head."""

    def __init__(
        self, image: int = 8, patch: int = 2, dim: int = 32, depth: int = 2, channels: int = 1, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.blocks = nn.Sequential(*(Block((image // patch) ** 2, dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, channels, image, image)`` images to ``(batch, classes)`` logits."""
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(dim=1))


def build() -> Mixer:
    """Two mixing blocks for 8x8 images."""
    return Mixer()
