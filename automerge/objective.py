"""The universe objective on blocks: value, gradient and segment polynomial in O(N).

With X_m model m's blocks moved to the universe and T their sum,
``f = sum_{l<m} <X_l, X_m> = (|T|^2 - sum_m |X_m|^2) / 2`` and ``df/dX_m = T - X_m`` (C2M3, arXiv 2405.17897, Alg. 1,
rewritten). Blocks that nothing moves add a constant and are left out, and so are normalisation statistics.

Blocks with the same spaces are laid side by side in a `Bundle`, of shape ``(N, n1, pinned)`` or
``(N, n1, pinned, n2, ...)``: the first and the last axis move, so that both gradient contractions are plain matrix
products without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from numpy.polynomial import polynomial as poly

from automerge.blocks import Block, Blocks

Sigmas = Sequence[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Bundle:
    """Blocks with the same spaces, of all models.

    Attributes:
        spaces: the space of each moving axis.
        dims: where those axes stand in ``weights``.
        weights: ``(N, n1, pinned, n2, ...)``.
    """

    spaces: tuple[int, ...]
    dims: tuple[int, ...]
    weights: torch.Tensor

    @property
    def full(self) -> int:
        """The bit set of all moving axes."""
        return (1 << len(self.spaces)) - 1


class Objective:
    """The objective of N models, and what depends only on them.

    Args:
        blocks: the decomposition.
        models: N state dicts, all with the parameters that the blocks name.
        dtype: in which the blocks are held.
        block_weights: "uniform"; or "normalised", which divides every block by its mean squared norm.

    Attributes:
        blocks: the decomposition.
        count: N.
        bundles: the weights.
        device: where they are.
    """

    def __init__(
        self,
        blocks: Blocks,
        models: Sequence[Mapping[str, torch.Tensor]],
        *,
        dtype: torch.dtype = torch.float32,
        block_weights: str = "uniform",
    ) -> None:
        self.blocks = blocks
        self.count = len(models)
        self.dtype = dtype
        groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for block in blocks.blocks:
            spaces, value = _canonical(block, models, dtype)
            if block_weights == "normalised":
                scale = math.sqrt(float(_dot(value, value)) / self.count)
                value = value / scale if scale > 0 else value
            groups.setdefault(spaces, []).append(value)
        self.bundles = [
            Bundle(spaces, _dims(len(spaces)), torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])
            for spaces, parts in sorted(groups.items())
        ]
        self.device = self.bundles[0].weights.device if self.bundles else torch.device("cpu")
        self.touching = {
            s: [b for b, bundle in enumerate(self.bundles) if s in bundle.spaces] for s in self.space_numbers
        }

    @property
    def space_numbers(self) -> range:
        """The numbers of all spaces."""
        return range(len(self.blocks.spaces))

    def identity(self, count: int | None = None) -> list[torch.Tensor]:
        """The identity on every space: one ``(N, n)`` int64 tensor per space."""
        n = self.count if count is None else count
        return [torch.arange(s.size, device=self.device).expand(n, -1).clone() for s in self.blocks.spaces]

    def moved(self, b: int, sigma: Sigmas, models: slice, skip: int | None = None) -> torch.Tensor:
        """Bundle b of some models, moved by permutations along all moving axes but the ``skip``-th.

        Args:
            b: the bundle.
            sigma: per space ``(number of those models, n)``.
            models: which models.
            skip: an axis to leave, by its place in ``dims``.
        """
        bundle = self.bundles[b]
        out = bundle.weights[models]
        for k in reversed(range(len(bundle.dims))):
            if k != skip:
                out = gather(out, bundle.dims[k], sigma[bundle.spaces[k]])
        return out

    def value(self, sigma: Sigmas) -> float:
        """F at a group element of every model; ``sigma`` per space ``(N, n)``, new position -> old position."""
        return math.fsum(universe_value(self.moved(b, sigma, slice(None))) for b in range(len(self.bundles)))

    @property
    def scale(self) -> float:
        """The sum over models of the squared norms: what f is measured against."""
        return math.fsum(float(_dot(b.weights, b.weights)) for b in self.bundles)


def _dims(moving: int) -> tuple[int, ...]:
    return (1, *range(3, 2 + moving))


def _canonical(
    block: Block, models: Sequence[Mapping[str, torch.Tensor]], dtype: torch.dtype
) -> tuple[tuple[int, ...], torch.Tensor]:
    """A block of all models as ``(N, n1, pinned, n2, ...)``, its moving axes sorted by space."""
    moving = sorted((s, k) for k, s in enumerate(block.spaces) if s is not None)
    pinned = [k for k, s in enumerate(block.spaces) if s is None]
    order = [moving[0][1], *pinned, *(k for _, k in moving[1:])]
    sizes = [block.shape[k] for _, k in moving]
    shape = (sizes[0], math.prod(block.shape[k] for k in pinned), *sizes[1:])
    parts = [block.read(model[block.param]).to(dtype).permute(order).reshape(shape) for model in models]
    return tuple(s for s, _ in moving), torch.stack(parts)


def gather(tensor: torch.Tensor, dim: int, sigma: torch.Tensor) -> torch.Tensor:
    """``out[m, .., i, ..] = tensor[m, .., sigma[m, i], ..]`` along ``dim`` (1 or more); ``sigma`` is ``(N, n)``."""
    count, n = sigma.shape
    if dim == 1 and tensor[0, 0].numel() > 1:
        rows = (sigma + n * torch.arange(count, device=sigma.device)[:, None]).reshape(-1)
        return tensor.reshape(count * n, -1).index_select(0, rows).reshape(tensor.shape)
    view = [1] * tensor.ndim
    view[0], view[dim] = count, n
    return tensor.gather(dim, sigma.view(view).expand(tensor.shape))


def act(tensor: torch.Tensor, dim: int, matrix: torch.Tensor) -> torch.Tensor:
    """Along ``dim``: ``out[m, .., i, ..] = sum_j matrix[m, i, j] tensor[m, .., j, ..]``; matrices ``(N, n, n)``."""
    front = tensor.movedim(dim, 1)
    out = torch.bmm(matrix, front.reshape(*front.shape[:2], -1))
    return out.reshape(front.shape).movedim(1, dim).contiguous()


def contract(left: torch.Tensor, right: torch.Tensor, dim: int) -> torch.Tensor:
    """``G[m, i, j] = <left at i, right at j>`` over all axes but ``dim``; ``(N, n, n)``."""
    count, n = left.shape[0], left.shape[dim]
    if dim == left.ndim - 1 and dim != 1:
        return torch.bmm(left.reshape(count, -1, n).mT, right.reshape(count, -1, n))
    if dim != 1:
        left, right = left.movedim(dim, 1), right.movedim(dim, 1)
    return torch.bmm(left.reshape(count, n, -1), right.reshape(count, n, -1).mT)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """The inner product: along the last axis (or a stretch of it) in the tensors' type, then in float64."""
    rows = a.shape[-1] if 16 <= a.shape[-1] <= 4096 else math.gcd(a.numel(), 512)
    if rows < 16:
        return float((a.double() * b.double()).sum())
    return float(torch.linalg.vecdot(a.reshape(-1, rows), b.reshape(-1, rows)).sum(dtype=torch.float64))


