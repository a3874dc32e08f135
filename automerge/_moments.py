"""Streaming statistics, per channel and across models, exact for batches of any size."""

from __future__ import annotations

from collections.abc import Sequence

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


class CrossMoments:
    """Streaming means and (cross-)covariances of N models' activations, float64, exact for batches of any size.

    The pairwise update of Chan, Golub and LeVeque (1979). Memory is ``(N n)^2`` numbers, or ``2 N n^2`` with a reference.

    Args:
        reference: keep each model's own covariance and that with this model only.

    Examples:
        >>> m = CrossMoments()
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 5.0]])
        >>> for part in x.split([1, 2]):
        ...     m.update([part.double(), 2 * part.double()])
        >>> torch.allclose(m.covariance(0, 1), 2 * torch.cov(x.T, correction=0).double())
        True
    """

    def __init__(self, reference: int | None = None) -> None:
        self.reference = reference
        self.count = 0
        self.means = torch.zeros(())
        self._products: list[torch.Tensor] = []

    def update(self, rows: Sequence[torch.Tensor]) -> None:
        """Add ``(samples, n)`` activations of every model, the same samples in the same order."""
        stacked = torch.stack([r.double() for r in rows])
        count = stacked.shape[1]
        if not count:
            return
        means = stacked.mean(1)
        fresh = self._pairs(stacked - means[:, None])
        if not self.count:
            self.count, self.means, self._products = count, means, fresh
            return
        total = self.count + count
        shift = self._pairs((means - self.means)[:, None])
        for held, new, moved in zip(self._products, fresh, shift, strict=True):
            held.add_(new).add_(moved, alpha=self.count * count / total)
        self.means = self.means + (means - self.means) * (count / total)
        self.count = total

    def _pairs(self, rows: torch.Tensor) -> list[torch.Tensor]:
        if self.reference is None:
            flat = rows.permute(1, 0, 2).reshape(rows.shape[1], -1)
            return [flat.T @ flat]
        return [rows.mT @ rows, rows[self.reference].T @ rows]

    def covariance(self, a: int, b: int) -> torch.Tensor:
        """``E[(x_a - mean) (x_b - mean)^T]`` of models a and b, ``(n, n)``; zero before the first sample.

        Raises:
            KeyError: for a pair that is not kept.
        """
        n, scale = self.means.shape[-1], max(self.count, 1)
        if self.reference is None:
            return self._products[0][a * n : (a + 1) * n, b * n : (b + 1) * n] / scale
        if a == b:
            return self._products[0][a] / scale
        if self.reference not in (a, b):
            raise KeyError(f"only covariances with model {self.reference} were kept, not of {a} with {b}")
        found = self._products[1][b if a == self.reference else a] / scale
        return found if a == self.reference else found.T

    def variances(self) -> torch.Tensor:
        """The variance of every unit of every model, ``(N, n)``."""
        return torch.stack([self.covariance(m, m).diagonal() for m in range(self.means.shape[0])])

    def joint(self) -> torch.Tensor:
        """The covariances of all pairs, ``(N, n, N, n)``; without a reference only."""
        models, n = self.means.shape
        return (self._products[0] / max(self.count, 1)).reshape(models, n, models, n)
