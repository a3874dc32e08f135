"""An iterate of Frank-Wolfe in the convex hull of the group, kept incrementally.

Per bundle and subset S of its moving axes the weights moved along S are held. A vertex is a permutation, so that a step
towards one needs gathers and sums of what is held; the gradient is the only place where matrices are multiplied. When one
model moves, what its step gains is linear in its moved weights: most of the polynomial then follows from the inner
products of the gradient with the iterate and with the vertex, which are known already.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, reduce

import numpy as np
import torch
from numpy.polynomial import polynomial as poly

from automerge._ranks import ALONE, Ranks
from automerge._tensors import act, add_contraction, add_up, dot, gather, gather_one, matrices, quick_dot
from automerge.objective import Bundle, Objective, Sigmas


@dataclass(frozen=True, eq=False)
class Segment:
    """The way from an iterate to a vertex, for some models.

    Attributes:
        models: which models move.
        sigma: the vertex, per space ``(models, n)``.
        coefficients: f along the way minus f at its start, float64, by powers of the step.
        parts: if several models move, per bundle ``(S, U) ->`` the weights moved along S: by the vertex along U, else by
            the iterate.
        together: whether the models of all processes move.
    """

    models: slice
    sigma: Sigmas
    coefficients: np.ndarray
    parts: list[dict[tuple[int, int], torch.Tensor]] = field(default_factory=list)
    together: bool = False


class State:
    """An iterate, and what is held of it.

    Args:
        objective: the problem.
        plan: per space the doubly stochastic matrices ``(N, n, n)`` of the iterate.

    Attributes:
        plan: the same.
        parts: per bundle S -> the weights moved along S, ``(N, ...)``.
        total: per bundle the sum over models of the weights moved along all axes.
    """

    def __init__(self, objective: Objective, plan: Sequence[torch.Tensor]) -> None:
        parts = []
        for bundle in objective.bundles:
            held = {0: bundle.weights}
            for s in range(1, bundle.full + 1):
                k = s.bit_length() - 1
                held[s] = objective.store.keep(act(held[s & ~(1 << k)], bundle.dims[k], plan[bundle.spaces[k]]))
            parts.append(held)
        self._hold(objective, list(plan), parts)

    def _hold(self, objective: Objective, plan: list[torch.Tensor], parts: list[dict[int, torch.Tensor]]) -> None:
        self.objective, self.plan, self.parts = objective, plan, parts
        self.total: list[torch.Tensor] = []
        self._rest = [b.weights.new_empty(0) for b in objective.bundles]
        self._ahead = [b.weights.new_empty(0) for b in objective.bundles]
        self._buffers: list[torch.Tensor] = []
        self._rest_of = -1
        self.refresh()

    @classmethod
    def at(cls, objective: Objective, sigma: Sigmas) -> State:
        """The state at a vertex, per space ``(N, n)``; exact, by gathers."""
        return cls.soft(objective, sigma, 0.0)

    @classmethod
    def soft(cls, objective: Objective, sigma: Sigmas, share: float, fixed: Iterable[int] = ()) -> State:
        """The state that is a vertex plus a ``share`` of the group's mean, by gathers and means.

        Args:
            objective: the problem.
            sigma: the vertex, per space ``(N, n)``.
            share: of the mean, in [0, 1].
            fixed: models that stand at their vertex, without a share.
        """
        shares = torch.full((objective.count,), share, dtype=objective.dtype, device=objective.device)
        shares[list(fixed)] = 0.0
        plan = []
        for permutation in sigma:
            matrix = matrices(permutation, objective.dtype).mul_((1 - shares)[:, None, None])
            plan.append(objective.store.keep(matrix.add_(shares[:, None, None] / permutation.shape[1])))
        parts = []
        for bundle in objective.bundles:
            held = {0: bundle.weights}
            mix = shares.view(-1, *[1] * (bundle.weights.ndim - 1))
            for s in range(1, bundle.full + 1):
                k = (s & -s).bit_length() - 1
                before = held[s & ~(1 << k)]
                held[s] = gather(before, bundle.dims[k], sigma[bundle.spaces[k]])
                if share > 0:
                    held[s] = held[s].mul_(1 - mix).add_(before.mean(dim=bundle.dims[k], keepdim=True) * mix)
                held[s] = objective.store.keep(held[s])
            parts.append(held)
        state = cls.__new__(cls)
        state._hold(objective, plan, parts)
        return state

    def refresh(self) -> None:
        """Take the sums over models anew."""
        ranks = self.objective.ranks
        self.total = [
            self.objective.store.keep(ranks.sum(add_up(held[b.full]).clone()))
            for b, held in zip(self.objective.bundles, self.parts, strict=True)
        ]
        self._rest_of = -1

    def value(self) -> float:
        """F at the iterate."""
        return self.objective.value_of(held[b.full] for b, held in zip(self.objective.bundles, self.parts, strict=True))

    def receive(self, owner: int) -> None:
        """Take over the sums over models from the process whose model has moved."""
        for total in self.total:
            self.objective.ranks.broadcast(total, owner)
        self._rest_of = -1

    # ---------------------------------------------------------------- gradient
    def gradient(self, models: slice = slice(None)) -> list[torch.Tensor]:
        """df/dP for every space of some models: ``(models, n, n)``."""
        chosen = self._chosen(models)
        objective = self.objective
        out = [objective.empty(len(chosen), s.size, s.size).zero_() for s in objective.blocks.spaces]
        if len(chosen) == 1:
            self._take_rest(chosen[0])
        for b, (bundle, held) in enumerate(zip(objective.bundles, self.parts, strict=True)):
            rest = self._rest[b] if len(chosen) == 1 else self.total[b] - held[bundle.full][models]
            for k, (space, dim) in enumerate(zip(bundle.spaces, bundle.dims, strict=True)):
                add_contraction(out[space], rest, held[bundle.full & ~(1 << k)][models], dim)
        return out

    def ends(self, gradient: Sequence[torch.Tensor], sigma: Sigmas, models: slice = slice(None)) -> tuple[float, float]:
        """The gradient's inner products with the iterate and with a vertex; their difference is the Frank-Wolfe gap."""
        here = math.fsum(dot(g, p[models]) for g, p in zip(gradient, self.plan, strict=True))
        there = math.fsum(
            float(g.gather(2, s[:, :, None]).sum(dtype=torch.float64)) for g, s in zip(gradient, sigma, strict=True)
        )
        return here, there

    # ---------------------------------------------------------------- line search
    def segment(
        self,
        sigma: Sigmas,
        models: slice = slice(None),
        ends: tuple[float, float] | None = None,
        together: bool = False,
    ) -> Segment:
        """F along the segment to a vertex, as a polynomial in the step.

        Args:
            sigma: per space ``(models, n)``.
            models: the models that move; the others stay.
            ends: what `ends` gave for the gradient here; saves work if one model moves.
            together: the models of all processes move, by one step.
        """
        chosen = self._chosen(models)
        if not together and len(chosen) == 1:
            return Segment(models, sigma, self._one(sigma, chosen[0], ends))
        parts = []
        coefficients = np.zeros(1)
        for bundle, held, total in zip(self.objective.bundles, self.parts, self.total, strict=True):
            mixed = {(s, 0): x[models] for s, x in held.items()}
            for u in range(1, bundle.full + 1):
                k = (u & -u).bit_length() - 1
                for s in _supersets(u, bundle.full):
                    before = mixed[s & ~(1 << k), u & ~(1 << k)]
                    mixed[s, u] = self.objective.store.keep(gather(before, bundle.dims[k], sigma[bundle.spaces[k]]))
            parts.append(mixed)
            coefficients = poly.polyadd(
                coefficients, _along(bundle, mixed, total, self.objective.ranks if together else ALONE)
            )
        coefficients = np.asarray(coefficients, dtype=np.float64)
        coefficients[0] = 0.0
        return Segment(models, sigma, coefficients, parts, together)

    def _one(self, sigma: Sigmas, m: int, ends: tuple[float, float] | None) -> np.ndarray:
        """The polynomial if one model moves.

        With d axes f is ``sum_j c_j t^j (1 - t)^(d - j)`` plus a constant, and c_j the sum over the sets U of j axes of
        ``<T - X_m, X_m moved by the vertex along U>``. The gradient's inner product with the iterate is the sum over
        bundles of ``d c_0``, that with the vertex the sum of ``c_1``: both are taken for all bundles with two axes
        (nearly all the weights) together.
        """
        self._take_rest(m)
        sums: dict[int, np.ndarray] = {}
        for b, bundle in enumerate(self.objective.bundles):
            d = len(bundle.spaces)
            own = sums.setdefault(d, np.zeros(d + 1))
            self._look_ahead(b, sigma, m)
            for j in range(2 if d == 2 and ends is not None else 0, d + 1):
                own[j] += math.fsum(
                    quick_dot(self._rest[b], self._vertex_along(b, sum(u), sigma, m))
                    for u in itertools.combinations([1 << k for k in range(d)], j)
                )
        if ends is not None and 2 in sums:
            sums[2][0] = (ends[0] - sum(d * c[0] for d, c in sums.items() if d != 2)) / 2
            sums[2][1] = ends[1] - sum(c[1] for d, c in sums.items() if d != 2)
        out = np.zeros(1)
        for d, c in sums.items():
            out = poly.polyadd(out, sum(value * base for value, base in zip(c, _basis(d), strict=True)))
        out[0] = 0.0
        return np.asarray(out)

    def _look_ahead(self, b: int, sigma: Sigmas, m: int) -> None:
        """Keep one model's weights moved by the vertex along the last axis."""
        bundle = self.objective.bundles[b]
        if self._ahead[b].numel() == 0:
            self._ahead[b] = self.objective.empty(*bundle.weights[:1].shape)
        gather_one(bundle.weights[m : m + 1], bundle.dims[-1], sigma[bundle.spaces[-1]], self._ahead[b])

    def _vertex_along(self, b: int, u: int, sigma: Sigmas, m: int) -> torch.Tensor:
        """One model's weights moved along all axes: by the vertex along U, else by the iterate."""
        bundle = self.objective.bundles[b]
        last = 1 << (len(bundle.spaces) - 1)
        value = self.parts[b][bundle.full & ~u][m : m + 1]
        if u == bundle.full:
            value, u = self._ahead[b], u & ~last
        for i, k in enumerate(k for k in reversed(range(len(bundle.spaces))) if u >> k & 1):
            value = gather_one(value, bundle.dims[k], sigma[bundle.spaces[k]], self._scratch(b, i % 2))
        return value

    # ---------------------------------------------------------------- step
    def advance(self, segment: Segment, step: float) -> None:
        """Go a step in [0, 1] along a segment, in place."""
        chosen = self._chosen(segment.models)
        alone = not segment.parts and len(chosen) == 1
        for b in range(len(self.objective.bundles)):
            if alone:
                self._advance_one(b, segment.sigma, chosen[0], step)
            else:
                self._advance_many(b, segment, step)
        self._rest_of = -1
        for p, s in zip(self.plan, segment.sigma, strict=True):
            mine = p[segment.models]
            if step == 1.0:
                mine.zero_()
            else:
                mine.mul_(1 - step)
            mine.scatter_add_(2, s[:, :, None], torch.full_like(s[:, :, None], step, dtype=p.dtype))

    def _advance_one(self, b: int, sigma: Sigmas, m: int, step: float) -> None:
        """Move one model along one axis after the other, the last one first: ``(1 - step) * old + step * gathered``."""
        bundle, held = self.objective.bundles[b], self.parts[b]
        last = len(bundle.spaces) - 1
        for k in reversed(range(last + 1)):
            for s in (s for s in range(1, bundle.full + 1) if s >> k & 1):
                target = held[s][m : m + 1]
                source = held[s & ~(1 << k)][m : m + 1]
                if s == 1 << last:
                    moved = self._ahead[b]
                else:
                    into = target if step == 1.0 else self._scratch(b, 0)
                    moved = gather_one(source, bundle.dims[k], sigma[bundle.spaces[k]], into)
                if step < 1.0:
                    target.lerp_(moved, step)
                elif moved is not target:
                    target.copy_(moved)
        torch.add(self._rest[b][0], held[bundle.full][m], out=self.total[b])

    def _advance_many(self, b: int, segment: Segment, step: float) -> None:
        bundle, held, mixed = self.objective.bundles[b], self.parts[b], segment.parts[b]
        ranks = self.objective.ranks if segment.together else ALONE
        self.total[b] -= ranks.sum(add_up(held[bundle.full][segment.models]).clone())
        for part in range(1, bundle.full + 1):
            size = part.bit_count()
            if step == 1.0:
                held[part][segment.models] = mixed[part, part]
                continue
            new = mixed[part, 0] * (1 - step) ** size
            for u in _subsets(part):
                new.add_(mixed[part, u], alpha=step ** u.bit_count() * (1 - step) ** (size - u.bit_count()))
            held[part][segment.models] = new
        self.total[b] += ranks.sum(add_up(held[bundle.full][segment.models]).clone())

    # ---------------------------------------------------------------- helpers
    def _chosen(self, models: slice) -> range:
        return range(*models.indices(self.objective.count))

    def _scratch(self, b: int, which: int) -> torch.Tensor:
        """One of two pieces of memory of the shape of one model's bundle."""
        weights = self.objective.bundles[b].weights
        if not self._buffers:
            size = max(bundle.weights[0].numel() for bundle in self.objective.bundles)
            self._buffers = [weights.new_empty(size) for _ in range(2)]
        return self._buffers[which][: weights[0].numel()].view(1, *weights.shape[1:])

    def _take_rest(self, m: int) -> None:
        """Keep ``T - X_m`` for one model, in memory that is used again and again."""
        if self._rest_of == m:
            return
        for b, (bundle, held) in enumerate(zip(self.objective.bundles, self.parts, strict=True)):
            if self._rest[b].numel() == 0:
                self._rest[b] = self.objective.empty(*bundle.weights[:1].shape)
            torch.sub(self.total[b], held[bundle.full][m], out=self._rest[b][0])
        self._rest_of = m