def _sum(moved: torch.Tensor) -> torch.Tensor:
    """The sum over models; a view if there is one."""
    return reduce(torch.add, moved.unbind())


def universe_value(moved: torch.Tensor) -> float:
    """``(|sum_m X_m|^2 - sum_m |X_m|^2) / 2`` of one bundle ``(N, ...)``."""
    total = _sum(moved)
    return 0.5 * (_dot(total, total) - _dot(moved, moved))


# -------------------------------------------------------------------- relaxed state
@dataclass(frozen=True, eq=False)
class Segment:
    """The way from an iterate to a vertex, for some models.

    Attributes:
        models: which models move.
        sigma: the vertex, per space ``(models, n)``.
        coefficients: f along the way minus f at its start, float64, by powers of the step.
        parts: per bundle ``(S, U) ->`` the weights moved along S: by the vertex along U, else by the iterate.
    """

    models: slice
    sigma: Sigmas
    coefficients: np.ndarray
    parts: list[dict[tuple[int, int], torch.Tensor]]


class State:
    """An iterate in the convex hull, kept incrementally.

    Per bundle and subset S of its moving axes ``parts`` holds the weights moved along S. Moving on towards a vertex
    needs gathers and sums of what is held; only `gradient` multiplies matrices.

    Args:
        objective: the problem.
        plan: per space the doubly stochastic matrices ``(N, n, n)`` of the iterate.
    """

    def __init__(self, objective: Objective, plan: Sequence[torch.Tensor]) -> None:
        self.objective = objective
        self.plan = list(plan)
        self.parts: list[dict[int, torch.Tensor]] = []
        for bundle in objective.bundles:
            held = {0: bundle.weights}
            for s in range(1, bundle.full + 1):
                k = s.bit_length() - 1
                held[s] = act(held[s & ~(1 << k)], bundle.dims[k], self.plan[bundle.spaces[k]])
            self.parts.append(held)
        self.total: list[torch.Tensor] = []
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
        state = cls.__new__(cls)
        state.objective = objective
        state.plan = []
        for permutation in sigma:
            plan = matrices(permutation, objective.dtype).mul_((1 - shares)[:, None, None])
            state.plan.append(plan.add_(shares[:, None, None] / permutation.shape[1]))
        state.parts = []
        for bundle in objective.bundles:
            held = {0: bundle.weights}
            mix = shares.view(-1, *[1] * (bundle.weights.ndim - 1))
            for s in range(1, bundle.full + 1):
                k = (s & -s).bit_length() - 1
                before = held[s & ~(1 << k)]
                held[s] = gather(before, bundle.dims[k], sigma[bundle.spaces[k]])
                if share > 0:
                    held[s] = held[s].mul_(1 - mix).add_(before.mean(dim=bundle.dims[k], keepdim=True) * mix)
            state.parts.append(held)
        state.refresh()
        return state

    def refresh(self) -> None:
        """Take the sums over models anew."""
        self.total = [_sum(held[b.full]) for b, held in zip(self.objective.bundles, self.parts, strict=True)]

    def value(self) -> float:
        """F at the iterate."""
        moved = (held[b.full] for b, held in zip(self.objective.bundles, self.parts, strict=True))
        return math.fsum(universe_value(x) for x in moved)

    def gradient(self, models: slice = slice(None)) -> list[torch.Tensor]:
        """df/dP for every space of some models: ``(models, n, n)``."""
        count = len(range(*models.indices(self.objective.count)))
        out = [
            torch.zeros(count, s.size, s.size, dtype=self.objective.dtype, device=self.objective.device)
            for s in self.objective.blocks.spaces
        ]
        for bundle, held, total in zip(self.objective.bundles, self.parts, self.total, strict=True):
            rest = total - held[bundle.full][models]
            for k, (space, dim) in enumerate(zip(bundle.spaces, bundle.dims, strict=True)):
                out[space] += contract(rest, held[bundle.full & ~(1 << k)][models], dim)
        return out

    def inner(self, gradient: Sequence[torch.Tensor], sigma: Sigmas, models: slice = slice(None)) -> float:
        """The Frank-Wolfe gap: ``<gradient, vertex - iterate>``."""
        gap = 0.0
        for g, p, s in zip(gradient, self.plan, sigma, strict=True):
            gap += float(g.gather(2, s[:, :, None]).sum(dtype=torch.float64)) - _dot(g, p[models])
        return gap

    def segment(self, sigma: Sigmas, models: slice = slice(None)) -> Segment:
        """F along the segment to a vertex, as a polynomial in the step.

        Args:
            sigma: per space ``(models, n)``.
            models: the models that move; the others stay.
        """
        parts = []
        coefficients = np.zeros(1)
        for bundle, held, total in zip(self.objective.bundles, self.parts, self.total, strict=True):
            mixed = {(s, 0): x[models] for s, x in held.items()}
            for u in range(1, bundle.full + 1):
                k = (u & -u).bit_length() - 1
                for s in _supersets(u, bundle.full):
                    before = mixed[s & ~(1 << k), u & ~(1 << k)]
                    mixed[s, u] = gather(before, bundle.dims[k], sigma[bundle.spaces[k]])
            parts.append(mixed)
            coefficients = poly.polyadd(coefficients, _along(bundle, mixed, total))
        coefficients = np.asarray(coefficients, dtype=np.float64)
        coefficients[0] = 0.0
        return Segment(models, sigma, coefficients, parts)

    def advance(self, segment: Segment, step: float) -> None:
        """Go a step in [0, 1] along a segment, in place."""
        for b, (bundle, held, mixed) in enumerate(zip(self.objective.bundles, self.parts, segment.parts, strict=True)):
            self.total[b] -= _sum(held[bundle.full][segment.models])
            for part in range(1, bundle.full + 1):
                size = part.bit_count()
                if step == 1.0:
                    held[part][segment.models] = mixed[part, part]
                    continue
                new = mixed[part, 0] * (1 - step) ** size
                for u in _subsets(part):
                    new.add_(mixed[part, u], alpha=step ** u.bit_count() * (1 - step) ** (size - u.bit_count()))
                held[part][segment.models] = new
            self.total[b] += _sum(held[bundle.full][segment.models])
        for p, s in zip(self.plan, segment.sigma, strict=True):
            mine = p[segment.models]
            mine.mul_(1 - step)
            mine.scatter_add_(2, s[:, :, None], torch.full_like(s[:, :, None], step, dtype=p.dtype))


