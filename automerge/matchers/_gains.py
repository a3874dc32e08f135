"""The linear gains of coordinate ascent, renewed only where permutations have changed since they were last asked for.

With ``D = T - X_m`` (what the other models sum to) and Y model m's weights moved along all other axes, a space gains
``G[i, j] = <D at i, Y at j>``, summed over the bundles that it moves. Late in an ascent few units move between two
questions about the same model and tree. Where units of the bundle's other axis have moved, at the positions C, the two
sides have changed at C alone, and G by the difference of two products with an inner dimension of ``|C|``; where units of
other models have moved along the tree's own axis, at the positions R, only the rows R of G have changed. Both are a few
percent of the whole product. What has changed is read off the permutations; nothing but them and G is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from automerge._tensors import contract, take
from automerge.objective import Bundle, Objective

_SMALL = 1 << 24  # multiplications below which nothing is worth keeping
_WORTH = 0.5  # of the whole product: what a renewal may cost at most
_AGE = 16  # renewals after which the whole is computed again, lest rounding errors add up


@dataclass
class _Kept:
    """The gains of one model's spaces in one tree, and the permutations of all models that they belong to."""

    gains: dict[int, torch.Tensor]
    sigma: dict[int, torch.Tensor]
    age: int = 0


@dataclass(frozen=True)
class _Change:
    """What has changed in one bundle: positions along the tree's own axis in other models, along the other axis in any."""

    own: torch.Tensor
    other: torch.Tensor

    def share(self, bundle: Bundle, k: int) -> float:
        """The cost of the renewal, as a share of the whole product."""
        out = self.own.numel() / bundle.weights.shape[bundle.dims[k]]
        if len(bundle.dims) > 1:
            out += 2 * self.other.numel() / bundle.weights.shape[bundle.dims[1 - k]]
        return out


