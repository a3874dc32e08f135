"""Exact block-coordinate ascent over group elements: one model and one tree at a time.

With ``D = T - X_m`` fixed, f is linear in X_m. As long as no block has two axes of the tree, it is linear in the tree's
element too, and the oracle's answer is optimal; otherwise the answer for the linearisation is taken only if f itself
does not fall. So f never decreases, and the end is optimal against every such single move. This is Git Re-Basin's
weight matching (arXiv 2209.04836, Alg. 1) for N models against the sum of the others, on any nested group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from automerge._oracle import maximise
from automerge._tree import Perms
from automerge.matchers._starts import induced
from automerge.objective import Objective, _dot, contract


class Polisher:
    """The state of the ascent.

    Args:
        objective: the problem.
        elements: one per model; changed in place.
        fixed: models that do not move.
        check: called before every move; may raise to stop (the elements are then valid and the best so far).
    """

    def __init__(
        self,
        objective: Objective,
        elements: list[Perms],
        fixed: frozenset[int] = frozenset(),
        check: Callable[[], None] | None = None,
    ) -> None:
        self.objective, self.elements, self.fixed, self.check = objective, elements, fixed, check
        self.sigma = induced(objective, elements)
        self.moved = [objective.moved(b, self.sigma, slice(None)) for b in range(len(objective.bundles))]
        self.total = [x.sum(dim=0) for x in self.moved]
        spaces = objective.blocks.spaces
        self.trees = {r: [k for k, s in enumerate(spaces) if s.root == r] for r in objective.blocks.structure.roots}
        self.bundles = {r: sorted({b for k in ks for b in objective.touching[k]}) for r, ks in self.trees.items()}
        self.changed = [0] * len(objective.bundles)
        self.seen: dict[tuple[int, int], int] = {}
        self.clock = 1
        self.scale = objective.scale
        self.moves = 0

    def run(self, rng: np.random.Generator, max_sweeps: int) -> float:
        """Sweep over all models and trees in random order until nothing gains; returns the total gain."""
        total = 0.0
        places = [(m, r) for m in range(self.objective.count) if m not in self.fixed for r in self.trees]
        for _ in range(max_sweeps):
            gain = 0.0
            for i in rng.permutation(len(places)):
                if self.check is not None:
                    self.check()
                gain += self.move(*places[i])
            total += gain
            if gain <= 1e-9 * self.scale:
                break
        return total

    def move(self, m: int, root: int) -> float:
        """Move one model by one tree to its optimum, if that gains; returns the gain."""
        if all(self.changed[b] <= self.seen.get((m, root), -1) for b in self.bundles[root]):
            return 0.0
        self.seen[m, root] = self.clock
        if not self.trees[root]:
            return 0.0
        rest = {b: self.total[b] - self.moved[b][m] for b in self.bundles[root]}
        gains = self._gains(m, root, rest)
        blocks = self.objective.blocks
        _, perms = maximise(blocks.structure, root, {blocks.spaces[k].roles: g for k, g in gains.items()})
        sigma = [s[m : m + 1] for s in self.sigma]
        for k in self.trees[root]:
            new = blocks.structure.induced(perms, blocks.spaces[k].roles)
            sigma[k] = torch.from_numpy(new)[None].to(self.objective.device)
        after = {b: self.objective.moved(b, sigma, slice(m, m + 1))[0] for b in rest}
        gain = sum(_dot(rest[b], after[b]) - _dot(rest[b], self.moved[b][m]) for b in rest)
        if gain <= 1e-7 * self.scale / max(1, self.objective.count) * _precision(self.objective.dtype):
            return 0.0
        self._accept(m, perms, sigma, rest, after)
        return gain

    def _gains(self, m: int, root: int, rest: dict[int, torch.Tensor]) -> dict[int, np.ndarray]:
        """The linear gains of one model's spaces in one tree."""
        mine = [s[m : m + 1] for s in self.sigma]
        out: dict[int, np.ndarray] = {}
        for b, d in rest.items():
            bundle = self.objective.bundles[b]
            for k, (space, dim) in enumerate(zip(bundle.spaces, bundle.dims, strict=True)):
                if space in self.trees[root]:
                    other = self.objective.moved(b, mine, slice(m, m + 1), skip=k)
                    part = contract(d[None], other, dim)[0].cpu().numpy()
                    out[space] = out[space] + part if space in out else part
        return out

    def _accept(
        self,
        m: int,
        perms: Perms,
        sigma: list[torch.Tensor],
        rest: dict[int, torch.Tensor],
        after: dict[int, torch.Tensor],
    ) -> None:
        self.elements[m].update(perms)
        self.clock += 1
        self.moves += 1
        for s, new in zip(self.sigma, sigma, strict=True):
            s[m] = new[0]
        for b, value in after.items():
            self.moved[b][m] = value
            self.total[b] = rest[b] + value
            self.changed[b] = self.clock


def _precision(dtype: torch.dtype) -> float:
    """How small a relative gain counts as one, against 1e-7."""
    return 1e-5 if dtype == torch.float64 else 1.0
