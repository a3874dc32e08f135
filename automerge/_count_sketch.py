"""Inner products of activations of wide layers, in memory and time that grow with the width and not with its square.

The rows of a matrix (samples) are added into a few buckets under random signs: the count sketch of Charikar, Chen and
Farach-Colton (2002), as an embedding by Clarkson and Woodruff (STOC 2013, arXiv 1207.6365). Inner products of columns
(units) keep their expectation, and deviate by about the columns' norms over the square root of the number of buckets. All
models' samples go to the same buckets under the same signs, so that products between models are kept alike, and a unit's
sketch does not depend on where the unit stands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class CountSketch:
    """Streaming means, variances and sketched (cross-)covariances of N models' activations, float64.

    Up to ``buckets`` samples each have a bucket of their own, and everything is exact. Memory is ``N n`` numbers for each
    bucket that is used.

    Args:
        buckets: how many.
        seed: of the buckets and signs.

    Attributes:
        count: how many samples there were.
        means: ``(N, n)``.

    Examples:
        >>> m = CountSketch(buckets=4)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 5.0]])
        >>> for part in x.split([1, 2]):
        ...     m.update([part.double(), 2 * part.double()])
        >>> torch.allclose(m.covariance(0, 1), 2 * torch.cov(x.T, correction=0).double())
        True
    """

    def __init__(self, buckets: int, seed: int = 0) -> None:
        self.buckets, self.seed = buckets, seed
        self.count = 0
        self._shift = torch.zeros(())
        self._sums = torch.zeros(())
        self._squares = torch.zeros(())
        self._sketch = torch.zeros(())
        self._signs = torch.zeros(())

    def update(self, rows: Sequence[torch.Tensor]) -> None:
        """Add ``(samples, n)`` activations of every model, the same samples in the same order."""
        stacked = torch.stack([r.double() for r in rows])
        models, size, n = stacked.shape
        if not size:
            return
        if not self.count:
            self._shift = stacked.mean(1)  # near the mean, so that little is lost when that is taken off in the end
            self._sums, self._squares = torch.zeros_like(self._shift), torch.zeros_like(self._shift)
            self._sketch = stacked.new_zeros(models, self.buckets, n)
            self._signs = stacked.new_zeros(self.buckets)
        stacked -= self._shift[:, None]
        self._sums += stacked.sum(1)
        self._squares += stacked.square().sum(1)
        at, signs = (x.to(stacked.device) for x in self._draws(size))
        self._sketch.index_add_(1, at, stacked.mul_(signs[:, None]))
        self._signs.index_add_(0, at, signs)
        self.count += size

    def _draws(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The buckets and signs of the next samples: every bucket once before the next time, in random order but the first."""
        first, last = self.count // self.buckets, (self.count + size - 1) // self.buckets
        at, signs = [], []
        for turn in range(first, last + 1):
            generator = torch.Generator().manual_seed(hash((self.seed, turn)) % 2**63)
            order = torch.randperm(self.buckets, generator=generator)
            at.append(order if turn else torch.arange(self.buckets))  # memory is taken as buckets are reached
            signs.append(torch.randint(2, (self.buckets,), generator=generator).double() * 2 - 1)
        mine = slice(self.count - first * self.buckets, self.count - first * self.buckets + size)
        return torch.cat(at)[mine], torch.cat(signs)[mine]

    @property
    def means(self) -> torch.Tensor:
        """The mean of every unit of every model."""
        return self._shift + self._sums / max(self.count, 1)

    def variances(self) -> torch.Tensor:
        """The variance of every unit of every model ``(N, n)``, exact."""
        size = max(self.count, 1)
        return (self._squares / size - (self._sums / size).square()).clamp(min=0)

    def root(self, *, centred: bool) -> torch.Tensor:
        """``F`` of shape ``(N, n, used buckets)``: ``F_l F_m^T`` estimates the covariances, or the mean products."""
        size, used = max(self.count, 1), min(self.count, self.buckets)
        off = -self._sums / size if centred else self._shift
        return (self._sketch[:, :used] + off[:, None] * self._signs[None, :used, None]).mT / size**0.5

    def covariance(self, a: int, b: int) -> torch.Tensor:
        """``E[(x_a - mean) (x_b - mean)^T]`` of models a and b, ``(n, n)``, estimated."""
        root = self.root(centred=True)
        return root[a] @ root[b].T
