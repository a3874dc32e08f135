"""Matchers that bring each model to a reference, independently of the others."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from automerge._errors import MatchingError
from automerge._offload import Store
from automerge._tree import Perms
from automerge.blocks import Blocks, decompose
from automerge.io import StateDict
from automerge.matchers._base import Matcher, Matching, Model, Progress, check_models
from automerge.matchers._elements import answer
from automerge.matchers._frank_wolfe import FrankWolfe, _Search
from automerge.matchers._starts import identity_elements
from automerge.objective import Objective
from automerge.symmetry import Symmetry


@dataclass(frozen=True)
class Pair:
    """How the second of two models moves to the coordinates of the first.

    Attributes:
        element: of every tree; empty if nothing moves.
        stats: what was measured; ``objective`` is the inner product of the two models then, ``start_objective`` before.
        interrupted: whether Ctrl-C ended the search.
    """

    element: Perms
    stats: dict[str, Any]
    interrupted: bool = False


@dataclass(frozen=True)
class Pairwise(Matcher):
    """A matcher of two models, that brings N models to a reference one by one.

    Implementations say how two models are matched (`pair`); the universe is the reference's own coordinates.

    Attributes:
        reference: the model that stays where it is.
    """

    reference: int = 0

    def match(
        self, models: Sequence[Model], symmetry: Symmetry, *, progress: Progress | None = None, data: Any = None
    ) -> Matching:
        """See `Matcher.match`. Ctrl-C ends with what was found so far (``stats["interrupted"]``)."""
        values = check_models(models, symmetry)
        check_reference(self, self.reference, len(values))
        begin = time.perf_counter()
        blocks = decompose(symmetry)
        others = [(self.reference, m) for m in range(len(values)) if m != self.reference]
        found, interrupted = all_pairs(self, blocks, values, others, progress)
        objective = Objective(blocks, values, dtype=torch.float32)
        elements = identity_elements(objective)
        for (_, m), pair in found.items():
            elements[m] = pair.element or elements[m]
        stats = {
            "pairs": {f"{a}-{b}": pair.stats for (a, b), pair in found.items()},
            "reference_objective": sum(pair.stats["objective"] for pair in found.values()),
            "reference_start": sum(pair.stats["start_objective"] for pair in found.values()),
            "interrupted": interrupted,
        }
        return answer(self, symmetry, objective, elements, stats, begin)

    @abstractmethod
    def pair(self, blocks: Blocks, models: Sequence[StateDict], progress: Progress | None = None) -> Pair:
        """Bring the second of two models to the coordinates of the first.

        Args:
            blocks: the decomposition of their symmetry.
            models: two checked state dicts.
            progress: called with a dict of numbers as the work goes on.
        """


def all_pairs(
    matcher: Pairwise,
    blocks: Blocks,
    values: Sequence[StateDict],
    pairs: Iterable[tuple[int, int]],
    progress: Progress | None,
) -> tuple[dict[tuple[int, int], Pair], bool]:
    """Match some pairs ``(a, b)``, b to a; also whether Ctrl-C ended it before the last."""
    found: dict[tuple[int, int], Pair] = {}
    for a, b in pairs:
        try:
            found[a, b] = matcher.pair(blocks, (values[a], values[b]), _told(progress, a, b))
        except KeyboardInterrupt:
            return found, True
        if found[a, b].interrupted:
            return found, True
    return found, False


def _told(progress: Progress | None, a: int, b: int) -> Progress | None:
    """The progress function with the pair in every message."""
    if progress is None:
        return None
    tell = progress
    return lambda numbers: tell({**numbers, "reference": a, "model": b})


def check_reference(matcher: object, reference: int, count: int) -> None:
    """Check that the reference is a model.

    Raises:
        MatchingError: if not.
    """
    if not 0 <= reference < count:
        raise MatchingError(f"{type(matcher).__name__}(reference={reference}): there are the models 0 to {count - 1}")


@dataclass(frozen=True)
class PairwiseFrankWolfe(Pairwise):
    """Frank-Wolfe on each model and the reference alone: C2M3's pairwise baseline (arXiv 2405.17897, section 3.1).

    What `FrankWolfe` gains over it is what the common universe adds; what it gains over `WeightMatching` is what the
    relaxation adds.

    Attributes:
        reference: the model that stays where it is.
        solver: the options of Frank-Wolfe; its ``anchor`` must be None.

    Examples:
        >>> import numpy as np
        >>> from automerge.symmetry import Generator, Slot
        >>> unit = np.arange(4)[:, None]
        >>> s = Symmetry({"a": (4, 3), "b": (2, 4)}, (Generator(4, (Slot("a", 0, unit), Slot("b", 1, unit))),))
        >>> model = {"a": torch.randn(4, 3), "b": torch.randn(2, 4)}
        >>> planted = s.element([[2, 0, 3, 1]])
        >>> PairwiseFrankWolfe().match([model, s.apply(model, planted)], s).between(0, 1) == planted
        True
    """

    solver: FrankWolfe = field(default_factory=FrankWolfe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver.anchor is not None:
            raise MatchingError(
                f"PairwiseFrankWolfe(solver=FrankWolfe(anchor={self.solver.anchor})): the reference is the anchor of "
                "every pair; set PairwiseFrankWolfe(reference=...) and leave anchor=None"
            )

    def pair(self, blocks: Blocks, models: Sequence[StateDict], progress: Progress | None = None) -> Pair:
        """See `Pairwise.pair`."""
        options = replace(self.solver, anchor=0)
        dtype = getattr(torch, options.dtype)
        objective = Objective(
            blocks, models, dtype=dtype, block_weights=options.block_weights, store=Store(options.offload)
        )
        search = _Search(options, objective, progress)
        element = search.run()[1] if search.objective.bundles else {}
        report = search.report()
        kept = {k: report[k] for k in ("objective", "start_objective", "objectives", "iterations", "converged")}
        return Pair(element, kept, search.interrupted)
