"""Means and covariances of Gaussian values, and what elementwise functions make of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

# the trapezium rule, which for smooth functions times a Gaussian converges faster than any power of the step
_POINTS = torch.linspace(-10, 10, 401, dtype=torch.float64)
_WEIGHTS = torch.exp(-_POINTS.square() / 2)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of a value's channels.

    Attributes:
        mean: float64, ``(n,)``; one entry if all axes are alike (a network's input).
        covariance: float64, ``(n, n)``.
        axis: the channel axis; None if all axes are alike.
        shape: of the tensor.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    axis: int | None
    shape: tuple[int, ...]

    @property
    def variance(self) -> torch.Tensor:
        """Per channel."""
        return self.covariance.diagonal()

    def over(self, axis: int) -> Gaussian:
        """The same with an axis for its channels, where all axes are alike."""
        axis %= len(self.shape)
        if self.axis is not None:
            return self
        n = self.shape[axis]
        return Gaussian(
            self.mean.expand(n), self.covariance[0, 0] * torch.eye(n, dtype=torch.float64), axis, self.shape
        )

    def affine(self, scale: torch.Tensor, shift: torch.Tensor) -> Gaussian:
        """``scale * x + shift``, per channel or for all."""
        wide = scale.expand_as(self.mean)
        return replace(self, mean=self.mean * scale + shift, covariance=self.covariance * torch.outer(wide, wide))


def nonlinear(value: Gaussian, function: Callable[[torch.Tensor], torch.Tensor], name: str) -> Gaussian:
    """The moments after an elementwise function: exact for ReLU, by quadrature for others.

    Args:
        value: the moments before.
        function: elementwise.
        name: the operator's.
    """
    mean, std = value.mean, value.variance.clamp(min=0).sqrt()
    if name == "relu":
        first, second, slope = relu_moments(mean, std)
    else:
        x = mean[:, None] + std[:, None] * _POINTS
        weights = _WEIGHTS / _WEIGHTS.sum()
        y = function(x)
        first, second = (y * weights).sum(1), (y.square() * weights).sum(1)
        alive = std > 0
        # Stein: E f'(x) = E (x - mean) f(x) / variance
        slope = torch.where(alive, (y * _POINTS * weights).sum(1) / torch.where(alive, std, 1.0), 0.0)
    covariance = value.covariance * torch.outer(slope, slope)
    variance = (second - first.square()).clamp(min=0)
    covariance = covariance + torch.diag(variance - covariance.diagonal())
    return replace(value, mean=first, covariance=covariance)


def relu_moments(mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``E relu(x)``, ``E relu(x)^2`` and the mean slope ``P(x > 0)`` of Gaussian x; exact, also for zero variance."""
    safe = torch.where(std > 0, std, 1.0)
    ratio = mean / safe
    below = torch.special.ndtr(ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    first = mean * below + std * density
    second = (mean.square() + std.square()) * below + mean * std * density
    flat = std <= 0
    positive = mean.clamp(min=0)
    return (
        torch.where(flat, positive, first),
        torch.where(flat, positive.square(), second),
        torch.where(flat, (mean > 0).double(), below),
    )
