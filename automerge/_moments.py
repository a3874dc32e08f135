"""Streaming per-channel statistics, exact for batches of any size."""

from __future__ import annotations

import torch

from automerge._errors import AutomergeError


class Moments:
    """Streaming per-channel count, mean and centred square sum in float64; exact for parts of any size.

    Chan, Golub, LeVeque (1979), the pairwise update.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.square = torch.zeros(())

    def update(self, value: torch.Tensor, channel: int) -> None:
        """Add every position of ``value`` except along ``channel`` as one sample."""
        flat = value.detach().movedim(channel, -1)
        flat = flat.reshape(-1, flat.shape[-1]).double()
        count = flat.shape[0]
        if count == 0:
            return
        mean = flat.mean(0)
        square = (flat - mean).square().sum(0)
        if self.count == 0:
            self.count, self.mean, self.square = count, mean, square
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.square = self.square + square + delta.square() * (self.count * count / total)
        self.count = total

    def variance(self, *, unbiased: bool = False) -> torch.Tensor:
        """The variance of all samples; with ``unbiased`` divided by count - 1 as BatchNorm's running variance is."""
        return self.square / max(self.count - 1 if unbiased else self.count, 1)

    def check(self, where: str) -> None:
        """Refuse what cannot be a target or a measure.

        Raises:
            AutomergeError: if some are NaN or infinite.
        """
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.square).all()):
            raise AutomergeError(
                f"activations at {where} are NaN or infinite, or too large to square; check the data and the models"
            )

    def std(self) -> torch.Tensor:
        """The standard deviation of all samples."""
        return self.variance().sqrt()
