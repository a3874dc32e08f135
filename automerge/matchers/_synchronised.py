"""Permutation synchronisation: the cycle-consistent maps nearest to the maps of all pairs.

Pachauri, Kondor, Singh, *Solving the multi-way matching problem by permutation synchronization*, NeurIPS 2013. The maps
of all pairs are the blocks of one symmetric matrix. If they agree around every cycle it has rank n and its leading
eigenvectors are the maps to a universe; otherwise its best approximation of rank n, rounded block by block by linear
assignment, is a consistent set of maps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from automerge._tree import Perms
from automerge.blocks import Blocks, decompose
from automerge.matchers._base import Matcher, Matching, Model, Progress, check_models
from automerge.matchers._elements import answer, compose, inverse
from automerge.matchers._pairwise import Pairwise, PairwiseFrankWolfe, all_pairs, check_reference
from automerge.matchers._starts import identity_elements, vertices
from automerge.objective import Objective
from automerge.symmetry import Symmetry

Maps = Mapping[tuple[int, int], Perms]
_TIED = 1e-9


@dataclass(frozen=True)
class Synchronised(Matcher):
    """Match all pairs of models, then synchronise the maps (Pachauri, Kondor, Singh 2013: spectral, then assignment).

    Against the pairwise matcher itself it shows what cycle consistency adds, with the same matches. Nested groups are
    synchronised on the permutations that they induce on the positions, and projected onto the group by its linear
    maximisation oracle, which is exact. Consistent maps are returned as they are.

    ``stats["cycle_error_before"]`` is the mean share of positions that the given maps displace around a triangle of
    models; ``stats["agreement"]`` the mean share of positions on which the answer agrees with the given maps.

    Attributes:
        pairwise: any pairwise matcher; its reference's coordinates are the universe.

    Examples:
        >>> from automerge.symmetry import Generator, Slot
        >>> unit = np.arange(4)[:, None]
        >>> s = Symmetry({"a": (4, 3), "b": (2, 4)}, (Generator(4, (Slot("a", 0, unit), Slot("b", 1, unit))),))
        >>> model = {"a": torch.randn(4, 3), "b": torch.randn(2, 4)}
        >>> planted = s.element([[2, 0, 3, 1]])
        >>> matching = Synchronised().match([model, s.apply(model, planted), model], s)
        >>> matching.between(0, 1) == planted, matching.stats["cycle_error_before"]
        (True, 0.0)
    """

    pairwise: Pairwise = field(default_factory=PairwiseFrankWolfe)

    def match(
        self, models: Sequence[Model], symmetry: Symmetry, *, progress: Progress | None = None, data: Any = None
    ) -> Matching:
        """See `Matcher.match`. Ctrl-C ends with the maps to the reference found so far (``stats["interrupted"]``)."""
        values = check_models(models, symmetry)
        reference = self.pairwise.reference
        check_reference(self.pairwise, reference, len(values))
        begin = time.perf_counter()
        blocks = decompose(symmetry)
        objective = Objective(blocks, values, dtype=torch.float32)
        none = identity_elements(objective)
        order = sorted(itertools.combinations(range(len(values)), 2), key=lambda p: reference not in p)
        found, interrupted = all_pairs(self.pairwise, blocks, values, order, progress)
        maps = {p: pair.element or none[0] for p, pair in found.items()}
        stats: dict[str, Any] = {"pairs": {f"{a}-{b}": found[a, b].stats for a, b in found}, "interrupted": interrupted}
        if interrupted:
            elements = [_between(blocks, maps, m, reference) or none[m] for m in range(len(values))]
        else:
            elements = synchronise(objective, maps, reference)
            stats["cycle_error_before"] = cycle_error(blocks, maps, len(values))
            stats["agreement"] = agreement(blocks, maps, elements)
        return answer(self, symmetry, objective, elements, stats, begin)


def synchronise(objective: Objective, maps: Maps, reference: int) -> list[Perms]:
    """One element per model, to the reference's coordinates, from the maps of all pairs.

    Args:
        objective: of the models; only its spaces matter.
        maps: for every pair a < b the element that moves b to a's coordinates.
        reference: the model that stays where it is.
    """
    elements = identity_elements(objective)
    if not objective.blocks.spaces:
        return elements
    induced = {pair: objective.blocks.induced(element) for pair, element in maps.items()}
    gains = [
        torch.from_numpy(_spectral({p: s[k] for p, s in induced.items()}, objective.count, space.size, reference))
        for k, space in enumerate(objective.blocks.spaces)
    ]
    found = vertices(objective, gains)[1]
    return [elements[m] if m == reference else found[m] for m in range(objective.count)]


def _spectral(maps: Mapping[tuple[int, int], np.ndarray], count: int, n: int, reference: int) -> np.ndarray:
    """The rank-n approximation of the matrix of all maps, its blocks from every model to the reference.

    Positions that no map connects, however indirectly, are problems of their own, and are solved as such: each has as
    many positions of every model, and keeps as many eigenvectors.

    Args:
        maps: pair a < b -> where each position of a comes from in b.
        count: the number of models.
        n: the number of positions.
        reference: the model.

    Returns:
        float64, ``(count, n, n)``: model, position in the reference, position in the model.
    """
    rows = np.concatenate([a * n + np.arange(n) for a, _ in maps])
    columns = np.concatenate([b * n + sigma for (_, b), sigma in maps.items()])
    both = (np.concatenate([rows, columns]), np.concatenate([columns, rows]))
    graph = coo_array((np.ones(both[0].size), both), shape=(count * n, count * n)).tocsr()
    label = connected_components(graph, directed=False)[1]
    out = np.zeros((count, n, n))
    members = np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label))[:-1])
    for nodes in members:
        dense = graph[nodes][:, nodes].toarray() + np.eye(nodes.size)
        model, position = np.divmod(nodes, n)
        here = model == reference
        projector = _leading(dense, nodes.size // count)
        out[model[None, :], position[here][:, None], position[None, :]] = projector[here]
    return out


def _leading(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The projector onto the leading eigenvectors; eigenvalues that tie at the end of the rank share what is left."""
    values, vectors = (x.numpy() for x in torch.linalg.eigh(torch.from_numpy(matrix)))  # in torch's number of threads
    cut = values[-rank]
    tied = np.abs(values - cut) <= _TIED * max(1.0, float(abs(values[-1])))
    above = (values > cut) & ~tied
    weight = above + tied * ((rank - above.sum()) / tied.sum())
    projector: np.ndarray = (vectors * weight) @ vectors.T
    return projector