def _subsets(s: int) -> Iterator[int]:
    """The non-empty subsets of a bit set."""
    u = s
    while u:
        yield u
        u = (u - 1) & s


def _supersets(u: int, full: int) -> Iterator[int]:
    rest = full & ~u
    yield u
    yield from (u | extra for extra in _subsets(rest))


@cache
def _basis(d: int) -> list[np.ndarray]:
    """``t^j (1 - t)^(d - j)`` for j = 0..d, by powers of t."""
    return [np.asarray(poly.polymul([0.0] * j + [1.0], poly.polypow([1.0, -1.0], d - j))) for j in range(d + 1)]


def _along(
    bundle: Bundle, mixed: Mapping[tuple[int, int], torch.Tensor], total: torch.Tensor, ranks: Ranks
) -> np.ndarray:
    """One bundle's objective along a segment of several models, by powers of the step (the constant is not meant)."""
    d = len(bundle.spaces)
    of_size = [
        [mixed[bundle.full, u] for u in range(bundle.full + 1) if u.bit_count() == size] for size in range(d + 1)
    ]
    basis = _basis(d)
    rest = total - ranks.sum(add_up(of_size[0][0]).clone())
    terms = [reduce(torch.add, parts) for parts in of_size]
    sums = [ranks.sum(add_up(x).clone()) for x in terms]
    pairs = [(j, k) for j in range(d + 1) for k in range(j, d + 1)]
    own = ranks.add(*(dot(terms[j], terms[k]) for j, k in pairs))
    out: np.ndarray = np.zeros(1)
    for j, x in enumerate(sums):
        out = poly.polyadd(out, dot(rest, x) * basis[j])
    for (j, k), mine in zip(pairs, own, strict=True):
        both = dot(sums[j], sums[k]) - mine
        out = poly.polyadd(out, (0.5 if j == k else 1.0) * both * poly.polymul(basis[j], basis[k]))
    return out
