"""Leave every model where it is: naive averaging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from automerge.blocks import decompose
from automerge.matchers._base import Matcher, Matching, Model, Progress, check_models
from automerge.objective import Objective
from automerge.symmetry import Symmetry


@dataclass(frozen=True)
class Identity(Matcher):
    """The baseline that moves nothing; its merge is the plain average.

    Examples:
        >>> Identity()
        Identity()
    """

    def match(
        self, models: Sequence[Model], symmetry: Symmetry, *, progress: Progress | None = None, data: Any = None
    ) -> Matching:
        """See `Matcher.match`."""
        values = check_models(models, symmetry)
        objective = Objective(decompose(symmetry), values, dtype=torch.float32)
        value = objective.value(objective.identity())
        stats = {"objective": value, "start_objective": value, "iterations": 0, "converged": True}
        return Matching(tuple(symmetry.identity() for _ in values), symmetry, repr(self), stats)
