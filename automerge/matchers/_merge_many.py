"""Git Re-Basin's matching of many models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from automerge.blocks import decompose
from automerge.matchers._ascent import STARTS, Runs, align
from automerge.matchers._base import Matcher, Matching, Model, Progress, check_models
from automerge.matchers._elements import answer, check_block_weights, check_options
from automerge.matchers._polish import Polisher
from automerge.objective import BlockWeights, Objective
from automerge.symmetry import Symmetry


@dataclass(frozen=True)
class MergeMany(Matcher):
    """Match each model to the mean of the others, over and over (Git Re-Basin, arXiv 2209.04836, Alg. 3).

    One model after the other in random order is brought to the mean of the others, as they stand, by the coordinate
    descent of `WeightMatching`, until a round moves none. Each such step raises the universe objective.

    Attributes:
        start: "signature" (all models to the first by their sorted entries: independent of the order of units), or
            "identity", as published, which suits models that share their initial weights.
        restarts: further runs from random elements; the best end is returned.
        max_rounds: the largest number of rounds over all models, per run.
        max_sweeps: the largest number of sweeps over all groups for one model in one round.
        block_weights: "uniform", "normalised" by each block's mean squared norm, or numbers by parameters' names.
        dtype: "float32" or "float64": in which the work is done.
        seed: of the order of the models and groups, and of the restarts.

    Examples:
        >>> from automerge.symmetry import Generator, Slot
        >>> unit = np.arange(4)[:, None]
        >>> s = Symmetry({"a": (4, 3), "b": (2, 4)}, (Generator(4, (Slot("a", 0, unit), Slot("b", 1, unit))),))
        >>> model = {"a": torch.randn(4, 3), "b": torch.randn(2, 4)}
        >>> planted = s.element([[2, 0, 3, 1]])
        >>> MergeMany().match([model, s.apply(model, planted)], s).between(0, 1) == planted
        True
    """

    start: str = "signature"
    restarts: int = 0
    max_rounds: int = 100
    max_sweeps: int = 100
    block_weights: BlockWeights = "uniform"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"start": STARTS, "dtype": ("float32", "float64")}
        check_block_weights(self)
        check_options(self, choices, {"restarts": 0, "max_rounds": 1, "max_sweeps": 1, "seed": 0})

    def match(
        self, models: Sequence[Model], symmetry: Symmetry, *, progress: Progress | None = None, data: Any = None
    ) -> Matching:
        """See `Matcher.match`. Ctrl-C ends with the best matching so far (``stats["interrupted"]``)."""
        values = check_models(models, symmetry)
        begin = time.perf_counter()
        dtype = getattr(torch, self.dtype)
        objective = Objective(decompose(symmetry), values, dtype=dtype, block_weights=self.block_weights)
        runs = Runs(objective)

        def climb(polisher: Polisher, rng: np.random.Generator, trace: list[float]) -> None:
            for done in range(self.max_rounds):
                order = rng.permutation(len(values))
                gain = sum(align(polisher, int(m), rng, self.max_sweeps, trace) for m in order)
                if progress is not None:
                    progress({"phase": "merge many", "round": done + 1, "objective": trace[-1]})
                if gain <= 0.0:
                    break

        runs.run(climb, self.start, self.restarts, np.random.default_rng(self.seed))
        stats = {**runs.report(), "interrupted": runs.interrupted}
        return answer(self, symmetry, objective, runs.best, stats, begin)
