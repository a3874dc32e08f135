"""Numbers that are made up to try what an operator, or part of a graph, does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Draw = Callable[[Sequence[int], torch.Generator], torch.Tensor]


def small(shape: Sequence[int], rng: torch.Generator) -> torch.Tensor:
    """Numbers so small that nothing saturates and no bound cuts their products off, and positive: roots of them exist."""
    return 0.1 * torch.rand(shape, generator=rng, dtype=torch.float64) + 0.05


def signed(shape: Sequence[int], rng: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    """Numbers on both sides of zero; on a large scale also of thresholds that hide small ones."""
    return scale * torch.randn(shape, generator=rng, dtype=torch.float64)
