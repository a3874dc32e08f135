"""A small vision transformer: pre-norm LayerNorm and multi-head attention written plainly."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, tokens, dim)`` to the same."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weight = torch.softmax(query @ key.transpose(-2, -1) / (dim // self.heads) ** 0.5, dim=-1)
        return self.out((weight @ value).transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """Attention and a GELU MLP, each on a normalised copy of the residual stream."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, tokens, dim)`` to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches, a class token, learned positions, pre-norm blocks, a linear head.

    Args:
        image: side of the square image.
        patch: side of a patch.
        dim: width of the residual stream.
        heads: attention heads.
        depth: blocks.
        hidden: width of the MLPs.
        channels: input channels.
        classes: outputs.
    """

    def __init__(
        self,
        image: int = 8,
        patch: int = 2,
        dim: int = 32,
        heads: int = 4,
        depth: int = 2,
        hidden: int = 64,
        channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, channels, image, image)`` images to ``(batch, classes)`` logits."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def build() -> ViT:
    """A ViT of two blocks for 8x8 digits."""
    return ViT()
