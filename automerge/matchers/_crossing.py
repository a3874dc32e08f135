"""Groups whose units cross: blocks of rows and blocks of columns, with units in every cell of the grid (Monarch layers).

A nested structure has room for one of the two, so a search leaves the other one out. Each has a subgroup of its own with what
is in the cells; both are searched by turns, every one from where the last one ended. The objective never falls, since a
matcher's answer is at least as good as what it was given. What one is left out of decides little while the other is out of
order, so a second beginning brings the blocks into an order by their sorted entries, which nothing inside them changes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from automerge._assignment import assign
from automerge._data import reals
from automerge._tree import crossing
from automerge.groups import Element
from automerge.matchers._base import Matcher, Matching, Progress
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

    def match(self, matcher: Matcher, states: Sequence[State], progress: Progress | None) -> Matching:
        """The better end of two beginnings; statistics are those of the last search.

        Args:
            matcher: of weights.
            states: one per model.
            progress: as for `match`.
        """
        given: Matching | None = getattr(matcher, "resume", None)
        first = [self.symmetry.identity() for _ in states] if given is None else list(given.to_universe)
        matcher = matcher if given is None else replace(matcher, resume=None)  # type: ignore[type-var]
        ends = [self._by_turns(matcher, states, first, progress)]
        if not ends[0][2].stats.get("interrupted"):
            ends.append(self._by_turns(matcher, states, self._sorted(matcher, states), progress))
        value, elements, last = max(ends, key=lambda end: end[0])
        note = (
            f"units of {len(self.left)} groups cross those of others without being nested; these were searched by turns"
        )
        stats = {**last.stats, "notes": [*last.stats.get("notes", ()), note]}
        if "objective" in stats:
            stats |= {"objective": value, "start_objective": self._agreement(matcher, states)}
        return Matching(tuple(elements), self.symmetry, last.matcher, stats)

    def _by_turns(
        self, matcher: Matcher, states: Sequence[State], start: Sequence[Element], progress: Progress | None
    ) -> tuple[float, list[Element], Matching]:
        elements = list(start)
        moved = [self.symmetry.apply(s, e) for s, e in zip(states, elements, strict=True)]
        best: tuple[float, list[Element], Matching] | None = None
        for _ in range(_ROUNDS):
            for part in reversed(self.parts):
                found = matcher.match(moved, part, progress=progress)
                elements = [a.then(b) for a, b in zip(elements, found.to_universe, strict=True)]
                moved = [self.symmetry.apply(s, e) for s, e in zip(states, elements, strict=True)]
            value = self._agreement(matcher, moved)
            gained = np.inf if best is None else value - best[0]
            if best is None or gained > 0:  # not every matcher ascends
                best = value, elements, found
            if gained <= _PROGRESS * abs(value) or found.stats.get("interrupted"):
                break
        assert best is not None
        return best

    def _agreement(self, matcher: Matcher, states: Sequence[State]) -> float:
        """The sum of the inner products of all pairs, over what moves and is no statistic, weighed as a matcher does."""
        weights = getattr(matcher, "block_weights", "uniform")
        given = {} if isinstance(weights, str) else {self.symmetry.aliases.get(n, n): w for n, w in weights.items()}
        out = []
        for name in sorted(self.symmetry.moved - self.symmetry.statistics):
            values = [x for s in states if (x := reals(s[name])) is not None]
            products = math.fsum(float((a * b).sum()) for a, b in itertools.combinations(values, 2))
            norm = sum(float(x.square().sum()) for x in values) / len(states) if weights == "normalised" else 1.0
            out.append(given.get(name, 1.0) * products / (norm or 1.0))
        return math.fsum(out)

    def _sorted(self, matcher: Matcher, states: Sequence[State]) -> list[Element]:
        """Blocks of all models in the order of those of one, by the sorted entries of what they own."""
        whole = self.symmetry.stacked
        generators = whole.generators()
        still = getattr(matcher, "anchor", None) or getattr(matcher, "reference", None) or 0
        named = {s.param for g in self.left for s in generators[g].slots} - whole.statistics
        stacked = [{n: self.symmetry.stacks.read(n, s) for n in named} for s in states]
        out = []
        for m, state in enumerate(stacked):
            flat = [np.arange(g.size) for g in generators]
            for g in self.left if m != still else ():
                mine, first = (_entries(generators[g].slots, s) for s in (state, stacked[still]))
                flat[g] = assign(-torch.cdist(first, mine).square().numpy())
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
