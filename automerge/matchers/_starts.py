"""Where matchers start: points of the convex hull, and vertices that cost one oracle call."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from automerge._oracle import maximise
from automerge._tree import Perms
from automerge.objective import Objective

_THREADED = 256


def vertices(objective: Objective, gains: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Perms]]:
    """For each of several models the group element with the largest gain.

    Trees are independent problems; large ones are solved in as many threads as torch uses (scipy's solver lets go of
    the interpreter's lock).

    Args:
        objective: the problem.
        gains: per space ``(models, n, n)``: model, new position, old position.

    Returns:
        Per space the permutations ``(models, n)``, and the elements themselves.
    """
    if not gains:
        return [], []
    blocks = objective.blocks
    host = [g.detach().cpu().numpy() for g in gains]
    places = [(m, root) for m in range(host[0].shape[0]) for root in blocks.structure.roots]

    def solve(place: tuple[int, int]) -> Perms:
        m, root = place
        mine = {s.roles: g[m] for s, g in zip(blocks.spaces, host, strict=True) if s.root == root}
        return maximise(blocks.structure, root, mine)[1]

    workers = torch.get_num_threads()
    if workers > 1 and len(places) > 1 and max(g.shape[1] for g in host) >= _THREADED:
        with ThreadPoolExecutor(workers) as pool:
            solved = list(pool.map(solve, places))
    else:
        solved = [solve(place) for place in places]
    elements: list[Perms] = [{} for _ in range(host[0].shape[0])]
    for (m, _), perms in zip(places, solved, strict=True):
        elements[m].update(perms)
    return induced(objective, elements), elements


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
    the distances of these signatures. For copies of one network with distinct entries the planted element has distance
    zero and no other has, so that it is found exactly.
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
            flat = flat - flat[reference].mean(dim=0)
            squares = 0.5 * flat.square().sum(dim=2)
            for m in range(objective.count):
                gains[space][m] += flat[reference] @ flat[m].T - squares[reference][:, None] - squares[m][None]
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
    """A random point of the hull: Sinkhorn-normalised noise on plain trees, a mean of elements on nested ones."""
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
