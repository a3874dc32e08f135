"""What matchers by invertible linear maps share: statistics, the groups that admit them, permutations for the rest."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from automerge._copies import copied
from automerge._data import Batches
from automerge._errors import MatchingError
from automerge._forward import bind, evaluating, logits_of, preserving, run_batch
from automerge._linear_groups import LinearGroup, linear_groups, summary
from automerge._linear_maps import LinearElement, Matrix, linear_element, permutations_of
from automerge._statistics import Mask, Statistics, attention_mask, collect, covariances
from automerge.groups import Element
from automerge.matchers._activations import ActivationMatching
from automerge.matchers._base import Matcher, Matching, Model, Progress, check_models
from automerge.matchers._sites import check_samples, runnable
from automerge.matchers._weight_matching import WeightMatching
from automerge.symmetry import Symmetry

_SINGULAR = 1e-7
_INEXACT = 1e-8
_CONSTANT = 1e-24  # of the square of the mean: rounding in float64


def _permutations() -> Matcher:
    return ActivationMatching(WeightMatching())


@dataclass(frozen=True)
class LinearMatcher(Matcher):
    """Brings each model to a reference by one invertible matrix per group, where the group admits it.

    Implementations say which matrix (`solve`). Groups that admit permutations only (normalisation with weights of each
    unit, gates, depthwise kernels, attention scores and heads; ``stats["permuted_groups"]`` says why) are matched by
    ``permutations``. Because a matrix does not commute with a nonlinearity, each moved model alone computes a slightly
    different function; this *drift* is measured on the data and reported: ``stats["drift"]`` is the root mean square
    change of its output, relative to the output's standard deviation, and ``stats["kept_predictions"]`` the share of
    predictions (largest entry along the last axis) that stay.

    At least one model must be a module, and ``data`` must be given; three passes are made over it.

    Attributes:
        reference: the model that stays where it is; its coordinates are the universe.
        fallback: models whose drift is larger get permutations instead; None: never.
        permutations: the matcher of all other groups, and of models that fall back.
        mask: which tokens count (see `automerge._statistics.collect`): by default those of ``attention_mask``.
    """

    needs_data: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    reference: int = 0
    fallback: float | None = None
    permutations: Matcher = field(default_factory=_permutations)
    mask: Mask | None = field(default=attention_mask, repr=False)  # its text is an address in memory

    @abstractmethod
    def solve(self, own: torch.Tensor, other: torch.Tensor, cross: torch.Tensor, nearest: torch.Tensor) -> Matrix:
        """The matrix T from a model's units to the reference's.

        Args:
            own: float64, ``(n, n)``: the reference's covariance.
            other: the model's covariance.
            cross: the covariance of the reference's units (rows) with the model's.
            nearest: what to prefer where activations say nothing: the identity, as the models are permuted before.
        """

    def match(
        self, models: Sequence[Model], symmetry: Symmetry, *, progress: Progress | None = None, data: Any = None
    ) -> Matching:
        """See `Matcher.match`. Ctrl-C while units are permuted ends with the best permutations so far.

        Raises:
            MatchingError: also without data or without a module, for activations that are NaN or infinite or of which a
                matrix is singular, or if the permutation matcher gives no permutations.
        """
        values = check_models(models, symmetry)
        self._check(len(values))
        network, batches = runnable(self, models, data)
        begin = time.perf_counter()
        base = self.permutations.match(models, symmetry, progress=progress, data=batches)
        if any(isinstance(e, LinearElement) for e in base.to_universe):
            raise MatchingError(f"{type(self).__name__}(permutations=...): expected a matcher by permutations")
        clock = {"permutations": time.perf_counter() - begin}
        start = time.perf_counter()
        plain = [base.between(m, self.reference) for m in range(len(values))]
        if base.stats.get("interrupted"):
            return Matching(tuple(plain), symmetry, repr(self), base.stats)
        # of the permuted models: where a value carries two groups, the units of the other one then correspond
        permuted = [symmetry.apply(v, e) for v, e in zip(values, plain, strict=True)]
        moments = partial(covariances, reference=self.reference)
        found = collect(network, permuted, symmetry, batches, moments=moments, mask=self.mask)
        check_samples(self, found.report(symmetry))
        groups, barred = linear_groups(found.survey, symmetry)
        for g in list(groups):
            if reason := _unusable(found, g, len(values)):
                barred[g] = reason
                del groups[g]
        clock["statistics"] = time.perf_counter() - start
        start = time.perf_counter()
        elements = [self._element(m, plain[m], symmetry, found, groups) for m in range(len(values))]
        clock["solve"] = time.perf_counter() - start
        start = time.perf_counter()
        drift = _Drift(network, batches)
        drifts = [drift.of(v, symmetry.apply(v, e)) for v, e in zip(values, elements, strict=True)]
        clock["drift"] = time.perf_counter() - start
        back = [m for m, d in enumerate(drifts) if self.fallback is not None and not d[0] <= self.fallback]
        for m in back:
            elements[m] = _as_matrices(symmetry, plain[m], groups)
        stats = {
            **found.report(symmetry),
            **summary(groups, barred, symmetry),
            "drift": [d[0] for d in drifts],
            "kept_predictions": [d[1] for d in drifts],
            "fell_back": back,
            "notes": [_few(found, g, symmetry) for g in groups if _samples(found, g) <= symmetry.sets[g].size],
            "inverse_error": max((m.error() for e in elements for m in e.matrices.values()), default=0.0),
            "seconds": {**clock, "total": time.perf_counter() - begin},
        }
        if not groups or len(back) >= len(values) - 1:
            return Matching(tuple(plain), symmetry, repr(self), stats)
        return Matching(tuple(elements), symmetry, repr(self), stats)

    def _check(self, count: int) -> None:
        name = type(self).__name__
        if not 0 <= self.reference < count:
            raise MatchingError(f"{name}(reference={self.reference}): there are the models 0 to {count - 1}")
        if self.fallback is not None and not self.fallback >= 0:
            raise MatchingError(f"{name}(fallback={self.fallback}): expected a drift of at least 0, or None")

    def _element(
        self, m: int, plain: Element, symmetry: Symmetry, found: Statistics, groups: Mapping[int, LinearGroup]
    ) -> LinearElement:
        start = _as_matrices(symmetry, plain, groups)
        if m == self.reference:
            return start
        matrices = {}
        for g, near in start.matrices.items():
            r = self.reference
            parts = [found.covariance(g, *pair).cpu() for pair in ((r, r), (m, m), (r, m))]
            turn = self.solve(parts[0], parts[1], parts[2], torch.eye(len(near.forward), dtype=torch.float64))
            if not turn.error() <= _INEXACT:
                raise MatchingError(
                    f"{self!r}: the matrix of group {symmetry.sets[g].name or g} of model {m} is singular to working "
                    f"precision (inverse off by {turn.error():.1e}); give a larger ridge, or data on which its units vary"
                )
            matrices[g] = near.then(turn)
        return linear_element(symmetry, Element(start.shapes, start.maps, start.sources), start.roles, matrices)


def _samples(found: Statistics, g: int) -> int:
    """The number of samples that decide a generator's matrix; the positions of a unit are samples too."""
    return sum(o.moments.count * o.place.slots[g].shape[1] for o in found.of(g))


