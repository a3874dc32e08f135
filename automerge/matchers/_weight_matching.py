"""Git Re-Basin's weight matching, pairwise to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from automerge.blocks import Blocks
from automerge.io import StateDict
from automerge.matchers._ascent import STARTS, Runs, align
from automerge.matchers._base import Progress
from automerge.matchers._elements import check_block_weights, check_options
from automerge.matchers._pairwise import Pair, Pairwise
from automerge.matchers._polish import Polisher
from automerge.objective import BlockWeights, Objective


@dataclass(frozen=True)
class WeightMatching(Pairwise):
    """Match each model to a reference by coordinate descent (Git Re-Basin, arXiv 2209.04836, Alg. 1).

    One group after the other in random order, each by one assignment with the others fixed, until none gains. Nested
    groups are solved exactly. Where one group acts on two axes of a tensor (square weights in a residual stream) the
    gain is quadratic; the assignment for its linearisation is then taken only if the gain itself is positive, so that
    the inner product with the reference never decreases.

    Attributes:
        reference: the model that stays where it is; its coordinates are the universe.
        start: "signature" (positions assigned by their sorted entries: independent of the order of the models' units),
            or "identity", as published, which suits models that share their initial weights.
        restarts: further runs from random elements; the best end is returned.
        max_sweeps: the largest number of rounds over all groups, per run.
        block_weights: "uniform", "normalised" by each block's mean squared norm, or numbers by parameters' names.
        dtype: "float32" or "float64": in which the work is done.
        seed: of the order of the groups, and of the restarts.

    Examples:
        >>> from automerge.symmetry import Generator, Slot, Symmetry
        >>> unit = np.arange(4)[:, None]
        >>> s = Symmetry({"a": (4, 3), "b": (2, 4)}, (Generator(4, (Slot("a", 0, unit), Slot("b", 1, unit))),))
        >>> model = {"a": torch.randn(4, 3), "b": torch.randn(2, 4)}
        >>> planted = s.element([[2, 0, 3, 1]])
        >>> WeightMatching().match([model, s.apply(model, planted)], s).between(0, 1) == planted
        True
    """

    start: str = "signature"
    restarts: int = 0
    max_sweeps: int = 100
    block_weights: BlockWeights = "uniform"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"start": STARTS, "dtype": ("float32", "float64")}
        check_block_weights(self)
        check_options(self, choices, {"restarts": 0, "max_sweeps": 1, "seed": 0})

    def pair(self, blocks: Blocks, models: Sequence[StateDict], progress: Progress | None = None) -> Pair:
        """See `Pairwise.pair`."""
        objective = Objective(blocks, models, dtype=getattr(torch, self.dtype), block_weights=self.block_weights)
        runs = Runs(objective, reference=0)

        def climb(polisher: Polisher, rng: np.random.Generator, trace: list[float]) -> None:
            align(polisher, 1, rng, self.max_sweeps, trace)
            if progress is not None:
                progress({"phase": "weight matching", "objective": trace[-1], "sweeps": len(trace) - 1})

        runs.run(climb, self.start, self.restarts, np.random.default_rng(self.seed))
        return Pair(runs.best[1], runs.report(), runs.interrupted)
