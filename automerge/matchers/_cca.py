"""CCA Merge."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch

from automerge._errors import MatchingError
from automerge._linear_maps import Matrix
from automerge.matchers._linear import LinearMatcher, polar

_FLOOR = 1e-13  # of the mean variance: without a ridge a direction without variance still has an inverse


@dataclass(frozen=True)
class CCA(LinearMatcher):
    """Align the directions that correlate most: CCA Merge (Horoi et al., ICML 2024, arXiv 2407.05385, section 4).

    With the reference's activations x and a model's y at a group, ``U S V^T`` the singular value decomposition of the
    whitened cross-covariance ``S_xx^-1/2 S_xy S_yy^-1/2``, the model's units become ``T y`` with
    ``T = S_xx^1/2 U V^T S_yy^-1/2``: its producers are multiplied by T, its consumers by the inverse, which is known in
    closed form. T has the reference's covariance: ``T S_yy T^T = S_xx``.

    See `LinearMatcher` for what is matched by permutations, for *drift*, and for ``reference``, ``fallback``,
    ``permutations`` and ``mask``.

    Attributes:
        ridge: added to every covariance's diagonal, relative to its mean: ``ridge * trace / n``. The default is measured: on
            digits MLPs 0.03 and 0.1 merge best, and drift falls as the ridge grows; use 0 for linear networks.

    Examples:
        >>> from automerge import infer
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)).double()
        >>> x = torch.randn(50, 6, dtype=torch.float64)
        >>> s = infer(net, x)
        >>> turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
        >>> a = net.state_dict()
        >>> b = {**a, "0.weight": turn @ a["0.weight"], "0.bias": turn @ a["0.bias"], "1.weight": a["1.weight"] @ turn.T}
        >>> found = CCA(ridge=0).match([net, b], s, data=x)
        >>> moved = s.apply(b, found.between(1, 0))
        >>> all(torch.allclose(moved[n], a[n]) for n in a)
        True
    """

    ridge: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.ridge, Real) or not self.ridge >= 0:
            raise MatchingError(f"CCA(ridge={self.ridge!r}): expected a number of at least 0")
        super().__post_init__()

    def solve(self, own: torch.Tensor, other: torch.Tensor, cross: torch.Tensor, nearest: torch.Tensor) -> Matrix:
        """See `LinearMatcher.solve`."""
        x_root, x_inverse = self._roots(own)
        y_root, y_inverse = self._roots(other)
        turn = polar(x_inverse @ cross @ y_inverse, nearest)
        return Matrix(x_root @ turn @ y_inverse, y_root @ turn.T @ x_inverse)

    def _roots(self, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The ridged covariance's square root and inverse square root; directions without variance get the smallest."""
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        mean = values.clamp(min=0).mean()
        floor = _FLOOR * (mean if mean > 0 else torch.ones_like(mean))
        values = values.clamp(min=0) + self.ridge * mean + floor
        root = values.sqrt()
        return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
