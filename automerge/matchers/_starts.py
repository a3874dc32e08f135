"""Where matchers start: points of the convex hull, and vertices that cost one oracle call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from automerge._errors import MatchingError
from automerge._machine import in_threads
from automerge._oracle import maximise
from automerge._tree import Path, Perms
from automerge.blocks import Blocks
from automerge.groups import Element
from automerge.objective import Objective
from automerge.symmetry import Symmetry

THREADED = 256  # units from which an assignment is worth a thread


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

    solved = in_threads(solve, places, max(g.shape[1] for g in host) >= THREADED)
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
    if not elements:
        return [torch.zeros(0, s.size, dtype=torch.int64, device=objective.device) for s in objective.blocks.spaces]
    rows = [objective.blocks.induced(perms) for perms in elements]
    return [torch.from_numpy(np.stack(c)).to(objective.device) for c in zip(*rows, strict=True)]


def from_element(blocks: Blocks, symmetry: Symmetry, element: Element, label: str) -> Perms:
    """The element of the trees that a group element of the whole symmetry is made of.

    Along one axis of a block that a space moves every entry is numbered by its position; moving the numbers shows where
    each position comes from.

    Args:
        blocks: the decomposition of the symmetry.
        symmetry: the same.
        element: of the symmetry.
        label: how an error names its owner.

    Raises:
        MatchingError: if the symmetry's trees do not make this element.
    """
    gains: dict[int, dict[Path, np.ndarray]] = {}
    stacked = symmetry.together(element)
    for number, space in enumerate(blocks.spaces):
        block = min((b for b in blocks.blocks if number in b.spaces), key=lambda b: math.prod(b.shape))
        axis = block.spaces.index(number)
        view = [1] * len(block.shape)
        view[axis] = space.size
        tensor = torch.zeros(symmetry.stacked.shapes[block.param], dtype=torch.int64)
        block.write(tensor, torch.arange(1, space.size + 1).view(view).expand(block.shape))
        old = block.read(stacked.apply_to(block.param, tensor)).movedim(axis, 0).reshape(space.size, -1)
        gain = np.zeros((space.size, space.size))
        gain[np.arange(space.size), np.maximum(old.max(dim=1).values.numpy() - 1, 0)] = 1.0
        gains.setdefault(space.root, {})[space.roles] = gain
    out: Perms = {}
    for root in blocks.structure.roots:
        out.update(maximise(blocks.structure, root, gains.get(root, {}))[1])
    if blocks.structure.element(symmetry, out) != element:
        raise MatchingError(f"the map of {label} is no element of this symmetry's group; match again")
    return out


def signature(objective: Objective, reference: int = 0) -> tuple[list[torch.Tensor], list[Perms]]:
    """Match every model to a reference by what does not depend on the order of any other space.

    Along every axis the entries of each position are sorted over all other moving axes; positions are then assigned by
    the distances of these signatures. For copies of one network with distinct entries the planted element has distance
    zero and no other has, so that it is found exactly.

    Args:
        objective: the problem.
        reference: the model's number among those of all processes.
    """
    gains = [objective.empty(objective.count, s.size, s.size).zero_() for s in objective.blocks.spaces]
    itself = reference - objective.mine.start
    if 0 <= itself < objective.count:
        for gain in gains:
            gain[itself].fill_diagonal_(1.0)
    others = [m for m in range(objective.count) if m != itself]
    for bundle in objective.bundles:
        for space, dim in zip(bundle.spaces, bundle.dims, strict=True):
            front = bundle.weights.movedim(dim, 1)
            value = _sorted(front, [_place(k, dim) for k in bundle.dims if k != dim])
            flat = value.reshape(*value.shape[:2], -1)
            first = objective.one(flat, reference)
            middle = first.mean(dim=0)
            first = first - middle
            square = 0.5 * first.square().sum(dim=1)
            for m in others:
                own = flat[m] - middle
                gains[space][m].addmm_(first, own.T).sub_(square[:, None])
                gains[space][m].sub_(own.square_().sum(dim=1), alpha=0.5)
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
    array, large = value.numpy(), value.shape[-2:].numel() >= THREADED**2
    return torch.from_numpy(np.stack(in_threads(np.sort, list(array), large)))


def barycentre(objective: Objective) -> list[torch.Tensor]:
    """The mean of the whole group: every entry of an ``(n, n)`` matrix is 1/n."""
    return [objective.empty(objective.count, s.size, s.size).fill_(1.0 / s.size) for s in objective.blocks.spaces]


def random_plan(objective: Objective, rng: np.random.Generator, sweeps: int = 20) -> list[torch.Tensor]:
    """A random point of the hull: Sinkhorn-normalised noise on plain trees, a mean of elements on nested ones."""
    out = barycentre(objective)
    structure = objective.blocks.structure
    for number in range(objective.world):  # every process draws for all models, and keeps its own
        m = number - objective.mine.start
        kept = number in objective.mine
        for root in structure.roots:
            mine = [k for k, s in enumerate(objective.blocks.spaces) if s.root == root]
            if len(structure.descendants(root)) == 1:
                for k in mine:
                    noise = rng.random((objective.blocks.spaces[k].size,) * 2)
                    if kept:
                        out[k][m] = torch.from_numpy(_sinkhorn(noise, sweeps)).to(out[k])
                continue
            draws = [structure.random(root, rng) for _ in range(16)]
            for k in mine if kept else ():
                space = objective.blocks.spaces[k]
                sigma = [structure.induced(d, space.roles) for d in draws]
                mean = sum(np.eye(space.size)[s] for s in sigma) / len(sigma)
                out[k][m] = torch.from_numpy(0.5 * mean + 0.5 / space.size).to(out[k])
    return out


def _sinkhorn(matrix: np.ndarray, sweeps: int) -> np.ndarray:
    for _ in range(sweeps):
        matrix /= matrix.sum(axis=1, keepdims=True)
        matrix /= matrix.sum(axis=0, keepdims=True)
    return matrix