def matrices(sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Permutations ``(N, n)`` as matrices ``(N, n, n)`` with ones at ``[m, i, sigma[m, i]]``."""
    out = torch.zeros(*sigma.shape, sigma.shape[1], dtype=dtype, device=sigma.device)
    return out.scatter_(2, sigma[:, :, None], 1.0)


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


def _along(bundle: Bundle, mixed: Mapping[tuple[int, int], torch.Tensor], total: torch.Tensor) -> np.ndarray:
    """One bundle's objective along a segment, by powers of the step (the constant term is not meant)."""
    d = len(bundle.spaces)
    of_size = [
        [mixed[bundle.full, u] for u in range(bundle.full + 1) if u.bit_count() == size] for size in range(d + 1)
    ]
    basis = [poly.polymul([0.0] * j + [1.0], poly.polypow([1.0, -1.0], d - j)) for j in range(d + 1)]
    rest = total - _sum(of_size[0][0])
    out = np.zeros(1)
    for j, parts in enumerate(of_size):
        linear = sum(_dot(rest, x) for part in parts for x in part)
        out = poly.polyadd(out, linear * basis[j])
    if of_size[0][0].shape[0] == 1:
        return out
    terms = [reduce(torch.add, parts) for parts in of_size]
    sums = [_sum(x) for x in terms]
    for j in range(d + 1):
        for k in range(j, d + 1):
            both = _dot(sums[j], sums[k]) - _dot(terms[j], terms[k])
            out = poly.polyadd(out, (0.5 if j == k else 1.0) * both * poly.polymul(basis[j], basis[k]))
    return out
