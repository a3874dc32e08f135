"""Git Re-Basin's coordinate descent, and the runs from several starts that its matchers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from automerge._tree import Perms
from automerge.matchers._elements import copy, random_elements, value_of
from automerge.matchers._polish import Polisher
from automerge.matchers._starts import identity_elements, signature
from automerge.objective import Objective

STARTS = ("signature", "identity")

Climb = Callable[[Polisher, np.random.Generator, list[float]], None]


def align(polisher: Polisher, m: int, rng: np.random.Generator, max_sweeps: int, trace: list[float]) -> float:
    """Git Re-Basin's Algorithm 1 (arXiv 2209.04836): one model against the sum of the others.

    Repeat: every tree in random order, one assignment each with the rest fixed; until no tree gains.

    Args:
        polisher: the elements, moved in place.
        m: the model.
        rng: of the order of the trees.
        max_sweeps: the largest number of repetitions.
        trace: the objective after each sweep is appended.

    Returns:
        What the objective gained.
    """
    roots = list(polisher.trees)
    total = 0.0
    for _ in range(max_sweeps):
        gain = sum(polisher.move(m, roots[i]) for i in rng.permutation(len(roots)))
        if gain <= 0.0:
            break
        total += gain
        trace.append(trace[-1] + gain)
    return total


@dataclass
class Runs:
    """Runs from several starts, and the best elements seen.

    Attributes:
        objective: the problem.
        reference: the model that does not move, if there is one.
        best: the elements with the largest objective, the identity among them.
        best_value: their objective.
        start_value: the objective at the identity.
        traces: per run its start and the objective after every sweep.
        interrupted: whether Ctrl-C ended it.
    """

    objective: Objective
    reference: int | None = None
    best: list[Perms] = field(default_factory=list)
    best_value: float = -np.inf
    start_value: float = 0.0
    traces: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    def run(self, climb: Climb, start: str, restarts: int, rng: np.random.Generator) -> None:
        """Climb from a start and then from random ones; ends early, with what there is, at Ctrl-C."""
        self.start_value = self._consider(identity_elements(self.objective))
        if not self.objective.bundles:
            return
        try:
            for attempt in range(restarts + 1):
                self._climb(climb, start if attempt == 0 else "random", rng)
        except KeyboardInterrupt:
            self.interrupted = True

    def report(self) -> dict[str, Any]:
        """The objective at the best elements and at the identity, and the runs."""
        return {"objective": self.best_value, "start_objective": self.start_value, "runs": self.traces}

    def _climb(self, climb: Climb, start: str, rng: np.random.Generator) -> None:
        elements = copy(self._start(start, rng))
        trace = [value_of(self.objective, elements)]
        self.traces.append({"start": start, "objective": trace})
        fixed = frozenset() if self.reference is None else frozenset({self.reference})
        polisher = Polisher(self.objective, elements, fixed)
        try:
            climb(polisher, rng, trace)
        finally:
            self._consider(polisher.elements)

    def _start(self, start: str, rng: np.random.Generator) -> Sequence[Perms]:
        if start == "signature":
            return signature(self.objective, self.reference or 0)[1]
        if start == "random":
            return random_elements(self.objective, rng, self.reference)
        return identity_elements(self.objective)

    def _consider(self, elements: Sequence[Perms]) -> float:
        value = value_of(self.objective, elements)
        if value > self.best_value:
            self.best_value, self.best = value, copy(elements)
        return value
