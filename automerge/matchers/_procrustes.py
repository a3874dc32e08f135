"""Orthogonal Procrustes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from automerge._linear_maps import Matrix
from automerge.matchers._linear import LinearMatcher, polar


@dataclass(frozen=True)
class Procrustes(LinearMatcher):
    """Turn each model's units so that its activations are nearest to the reference's (Schönemann 1966).

    Minimises ``E ||x - T y||^2`` over orthogonal T: the polar factor of the cross-covariance ``S_xy``. Unlike `CCA` it keeps
    all lengths, so strong directions decide; for white activations the two coincide.

    See `LinearMatcher` for what is matched by permutations, for *drift*, and for the options.

    Examples:
        >>> Procrustes(fallback=0.5)  # doctest: +ELLIPSIS
        Procrustes(reference=0, fallback=0.5, ...)
    """

    def solve(self, own: torch.Tensor, other: torch.Tensor, cross: torch.Tensor, nearest: torch.Tensor) -> Matrix:
        """See `LinearMatcher.solve`."""
        turn = polar(cross, nearest)
        return Matrix(turn, turn.T)
