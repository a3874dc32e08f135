"""Exact block-coordinate ascent over group elements: one model and one tree at a time.

With ``D = T - X_m`` fixed, f is linear in X_m. As long as no block has two axes of the tree, it is linear in the tree's
element too, and the oracle's answer is optimal; otherwise the answer for the linearisation is taken only if f itself
does not fall, and once it is not, pairs of units are exchanged as long as that gains. So f never decreases, and the end is
optimal against every such single move. This is Git Re-Basin's
weight matching (arXiv 2209.04836, Alg. 1) for N models against the sum of the others, on any nested group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from automerge._oracle import maximise
from automerge._tensors import contract, dot
from automerge._tree import Perms
from automerge.matchers._exchange import exchange_gains
from automerge.matchers._starts import induced
from automerge.objective import Bundle, Objective


class Polisher:
    """The state of the ascent.

    Args:
        objective: the problem.
        elements: one per model that is here; changed in place.
        fixed: which of them do not move.
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
        self.total = [objective.ranks.sum(x.sum(dim=0)) for x in self.moved]
        spaces = objective.blocks.spaces
        self.trees = {r: [k for k, s in enumerate(spaces) if s.root == r] for r in objective.blocks.structure.roots}
        self.bundles = {r: sorted({b for k in ks for b in objective.touching[k]}) for r, ks in self.trees.items()}
        self.changed = [0] * len(objective.bundles)
        self.seen: dict[tuple[int, int], int] = {}
        self.settled: dict[tuple[int, int], int] = {}
        self.clock = 1
        self.scale = objective.scale
        self._threshold = 1e-7 * self.scale / max(1, objective.world) * _precision(objective.dtype)
        self.quadratic = {
            r for r, ks in self.trees.items() if any(sum(s in ks for s in b.spaces) > 1 for _, b in self.bundles_of(r))
        }
        self.moves = 0

    def run(self, rng: np.random.Generator, max_sweeps: int) -> float:
        """Sweep over all models and trees in random order until nothing gains; returns the total gain."""
        total = 0.0
        places = [(m, r) for m in range(self.objective.world) for r in self.trees]
        for _ in range(max_sweeps):
            gain = 0.0
            for i in rng.permutation(len(places)):
                if self.check is not None:
                    self.check()
                gain += self._visit(*places[i])
            total += gain
            if gain <= 1e-9 * self.scale:
                break
        return total

    def _visit(self, number: int, root: int) -> float:
        """`move` or else `exchange` a model by its number everywhere; returns the gain, on every process."""
        ranks, mine = self.objective.ranks, self.objective.mine
        m, owner = number - mine.start, self.objective.owners[number]
        gain = 0.0
        if number in mine and m not in self.fixed:
            gain = self.move(m, root) or self.exchange(m, root)
        if ranks.size > 1:
            (gain,) = ranks.tell((gain,), owner)
            for b in self.bundles[root] if gain > 0 else ():
                ranks.broadcast(self.total[b], owner)
                self.clock += number not in mine
                self.changed[b] = self.clock
        return gain

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
        sigma = {k: blocks.structure.induced(perms, blocks.spaces[k].roles) for k in self.trees[root]}
        after: dict[int, torch.Tensor] | None = None
        if root in self.quadratic:
            after = self._after(m, sigma, rest)
            gain = sum(dot(rest[b], after[b]) - dot(rest[b], self.moved[b][m]) for b in rest)
        else:
            gain = sum(self._gain(m, k, sigma[k], g) for k, g in gains.items())
        if gain <= self._threshold:
            return 0.0
        self._accept(m, perms, sigma, rest, after or self._after(m, sigma, rest))
        return gain

    def exchange(self, m: int, root: int) -> float:
        """Exchange pairs of units, best first, as long as that gains; returns the gain.

        For trees that act on two axes of a tensor, where `move` is not exact. Nested trees are left as they are.
        """
        structure = self.objective.blocks.structure
        if root not in self.quadratic or len(structure.descendants(root)) > 1:
            return 0.0
        if all(self.changed[b] <= self.settled.get((m, root), -1) for b in self.bundles[root]):
            return 0.0
        total, space = 0.0, self.trees[root][0]
        for _ in range(self.sigma[space].shape[1]):
            rest = {b: self.total[b] - self.moved[b][m] for b in self.bundles[root]}
            table = exchange_gains(
                (rest[b][None], self.moved[b][m : m + 1], x.along(space)) for b, x in self.bundles_of(root)
            )
            gain, best = (float(table.max()), int(table.argmax()))
            if gain <= self._threshold:
                break
            order = np.arange(table.shape[1])
            order[[*divmod(best, order.size)]] = order[[*divmod(best, order.size)][::-1]]
            sigma = {space: self.sigma[space][m].cpu().numpy()[order]}
            self._accept(m, {root: self.elements[m][root][order]}, sigma, rest, self._after(m, sigma, rest))
            total += gain
        self.settled[m, root] = self.clock
        return total

    def bundles_of(self, root: int) -> list[tuple[int, Bundle]]:
        """The bundles that a tree moves."""
        return [(b, self.objective.bundles[b]) for b in self.bundles[root]]

    def _gain(self, m: int, space: int, sigma: np.ndarray, gains: np.ndarray) -> float:
        """What one space gains, where f is linear in it."""
        rows = np.arange(sigma.size)
        now = self.sigma[space][m].cpu().numpy()
        return float((gains[rows, sigma] - gains[rows, now]).sum(dtype=np.float64))

    def _after(self, m: int, sigma: dict[int, np.ndarray], rest: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """One model's bundles after some of its permutations are replaced."""
        mine = [s[m : m + 1] for s in self.sigma]
        for k, new in sigma.items():
            mine[k] = torch.from_numpy(new)[None].to(self.objective.device)
        return {b: self.objective.moved(b, mine, slice(m, m + 1))[0] for b in rest}

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
        sigma: dict[int, np.ndarray],
        rest: dict[int, torch.Tensor],
        after: dict[int, torch.Tensor],
    ) -> None:
        self.elements[m].update(perms)
        self.clock += 1
        self.moves += 1
        for k, new in sigma.items():
            self.sigma[k][m] = torch.from_numpy(new)
        for b, value in after.items():
            self.moved[b][m] = value
            self.total[b] = rest[b] + value
            self.changed[b] = self.clock


def _precision(dtype: torch.dtype) -> float:
    """How small a relative gain counts as one, against 1e-7."""
    return 1e-5 if dtype == torch.float64 else 1.0
