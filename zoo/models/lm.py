"""A decoder-only language model: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embedding."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """Division by the root mean square, and a scale per channel."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., dim)`` to the same."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``(batch, heads, tokens, head_dim)``."""
    tokens, half = x.shape[-2], x.shape[-1] // 2
    rate = 10000.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angle = torch.arange(tokens, dtype=x.dtype, device=x.device)[:, None] * rate
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Attention(nn.Module):
    """Causal attention in which several query heads share one head of keys and values."""

    def __init__(self, dim: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, dim // heads
        self.query = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.key = nn.Linear(dim, groups * self.head_dim, bias=False)
        self.value = nn.Linear(dim, groups * self.head_dim, bias=False)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, tokens, dim)`` to the same."""
        batch, tokens, _ = x.shape
        query = self.query(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        key = self.key(x).view(batch, tokens, self.groups, self.head_dim).transpose(1, 2)
        value = self.value(x).view(batch, tokens, self.groups, self.head_dim).transpose(1, 2)
        share = self.heads // self.groups
        key = rotate(key).repeat_interleave(share, dim=1)
        value = value.repeat_interleave(share, dim=1)
        y = F.scaled_dot_product_attention(rotate(query), key, value, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    """Attention and a gated MLP on a pre-normalised residual stream."""

    def __init__(self, dim: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attention = Attention(dim, heads, groups)
        self.norm2 = RMSNorm(dim)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, tokens, dim)`` to the same."""
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LM(nn.Module):
    """A decoder-only transformer whose head is its embedding.

    Args:
        vocabulary: number of tokens.
        dim: width of the residual stream.
        heads: query heads.
        groups: key and value heads; divides ``heads``.
        depth: blocks.
        hidden: width of the gated MLPs.
        tied: use the embedding as the head.
    """

    def __init__(
        self,
        vocabulary: int = 50,
        dim: int = 32,
        heads: int = 4,
        groups: int = 2,
        depth: int = 2,
        hidden: int = 48,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, groups, hidden) for _ in range(depth))
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``(batch, tokens)`` integers to ``(batch, tokens, vocabulary)`` logits."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build() -> LM:
    """A language model of two blocks over fifty tokens."""
    return LM()
