"""Groups whose units cross: blocks of rows and blocks of columns, with units in every cell of the grid (Monarch layers).

A nested structure has room for one of the two, so a search leaves the other one out. Each has a subgroup of its own with what
is in the cells; both are searched by turns, every one from where the last one ended. The objective never falls, since a
matcher's answer is at least as good as what it was given. What one is left out of decides little while the other is out of
order, so a second beginning brings the blocks into an order by their sorted entries, which nothing inside them changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch

from automerge._assignment import assign
from automerge._forward import reals
from automerge._offload import Store
from automerge._ranks import ALONE, Ranks
from automerge._tree import crossing
from automerge.groups import Element
from automerge.matchers._base import Matcher, Matching, Progress
from automerge.matchers._frank_wolfe import FrankWolfe
from automerge.symmetry import Slot, Symmetry

_ROUNDS = 4
_PROGRESS = 1e-6

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Crossing:
    """A symmetry with generators that cross, and its two parts.

    Attributes:
        symmetry: the whole.
        left: numbers of the generators of ``symmetry.stacked`` that a nested structure leaves out.
        parts: the symmetry without what those cross, and without those.
    """

    symmetry: Symmetry
    left: tuple[int, ...]
    parts: tuple[Symmetry, Symmetry]

    @classmethod
    def of(cls, symmetry: Symmetry) -> Crossing | None:
        """None if nothing crosses, or what crosses is not two kinds of blocks."""
        pairs = crossing(symmetry.stacked.generators())
        left, others = {a for a, _ in pairs}, {b for _, b in pairs}
        if not left or left & others:
            return None
        parts = (_without(symmetry, others), _without(symmetry, left))
        if any(crossing(p.stacked.generators()) for p in parts):
            return None
        return cls(symmetry, tuple(sorted(left)), parts)

    def match(
        self, matcher: Matcher, states: Sequence[State], progress: Progress | None, ranks: Ranks = ALONE
    ) -> Matching:
        """The better end of two beginnings; statistics are those of the last search.

        Args:
            matcher: of weights.
            states: one per model; of several processes, this one's (`Ranks.shares`).
            progress: as for `match`.
            ranks: the processes.
        """
        count = round(ranks.add(len(states))[0])
        given: Matching | None = getattr(matcher, "resume", None)
        first = [self.symmetry.identity()] * count if given is None else list(given.to_universe)
        matcher = matcher if given is None else replace(matcher, resume=None)  # type: ignore[type-var]
        turns = _Turns(self, matcher, states, ranks.shares(count)[ranks.rank], progress, ranks)
        with turns.store.working():
            ends = [turns.run(first)]
            if not ends[0][2].stats.get("interrupted"):
                ends.append(turns.run(turns.sorted(count)))
            value, elements, last = max(ends, key=lambda end: end[0])
            note = f"units of {len(self.left)} groups cross those of others without being nested; these were searched by turns"
            stats = {**last.stats, "notes": [*last.stats.get("notes", ()), note]}
            if "objective" in stats:
                stats |= {"objective": value, "start_objective": turns.agreement(states)}
        return Matching(tuple(elements), self.symmetry, last.matcher, stats)


class _Turns:
    """One search by turns.

    Args:
        crossing: what is searched.
        matcher: of weights.
        states: of this process's models.
        mine: their numbers.
        progress: as for `match`.
        ranks: the processes.

    Attributes:
        store: where moved models are held, as the matcher says.
    """

    def __init__(
        self,
        crossing: Crossing,
        matcher: Matcher,
        states: Sequence[State],
        mine: range,
        progress: Progress | None,
        ranks: Ranks,
    ) -> None:
        self.crossing, self.symmetry, self.matcher = crossing, crossing.symmetry, matcher
        self.states, self.mine, self.progress, self.ranks = states, mine, progress, ranks
        self.store = Store(getattr(matcher, "offload", None))

    def run(self, start: Sequence[Element]) -> tuple[float, list[Element], Matching]:
        """The best value, its elements of all models, and the last search."""
        elements = list(start)
        moved = self._moved(elements)
        best: tuple[float, list[Element], Matching] | None = None
        for _ in range(_ROUNDS):
            for part in reversed(self.crossing.parts):
                found = self._search(moved, part)
                elements = [a.then(b) for a, b in zip(elements, found.to_universe, strict=True)]
                moved = self._moved(elements)
            value = self.agreement(moved)
            gained = np.inf if best is None else value - best[0]
            if best is None or gained > 0:  # not every matcher ascends
                best = value, elements, found
            if gained <= _PROGRESS * abs(value) or found.stats.get("interrupted"):
                break
        assert best is not None
        return best

    def _search(self, states: Sequence[State], part: Symmetry) -> Matching:
        if isinstance(self.matcher, FrankWolfe) and self.ranks.size > 1:
            return self.matcher.match_share(list(map(dict, states)), part, self.progress, self.ranks)
        return self.matcher.match(states, part, progress=self.progress)

    def _moved(self, elements: Sequence[Element]) -> list[State]:
        out: list[State] = []
        for state, m in zip(self.states, self.mine, strict=True):
            new = self.symmetry.apply(state, elements[m])
            out.append({n: v if v is state[n] else self.store.keep(v) for n, v in new.items()})
        return out

    def agreement(self, states: Sequence[State]) -> float:
        """The sum of the inner products of all pairs, over what moves and is no statistic, weighed as a matcher does."""
        weights = getattr(self.matcher, "block_weights", "uniform")
        aliases = self.symmetry.aliases
        given = {} if isinstance(weights, str) else {aliases.get(n, n): w for n, w in weights.items()}
        count = self.ranks.add(len(states))[0]
        out = []
        for name in sorted(self.symmetry.moved - self.symmetry.statistics):
            values = [x for s in states if (x := reals(s[name])) is not None]
            if not values:
                continue
            total = self.ranks.sum(reduce(torch.add, values).clone())
            (squares,) = self.ranks.add(math.fsum(float(x.square().sum()) for x in values))
            norm = squares / count if weights == "normalised" else 1.0
            out.append(given.get(name, 1.0) * (float(total.square().sum()) - squares) / 2 / (norm or 1.0))
        return math.fsum(out)

    def sorted(self, count: int) -> list[Element]:
        """Blocks of all models in the order of those of one, by the sorted entries of what they own."""
        whole, left = self.symmetry.stacked, self.crossing.left
        generators = whole.generators()
        still = getattr(self.matcher, "anchor", None) or getattr(self.matcher, "reference", None) or 0
        owner = next(rank for rank, share in enumerate(self.ranks.shares(count)) if still in share)
        named = {s.param for g in left for s in generators[g].slots} - whole.statistics
        orders: list[list[np.ndarray]] = [[] for _ in self.states]
        for g in left:
            own = []
            for state in self.states:
                stacked = {n: self.symmetry.stacks.read(n, state) for n in named}
                own.append(_entries(generators[g].slots, stacked))
            first = own[still - self.mine.start].clone() if still in self.mine else torch.empty_like(own[0])
            self.ranks.broadcast(first, owner)
            for m, entries, order in zip(self.mine, own, orders, strict=True):
                same = np.arange(generators[g].size)
                order.append(same if m == still else assign(-torch.cdist(first, entries).square().numpy()))
        out = []
        for own_orders in (order for share in self.ranks.gather(orders) for order in share):
            flat = [np.arange(g.size) for g in generators]
            for g, order in zip(left, own_orders, strict=True):
                flat[g] = order
            out.append(self.symmetry.apart(whole.element(flat)))
        return out


def _without(symmetry: Symmetry, left_out: set[int]) -> Symmetry:
    """The subgroup without some generators, numbered as those of ``symmetry.stacked``: sets first, then exchanges."""
    sets, exchanges = symmetry.sets, symmetry.exchanges
    return replace(
        symmetry,
        sets=tuple(g for i, g in enumerate(sets) if i not in left_out),
        exchanges=tuple(e for i, e in enumerate(exchanges, len(sets)) if i not in left_out),
        axis_graph=None,
    )


def _entries(slots: Sequence[Slot], state: State) -> torch.Tensor:
    """What each unit owns, sorted slot by slot: ``(units, entries)``, float64."""
    out = []
    for slot in slots:
        if slot.param in state:
            value = state[slot.param].detach().cpu()
            for axis, start, stop in slot.within:
                value = value.narrow(axis, start, stop - start)
            rows = value.movedim(slot.axis, 0)[torch.from_numpy(slot.index)]
            if (entries := reals(rows)) is not None:
                out.append(entries.reshape(len(rows), -1).sort(dim=1).values)
    return torch.cat(out, dim=1)
