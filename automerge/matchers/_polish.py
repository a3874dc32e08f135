"""Exact block-coordinate ascent over group elements: one model and one tree at a time.

With ``D = T - X_m`` fixed, f is linear in X_m. As long as no block has two axes of the tree, it is linear in the tree's
element too, and the oracle's answer is optimal; otherwise the answer for the linearisation is taken only if f itself
does not fall, and once it is not, pairs of units are exchanged as long as that gains. So f never decreases, and the end is
optimal against every such single move. This is Git Re-Basin's
weight matching (arXiv 2209.04836, Alg. 1) for N models against the sum of the others, on any nested group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from automerge._machine import in_threads
from automerge._oracle import maximise
from automerge._tensors import dot
from automerge._tree import Perms
from automerge.matchers._exchange import exchange_gains
from automerge.matchers._gains import Gains
from automerge.matchers._starts import THREADED, induced
from automerge.objective import Bundle, Objective

Place = tuple[int, int]
"""A model and a tree."""
Linear = dict[int, np.ndarray]
"""Per space the gains ``(n, n)``: new position, old position."""


class Polisher:
    """The state of the ascent.

    Args:
        objective: the problem.
        elements: one per model that is here; changed in place.
        fixed: which of them do not move.
    """

    def __init__(
        self,
        objective: Objective,
        elements: list[Perms],
        fixed: frozenset[int] = frozenset(),
    ) -> None:
        self.objective, self.elements, self.fixed = objective, elements, fixed
        self.sigma = induced(objective, elements)
        self.gains = Gains(objective, self.sigma)
        keep = objective.store.keep
        self.moved = [keep(objective.moved(b, self.sigma, slice(None))) for b in range(len(objective.bundles))]
        self.total = [keep(objective.ranks.sum(x.sum(dim=0))) for x in self.moved]
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
            order = [places[i] for i in rng.permutation(len(places))]
            gain = sum(self._visit(wave) for wave in self._waves(order))
            total += gain
            if gain <= 1e-9 * self.scale:
                break
        return total

    def _waves(self, order: Sequence[Place]) -> Iterator[list[Place]]:
        """Visits that follow each other and have no bundle in common: each finds the same, whichever comes first."""
        most = 2 * torch.get_num_threads() if self.objective.ranks.size == 1 else 1
        wave: list[Place] = []
        touched: set[int] = set()
        for place in order:
            own = set(self.bundles[place[1]])
            if len(wave) == most or own & touched:
                yield wave
                wave, touched = [], set()
            wave.append(place)
            touched |= own
        if wave:
            yield wave

    def _visit(self, wave: Sequence[Place]) -> float:
        """`move` or else `exchange` models by their numbers everywhere; returns the gain, on every process.

        The assignments are solved side by side.
        """
        ranks, mine = self.objective.ranks, self.objective.mine
        if ranks.stopping():
            raise KeyboardInterrupt
        asked = {
            (n - mine.start, r): self._ask(n - mine.start, r)
            for n, r in wave
            if n in mine and n - mine.start not in self.fixed
        }
        solved = self._solve({place: gains for place, gains in asked.items() if gains is not None})
        total = 0.0
        for number, root in wave:
            place, owner = (number - mine.start, root), self.objective.owners[number]
            gain = self._take(*place, *solved[place]) if place in solved else 0.0
            if place in asked and gain == 0.0:
                gain = self.exchange(*place)
            if ranks.size > 1:
                (gain,) = ranks.tell((gain,), owner)
                for b in self.bundles[root] if gain > 0 else ():
                    ranks.broadcast(self.total[b], owner)
                    self.clock += number not in mine
                    self.changed[b] = self.clock
            total += gain
        return total

    def move(self, m: int, root: int) -> float:
        """Move one model by one tree to its optimum, if that gains; returns the gain."""
        gains = self._ask(m, root)
        return 0.0 if gains is None else self._take(m, root, *self._solve({(m, root): gains})[m, root])

    def _ask(self, m: int, root: int) -> Linear | None:
        """The linear gains of one model and tree; None if nothing has changed since they were last asked for."""
        if not self.trees[root] or all(self.changed[b] <= self.seen.get((m, root), -1) for b in self.bundles[root]):
            return None
        self.seen[m, root] = self.clock
        return self.gains.of(m, root, self._rest(m, root))

    def _rest(self, m: int, root: int) -> dict[int, torch.Tensor]:
        """Per bundle of a tree what the other models sum to."""
        return {b: self.objective.store.keep(self.total[b] - self.moved[b][m]) for b in self.bundles[root]}

    def _solve(self, asked: Mapping[Place, Linear]) -> dict[Place, tuple[Linear, Perms]]:
        """The best element for each of some linear gains."""
        blocks = self.objective.blocks

        def solve(place: Place) -> Perms:
            return maximise(blocks.structure, place[1], {blocks.spaces[k].roles: g for k, g in asked[place].items()})[1]

        worth = any(len(g) >= THREADED for gains in asked.values() for g in gains.values())
        return {p: (asked[p], perms) for p, perms in zip(asked, in_threads(solve, list(asked), worth), strict=True)}

    def _take(self, m: int, root: int, gains: Linear, perms: Perms) -> float:
        """Take the best element of some gains, if it gains; returns the gain."""
        blocks = self.objective.blocks
        sigma = {k: blocks.structure.induced(perms, blocks.spaces[k].roles) for k in self.trees[root]}
        rest: dict[int, torch.Tensor] | None = None
        after: dict[int, torch.Tensor] | None = None
        if root in self.quadratic:
            rest = self._rest(m, root)
            after = self._after(m, sigma, rest)
            gain = sum(dot(rest[b], after[b]) - dot(rest[b], self.moved[b][m]) for b in rest)
        else:
            gain = sum(self._gain(m, k, sigma[k], g) for k, g in gains.items())
        if gain <= self._threshold:
            return 0.0
        rest = rest or self._rest(m, root)
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
            rest = self._rest(m, root)
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
        return {b: self.objective.store.keep(self.objective.moved(b, mine, slice(m, m + 1))[0]) for b in rest}

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
            torch.add(rest[b], value, out=self.total[b])
            self.changed[b] = self.clock


def _precision(dtype: torch.dtype) -> float:
    """How small a relative gain counts as one, against 1e-7."""
    return 1e-5 if dtype == torch.float64 else 1.0