class Gains:
    """The gains of every model and tree, as an ascent asks for them.

    Args:
        objective: the problem; with several processes nothing is kept, as the other models are elsewhere.
        sigma: per space the permutations ``(N, n)``, which the ascent changes in place.
    """

    def __init__(self, objective: Objective, sigma: Sequence[torch.Tensor]) -> None:
        self.objective, self.sigma = objective, sigma
        self._kept: dict[tuple[int, int], _Kept] = {}

    def of(self, m: int, root: int, rest: Mapping[int, torch.Tensor]) -> dict[int, np.ndarray]:
        """The gains of one model's spaces in one tree.

        Args:
            m: the model.
            root: the tree.
            rest: per bundle that the tree moves the sum of the other models' weights, as they are moved now.

        Returns:
            Per space ``(n, n)``: new position, old position. Not to be written to.
        """
        places = self._places(root, rest)
        kept = self._kept.get((m, root))
        if kept is None or kept.age >= _AGE or not self._renew(m, kept, places, rest):
            kept = _Kept(self._whole(m, places, rest), {})
            if self._worth_keeping(places):
                self._kept[m, root] = kept
        if (m, root) in self._kept:
            kept.sigma = {s: self.sigma[s].clone() for b in rest for s in self.objective.bundles[b].spaces}
        return {space: gain.cpu().numpy() for space, gain in kept.gains.items()}

    def _places(self, root: int, rest: Mapping[int, torch.Tensor]) -> list[tuple[int, int]]:
        """The bundles and, by their place in ``dims``, the axes on which the tree acts."""
        spaces = self.objective.blocks.spaces
        return [(b, k) for b in rest for k, s in enumerate(self.objective.bundles[b].spaces) if spaces[s].root == root]

    def _worth_keeping(self, places: Sequence[tuple[int, int]]) -> bool:
        """Whether every bundle has one axis of this tree and at most one more, and the products are large."""
        bundles = [self.objective.bundles[b] for b, _ in places]
        simple = len({b for b, _ in places}) == len(places) and all(len(x.dims) <= 2 for x in bundles)
        cost = sum(self._cost(b, k) for b, k in places)
        return simple and cost >= _SMALL and self.objective.ranks.size == 1

    def _cost(self, b: int, k: int) -> int:
        """The multiplications of one contraction."""
        bundle = self.objective.bundles[b]
        return bundle.weights[0].numel() * bundle.weights.shape[bundle.dims[k]]

    def _whole(
        self, m: int, places: Sequence[tuple[int, int]], rest: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        out: dict[int, torch.Tensor] = {}
        for b, k in places:
            bundle = self.objective.bundles[b]
            part = contract(rest[b][None], self._own(m, b, k), bundle.dims[k])[0]
            space = bundle.spaces[k]
            out[space] = out[space].add_(part) if space in out else self.objective.store.keep(part)
        return out

    def _own(self, m: int, b: int, k: int) -> torch.Tensor:
        """One model's weights moved along all axes but one, ``(1, ...)``."""
        return self.objective.moved(b, [s[m : m + 1] for s in self.sigma], slice(m, m + 1), skip=k)

    # ---------------------------------------------------------------- renewal
    def _renew(self, m: int, kept: _Kept, places: Sequence[tuple[int, int]], rest: Mapping[int, torch.Tensor]) -> bool:
        """Bring kept gains up to date, if that is cheaper than to compute them again."""
        bundles = [self.objective.bundles[b] for b, _ in places]
        changes = [self._change(m, x, k, kept) for x, (_, k) in zip(bundles, places, strict=True)]
        costs = [self._cost(b, k) for b, k in places]
        shares = [c.share(x, k) for c, x, (_, k) in zip(changes, bundles, places, strict=True)]
        if sum(c * s for c, s in zip(costs, shares, strict=True)) > _WORTH * sum(costs):
            return False
        for (b, k), change in zip(places, changes, strict=True):
            self._add_change(m, b, k, change, kept, rest[b])
        kept.age += 1
        return True

    def _change(self, m: int, bundle: Bundle, k: int, kept: _Kept) -> _Change:
        own, *other = (bundle.spaces[k], *(s for i, s in enumerate(bundle.spaces) if i != k))
        moved = self.sigma[own] != kept.sigma[own]
        moved[m] = False
        none = moved.new_zeros(0, dtype=torch.int64)
        elsewhere = (self.sigma[other[0]] != kept.sigma[other[0]]).any(dim=0).nonzero()[:, 0] if other else none
        return _Change(moved.any(dim=0).nonzero()[:, 0], elsewhere)

    def _add_change(self, m: int, b: int, k: int, change: _Change, kept: _Kept, rest: torch.Tensor) -> None:
        bundle = self.objective.bundles[b]
        dim, gain = bundle.dims[k], kept.gains[bundle.spaces[k]]
        others = [i for i in range(self.objective.count) if i != m]
        if change.other.numel():
            along = bundle.dims[1 - k] - 1
            now = take(rest, along, change.other)[None]
            then = reduce(torch.add, (self._piece(i, bundle, k, None, change.other, kept.sigma) for i in others))
            gain += contract(now, self._mine(m, bundle, k, change.other, self.sigma), dim)[0]
            gain -= contract(then[None], self._mine(m, bundle, k, change.other, kept.sigma), dim)[0]
        if change.own.numel():
            rows = take(rest, dim - 1, change.own)
            then = reduce(torch.add, (self._piece(i, bundle, k, change.own, None, kept.sigma) for i in others))
            rows = rows - then
            if change.other.numel():
                rows.index_fill_(bundle.dims[1 - k] - 1, change.other, 0.0)
            gain.index_add_(0, change.own, contract(rows[None], self._own(m, b, k), dim)[0])

    def _mine(
        self,
        m: int,
        bundle: Bundle,
        k: int,
        other: torch.Tensor,
        sigma: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        """Some positions of the other axis of one model's weights, which are not moved along the tree's own."""
        where = sigma[bundle.spaces[1 - k]][m][other]
        return take(bundle.weights[m], bundle.dims[1 - k] - 1, where)[None]

    def _piece(
        self,
        m: int,
        bundle: Bundle,
        k: int,
        own: torch.Tensor | None,
        other: torch.Tensor | None,
        sigma: Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        """One model's weights moved along all axes, at some positions of one of them."""
        out = bundle.weights[m]
        axes = [(k, own), *((1 - k, other) for _ in bundle.dims[1:])]
        for i, positions in sorted(axes, key=lambda axis: axis[1] is None):  # the selection first
            where = sigma[bundle.spaces[i]][m]
            out = take(out, bundle.dims[i] - 1, where if positions is None else where[positions])
        return out