# -------------------------------------------------------------------- measures
def _between(blocks: Blocks, maps: Maps, a: int, b: int) -> Perms:
    """The map from a's to b's coordinates; empty if it is not there, or a is b."""
    if (b, a) in maps:
        return maps[b, a]
    return inverse(blocks.structure, maps[a, b]) if (a, b) in maps else {}


def cycle_error(blocks: Blocks, maps: Maps, count: int) -> float:
    """The mean share of positions displaced around the triangles; 0 for fewer than three models."""
    shares = []
    for a, b, c in itertools.combinations(range(count), 3):
        around = compose(
            blocks.structure, compose(blocks.structure, maps[b, c], maps[a, b]), _between(blocks, maps, a, c)
        )
        shares.append(1.0 - _same(blocks, around, None))
    return float(np.mean(shares)) if shares else 0.0


def agreement(blocks: Blocks, maps: Maps, elements: Sequence[Perms]) -> float:
    """The mean share of positions on which maps through a universe equal given ones."""
    structure = blocks.structure
    through = {(a, b): compose(structure, elements[b], inverse(structure, elements[a])) for a, b in maps}
    return float(np.mean([_same(blocks, through[p], maps[p]) for p in maps]))


def _same(blocks: Blocks, first: Perms, second: Perms | None) -> float:
    """The share of all spaces' positions on which two elements agree; the second is the identity if None."""
    total = sum(s.size for s in blocks.spaces)
    one = blocks.induced(first)
    other = [np.arange(s.size) for s in blocks.spaces] if second is None else blocks.induced(second)
    return sum(int((x == y).sum()) for x, y in zip(one, other, strict=True)) / total if total else 1.0
