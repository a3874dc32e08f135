"""Elements of the trees as arrays: composition, inversion, canonical and random ones, and the answer made of them.

As everywhere an element says where each position comes from, ``new = old[p]``; inner arrays are indexed by the *new*
coordinates of their ancestors (`automerge._tree`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from automerge._errors import MatchingError
from automerge._numbers import is_number
from automerge._tree import Perms, Structure
from automerge.matchers._base import Matching
from automerge.matchers._starts import identity_elements, induced, vertices
from automerge.objective import Objective
from automerge.symmetry import Symmetry


def compose(structure: Structure, first: Perms, second: Perms) -> Perms:
    """The element that acts like ``first`` and then ``second``; both name the same roles, with all ancestors."""
    out: Perms = {}
    for r, p in second.items():
        out[r] = first[r][(*_ancestors(structure, second, r), p)]
    return out


def inverse(structure: Structure, element: Perms) -> Perms:
    """The element that undoes another one."""
    out: Perms = {}
    for r, p in element.items():
        out[r] = np.empty_like(p)
        out[r][(*_ancestors(structure, element, r), p)] = np.indices(p.shape)[-1]
    return out


def _ancestors(structure: Structure, element: Perms, r: int) -> tuple[np.ndarray, ...]:
    """For every entry of role r's array the old coordinates of its ancestors."""
    at = np.indices(element[r].shape)
    return tuple(element[a][tuple(at[: k + 1])] for k, a in enumerate(structure.roles[r].path))


def canonical(objective: Objective) -> list[Perms]:
    """Each model's element into an order that does not depend on how its units were labelled: by their squared norms.

    It is unique if no two units have the same norm, as for continuous weights.
    """
    gains = []
    for k, space in enumerate(objective.blocks.spaces):
        norms = torch.zeros(objective.count, space.size, dtype=torch.float64, device=objective.device)
        for b in objective.touching[k]:
            bundle = objective.bundles[b]
            for s, dim in zip(bundle.spaces, bundle.dims, strict=True):
                if s == k:
                    rest = [d for d in range(1, bundle.weights.ndim) if d != dim]
                    norms += bundle.weights.double().square().sum(dim=rest)
        rank = torch.arange(space.size, dtype=torch.float64, device=objective.device)
        gains.append(rank[None, :, None] * norms[:, None, :])
    return vertices(objective, gains)[1] if gains else identity_elements(objective)


def random_elements(objective: Objective, rng: np.random.Generator, reference: int | None = None) -> list[Perms]:
    """One random element per model, the same whatever the order of the models' units.

    Each is drawn in the model's canonical order.

    Args:
        objective: the problem.
        rng: where the draws come from.
        reference: a model that stays where it is; the others are taken to its coordinates.
    """
    structure = objective.blocks.structure
    order = canonical(objective)
    draws = [{r: p for root in structure.roots for r, p in structure.random(root, rng).items()} for _ in order]
    out = [compose(structure, own, draw) for own, draw in zip(order, draws, strict=True)]
    if reference is None:
        return out
    back = inverse(structure, order[reference])
    moved = [compose(structure, element, back) for element in out]
    moved[reference] = identity_elements(objective)[reference]
    return moved


def copy(elements: Sequence[Perms]) -> list[Perms]:
    """The same elements in memory of their own."""
    return [{r: p.copy() for r, p in perms.items()} for perms in elements]


def value_of(objective: Objective, elements: Sequence[Perms]) -> float:
    """The universe objective at one element per model; 0 if nothing moves."""
    return objective.value(induced(objective, elements)) if objective.bundles else 0.0


def answer(
    matcher: object,
    symmetry: Symmetry,
    objective: Objective,
    elements: Sequence[Perms],
    stats: Mapping[str, Any],
    begin: float,
) -> Matching:
    """The matching made of one element per model.

    Its statistics are those given, the universe objective before and after, the generators left out, and the seconds
    since ``begin`` (of `time.perf_counter`).
    """
    structure = objective.blocks.structure
    found = {
        "objective": value_of(objective, elements),
        "start_objective": value_of(objective, identity_elements(objective)),
        **stats,
        "left_out_generators": sorted(structure.dropped),
        "seconds": {"total": time.perf_counter() - begin},
    }
    moved = tuple(structure.element(symmetry, perms) for perms in elements)
    return Matching(moved, symmetry, repr(matcher), found)


def check_block_weights(matcher: object) -> None:
    """Check the option ``block_weights``, see `automerge.objective.Objective`; names are checked against the models later.

    Raises:
        MatchingError: naming the matcher and what is expected.
    """
    given = getattr(matcher, "block_weights")  # noqa: B009 (a matcher has it)
    name = type(matcher).__name__
    if isinstance(given, Mapping):
        wrong = next((n for n, w in given.items() if not (is_number(w) and 0 <= w < float("inf"))), None)
        if wrong is not None:
            raise MatchingError(
                f"{name}(block_weights={{{wrong!r}: {given[wrong]!r}}}): expected finite numbers that are not negative"
            )
    elif given not in ("uniform", "normalised"):
        raise MatchingError(
            f"{name}(block_weights={given!r}): expected uniform, normalised, or a mapping of parameters' names to numbers"
        )


def check_options(
    matcher: object, choices: Mapping[str, Sequence[str]] | None = None, at_least: Mapping[str, float] | None = None
) -> None:
    """Check the options of a matcher.

    Args:
        matcher: whose attributes are looked at.
        choices: option -> the values allowed.
        at_least: option -> the smallest value allowed.

    Raises:
        MatchingError: naming the matcher, the option and what is expected.
    """
    name = type(matcher).__name__
    for option, allowed in (choices or {}).items():
        value = getattr(matcher, option)
        if value not in allowed:
            raise MatchingError(f"{name}({option}={value!r}): expected one of {', '.join(allowed)}")
    for option, least in (at_least or {}).items():
        value = getattr(matcher, option)
        if not value >= least:
            raise MatchingError(f"{name}({option}={value}): expected a number of at least {least}")
