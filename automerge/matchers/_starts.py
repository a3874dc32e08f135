"""Where matchers start: points of the convex hull, and vertices that cost one oracle call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from automerge._oracle import maximise
from automerge._tree import Perms
from automerge.objective import Objective


def vertex(objective: Objective, gains: Sequence[torch.Tensor | np.ndarray]) -> tuple[list[np.ndarray], Perms]:
    """The group element of one model with the largest gain.

    Args:
        objective: the problem.
        gains: per space ``(n, n)``, new position by old position.

    Returns:
        The permutation of every space, and the element itself.
    """
    blocks = objective.blocks
    perms: Perms = {}
    arrays = [g.detach().cpu().numpy() if isinstance(g, torch.Tensor) else g for g in gains]
    for root in blocks.structure.roots:
        mine = {s.roles: g for s, g in zip(blocks.spaces, arrays, strict=True) if s.root == root}
        perms.update(maximise(blocks.structure, root, mine)[1])
    return blocks.induced(perms), perms


def vertices(objective: Objective, gains: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Perms]]:
    """`vertex` for several models: per space ``(models, n)`` and the elements."""
    host = [g.detach().cpu().numpy() for g in gains]
    found = [vertex(objective, [g[m] for g in host]) for m in range(host[0].shape[0])] if host else []
    columns = zip(*(sigma for sigma, _ in found), strict=True)
    return [torch.from_numpy(np.stack(c)).to(objective.device) for c in columns], [perms for _, perms in found]


def identity_elements(objective: Objective) -> list[Perms]:
    """The identity of every model."""
    structure = objective.blocks.structure
    one = {r: p for root in structure.roots for r, p in structure.identity(root).items()}
    return [{r: p.copy() for r, p in one.items()} for _ in range(objective.count)]


def induced(objective: Objective, elements: Sequence[Perms]) -> list[torch.Tensor]:
    """The permutations of every space, ``(N, n)``, of one element per model."""
    rows = [objective.blocks.induced(perms) for perms in elements]
    return [torch.from_numpy(np.stack(c)).to(objective.device) for c in zip(*rows, strict=True)]


def signature(objective: Objective, reference: int = 0) -> tuple[list[torch.Tensor], list[Perms]]:
    """Match every model to a reference by what does not depend on the order of any other space.

    Along every axis the entries of each position are sorted over all other moving axes; positions are then assigned by
    the inner products of these signatures. The sum is a bound on what any element can reach, and for copies of one
    network with distinct entries the planted element attains it (Cauchy-Schwarz), so that it is found exactly.
    """
    gains = [
        torch.zeros(objective.count, s.size, s.size, dtype=objective.dtype, device=objective.device)
        for s in objective.blocks.spaces
    ]
    for bundle in objective.bundles:
        for space, dim in zip(bundle.spaces, bundle.dims, strict=True):
            front = bundle.weights.movedim(dim, 1)
            value = _sorted(front, [_place(k, dim) for k in bundle.dims if k != dim])
            flat = value.reshape(*value.shape[:2], -1)
            for m in range(objective.count):
                gains[space][m] += flat[reference] @ flat[m].T
    return vertices(objective, gains)


def _place(k: int, dim: int) -> int:
    """Where axis k stands after ``movedim(dim, 1)``."""
    return k + 1 if k < dim else k


def _sorted(front: torch.Tensor, moving: Sequence[int]) -> torch.Tensor:
    if not moving:
        return front
    rest = [k for k in range(2, front.ndim) if k not in moving]
    value = front.permute(0, 1, *rest, *moving).flatten(2 + len(rest))
    if value.device.type != "cpu":
        return value.sort(dim=-1).values
    return torch.from_numpy(np.sort(value.numpy(), axis=-1))


def barycentre(objective: Objective) -> list[torch.Tensor]:
    """The mean of the whole group: every entry of an ``(n, n)`` matrix is 1/n."""
    return [
        torch.full((objective.count, s.size, s.size), 1.0 / s.size, dtype=objective.dtype, device=objective.device)
        for s in objective.blocks.spaces
    ]


def random_plan(objective: Objective, rng: np.random.Generator, sweeps: int = 20) -> list[torch.Tensor]:
    """A random point of the hull: Sinkhorn-normalised noise on plain trees, a mean of random elements on nested ones."""
    out = [torch.empty_like(p) for p in barycentre(objective)]
    structure = objective.blocks.structure
    for m in range(objective.count):
        for root in structure.roots:
            mine = [k for k, s in enumerate(objective.blocks.spaces) if s.root == root]
            if len(structure.descendants(root)) == 1:
                for k in mine:
                    out[k][m] = torch.from_numpy(_sinkhorn(rng, objective.blocks.spaces[k].size, sweeps)).to(out[k])
                continue
            draws = [structure.random(root, rng) for _ in range(16)]
            for k in mine:
                space = objective.blocks.spaces[k]
                sigma = [structure.induced(d, space.roles) for d in draws]
                mean = sum(np.eye(space.size)[s] for s in sigma) / len(sigma)
                out[k][m] = torch.from_numpy(0.5 * mean + 0.5 / space.size).to(out[k])
    return out


def _sinkhorn(rng: np.random.Generator, n: int, sweeps: int) -> np.ndarray:
    matrix = rng.random((n, n))
    for _ in range(sweeps):
        matrix /= matrix.sum(axis=1, keepdims=True)
        matrix /= matrix.sum(axis=0, keepdims=True)
    return matrix