def _few(found: Statistics, g: int, symmetry: Symmetry) -> str:
    size = symmetry.sets[g].size
    return f"group {symmetry.sets[g].name or g}: {_samples(found, g)} samples for {size} units; give more data"


def _unusable(found: Statistics, g: int, count: int) -> str | None:
    """Why activations do not determine a matrix at all; None if they do."""
    if not found.of(g):
        return "no activation shows it"
    for m in range(count):
        own = found.covariance(g, m, m)
        level = max(float(o.moments.means[m].square().max()) for o in found.of(g))
        if not own.diagonal().max() > _CONSTANT * level:
            return f"its units never vary in model {m}"
    return None


def _as_matrices(symmetry: Symmetry, element: Element, groups: Mapping[int, LinearGroup]) -> LinearElement:
    """A permutation with the permutations of some groups as matrices."""
    perms = permutations_of(symmetry, element, set(groups))
    own = symmetry.element([perms.get(g, np.arange(x.size)) for g, x in enumerate(symmetry.sets)])
    matrices = {g: Matrix.permutation(p) for g, p in perms.items()}
    return linear_element(symmetry, element.then(own.inverse()), {g: x.roles for g, x in groups.items()}, matrices)


class _Drift:
    """How far a moved model's outputs are from its own."""

    def __init__(self, network: nn.Module, batches: Batches) -> None:
        self.network, self.batches = copied(network), batches

    def of(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """The relative root mean square change of the output, and the share of predictions that stay."""
        changed = total = 0.0
        same = count = 0
        outputs = list(zip(self._outputs(before), self._outputs(after), strict=True))
        entries = sum(x.numel() for x, _ in outputs)
        mean = sum(float(x.sum()) for x, _ in outputs) / max(entries, 1)
        for x, y in outputs:
            changed += float((x - y).square().sum())
            total += float((x - mean).square().sum())
            if x.ndim and x.shape[-1] > 1:
                same += int((x.argmax(-1) == y.argmax(-1)).sum())
                count += x[..., 0].numel()
        if changed == 0:
            return 0.0, 1.0
        return (changed / total) ** 0.5 if total > 0 else float("inf"), same / count if count else 0.0

    def _outputs(self, state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        bound = bind(self.network, state)
        with evaluating(self.network), preserving(self.network, bound):
            return [logits_of(run_batch(self.network, bound, b)).double() for b in self.batches]


def polar(matrix: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor ``U V^T`` of a square matrix; where it is singular, what is nearest to another matrix.

    Activations say nothing about units that never vary, or beyond the number of samples; a permutation then decides.
    """
    left, values, right = torch.linalg.svd(matrix)
    if not values.numel():
        return matrix
    empty = values <= _SINGULAR * values[0]
    turn = left[:, ~empty] @ right[~empty]
    if empty.any():
        one, two = left[:, empty], right[empty]
        inner, _, outer = torch.linalg.svd(one.T @ nearest @ two.T)
        turn = turn + one @ (inner @ outer) @ two
    return turn
