"""Matchers: one map per model to a common universe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from automerge._data import Batches
from automerge._double import own_modes
from automerge._sketch import sketch
from automerge.matchers._activations import ActivationMatching
from automerge.matchers._base import (
    Matcher,
    Matching,
    Model,
    Progress,
    check_matcher,
    check_models,
    check_symmetry,
    state_dict,
)
from automerge.matchers._cca import CCA
from automerge.matchers._crossing import Crossing
from automerge.matchers._frank_wolfe import FrankWolfe
from automerge.matchers._identity import Identity
from automerge.matchers._merge_many import MergeMany
from automerge.matchers._pairwise import Pairwise, PairwiseFrankWolfe
from automerge.matchers._procrustes import Procrustes
from automerge.matchers._synchronised import Synchronised
from automerge.matchers._weight_matching import WeightMatching
from automerge.matchers._zipit import ZipIt
from automerge.symmetry import Symmetry

MATCHERS: Mapping[str, Callable[[], Matcher]] = {
    "frank-wolfe": FrankWolfe,
    "weight-matching": WeightMatching,
    "merge-many": MergeMany,
    "pairwise-frank-wolfe": PairwiseFrankWolfe,
    "synchronised": Synchronised,
    "activation-matching": ActivationMatching,
    "cca": CCA,
    "procrustes": Procrustes,
    "zipit": ZipIt,
    "identity": Identity,
}
"""Name -> matcher with its defaults: the choices of the command line, and what the conformance suite runs over."""

__all__ = [
    "CCA",
    "MATCHERS",
    "ActivationMatching",
    "FrankWolfe",
    "Identity",
    "Matcher",
    "Matching",
    "MergeMany",
    "Pairwise",
    "PairwiseFrankWolfe",
    "Procrustes",
    "Synchronised",
    "WeightMatching",
    "ZipIt",
    "check_models",
    "match",
]


@own_modes()
def match(
    models: Sequence[Model],
    symmetry: Symmetry,
    matcher: Matcher | None = None,
    *,
    progress: Progress | None = None,
    data: Any = None,
    inputs: int = 1,
    kwargs: Mapping[str, Any] | None = None,
) -> Matching:
    """Match N models of one architecture in a common universe.

    Args:
        models: state dicts or modules, at least two; they are not changed. A matcher that looks at activations needs at
            least one module; its architecture runs all of them.
        symmetry: of the architecture.
        matcher: `FrankWolfe` with its defaults if None.
        progress: called with a dict of numbers as the work goes on.
        data: batches, for matchers that look at activations.
        inputs: how many of a batch's items are positional inputs.
        kwargs: keyword inputs for every batch.

    Returns:
        One map per model to the universe; ``stats["models"]`` tells the models again (`automerge._sketch.sketch`).

    Raises:
        MatchingError: for fewer than two models, or a symmetry that is none.
        CheckpointError: if a model does not fit the others, or holds NaN or infinite values.
        SymmetryError: if the symmetry is of another architecture.

    Examples:
        >>> import numpy as np, torch
        >>> from automerge.symmetry import Generator, Slot
        >>> unit = np.arange(3)[:, None]
        >>> s = Symmetry({"a": (3, 2), "b": (2, 3)}, (Generator(3, (Slot("a", 0, unit), Slot("b", 1, unit))),))
        >>> model = {"a": torch.randn(3, 2), "b": torch.randn(2, 3)}
        >>> match([model, model], s).between(0, 1).is_identity()
        True
    """
    matcher = FrankWolfe() if matcher is None else matcher
    check_matcher(matcher)
    check_symmetry(symmetry)
    data = data if data is None or isinstance(data, Batches) else Batches(data, inputs, kwargs)
    # a matcher that looks at activations has modules to run, and by turns the models are moved
    whole = isinstance(matcher, Identity) or matcher.needs_data
    crossing = None if whole else Crossing.of(symmetry)
    if crossing is None:
        found = matcher.match(models, symmetry, progress=progress, data=data)
    else:
        found = crossing.match(matcher, check_models(models, symmetry), progress)
    states = [state_dict(m) for m in models]
    known = {"models": [sketch(state, found.symmetry.shapes) for state in states]}
    found = replace(found, stats={**found.stats, **known})
    apart = _apart(found, states)
    if not apart:
        return found
    note = f"the same in all models, and moved apart by these maps: {', '.join(apart[:3])}; if these are no parameters but "
    note += f"constants, give them to infer(..., constants={apart[:3]})"
    return replace(found, stats={**found.stats, "notes": [*found.stats.get("notes", ()), note]})


def _apart(found: Matching, states: Sequence[Mapping[str, torch.Tensor]]) -> list[str]:
    """Tensors that are the same in all models, and not after the maps; statistics do not count."""
    names = found.symmetry.moved - found.symmetry.statistics
    out = []
    for name in sorted(names):
        first = states[0][name]
        if all(torch.equal(s[name].to(first.device), first) for s in states[1:]):
            moved = [e.take(name, s) for e, s in zip(found.to_universe, states, strict=True)]
            if not all(torch.equal(m, moved[0]) for m in moved[1:]):
                out.append(name)
    return out
