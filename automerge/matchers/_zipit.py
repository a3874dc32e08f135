"""ZipIt: merge the units that correlate most, of whichever models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from automerge._linear_groups import linear_groups, summary
from automerge._linear_maps import Matrix, linear_element, permutations_of
from automerge._statistics import Mask, Statistics, attention_mask, collect
from automerge.matchers._activations import ActivationMatching
from automerge.matchers._base import Matcher, Matching, Model, Progress, check_models
from automerge.matchers._pairwise import check_reference
from automerge.matchers._sites import check_samples, runnable
from automerge.matchers._weight_matching import WeightMatching
from automerge.symmetry import Symmetry

_HINT = 1e-6  # decides between equal correlations, so that equal models stay what they are


def _permutations() -> Matcher:
    return ActivationMatching(WeightMatching())


@dataclass(frozen=True)
class ZipIt(Matcher):
    """Merge the most correlated units, within a model as well as across models (Stoica et al., ICLR 2024, 2305.03053).

    All ``N n`` units of a group are clustered greedily by the correlation of their activations, always the two clusters
    whose means correlate most, until n are left. Producers are averaged over each cluster, consumers read every member's
    cluster: the merged weight is ``sum_m M_m W_m U_m`` over the models (equation 2 of the paper, for N models). Groups that
    admit no matrices (`automerge._linear_groups`; ``stats["permuted_groups"]`` says why) are permuted instead, so that
    where every group is such a one, this is ``permutations``.

    Units merged within a model have no way back: there are maps to the universe, whose uniform average is the merged
    network, and none between models; one moved model alone is no network. So `merge` takes no ``weights`` and
    ``coordinates``, and repairs by ``"reset"`` at most. The paper's partial merging, which keeps the last layers of every
    model apart, makes a larger architecture and is not done here.

    At least one model must be a module, and ``data`` must be given. Memory is ``(N n)^2`` numbers per group.

    Attributes:
        within: allow units of one model to be merged; else only units of different models, as long as there are any.
        reference: the model whose units give the clusters their places.
        permutations: the matcher of all other groups.
        mask: which tokens count (see `automerge._statistics.collect`): by default those of ``attention_mask``.

    Examples:
        >>> from automerge import infer, merge
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(60, 4)
        >>> s = infer(net, x)
        >>> other = s.apply(net.state_dict(), s.random_element(0))
        >>> merged = merge([net, other], x, matcher=ZipIt(), data=x, repair="none").state_dict
        >>> all(torch.allclose(merged[n], v, atol=1e-6) for n, v in net.state_dict().items())
        True
    """

    needs_data: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    separable: ClassVar[bool] = False

    within: bool = True
    reference: int = 0
    permutations: Matcher = field(default_factory=_permutations)
    mask: Mask | None = field(default=attention_mask, repr=False)  # its text is an address in memory

    def match(
        self, models: Sequence[Model], symmetry: Symmetry, *, progress: Progress | None = None, data: Any = None
    ) -> Matching:
        """See `Matcher.match`. Ctrl-C while units are permuted ends with the best permutations so far.

        Raises:
            MatchingError: also without data or without a module, or for activations that are NaN or infinite.
        """
        values = check_models(models, symmetry)
        check_reference(self, self.reference, len(values))
        network, batches = runnable(self, models, data)
        begin = time.perf_counter()
        base = self.permutations.match(models, symmetry, progress=progress, data=batches)
        plain = [base.between(m, self.reference) for m in range(len(values))]
        if base.stats.get("interrupted"):
            return Matching(tuple(plain), symmetry, repr(self), base.stats)
        # of the permuted models: where a value carries two groups, the units of the other one then correspond
        permuted = [symmetry.apply(v, e) for v, e in zip(values, plain, strict=True)]
        found = collect(network, permuted, symmetry, batches, mask=self.mask)
        check_samples(self, found.report(symmetry))
        groups, barred = linear_groups(found.survey, symmetry)
        for g in [g for g in groups if not found.of(g)]:
            barred[g] = "no activation shows it"
            del groups[g]
        clusters = {g: self._clusters(found, g, len(values)) for g in groups}
        stats = {
            **found.report(symmetry),
            **summary(groups, barred, symmetry),
            "within": {symmetry.sets[g].name or str(g): _within(c) for g, c in clusters.items()},
            "seconds": {"total": time.perf_counter() - begin},
        }
        if not groups:
            return Matching(tuple(plain), symmetry, repr(self), stats)
        roles = {g: x.roles for g, x in groups.items()}
        elements = []
        for m, element in enumerate(plain):
            perms = permutations_of(symmetry, element, set(groups))
            own = symmetry.element([perms.get(g, np.arange(x.size)) for g, x in enumerate(symmetry.sets)])
            matrices = {g: _matrix(c, m, Matrix.permutation(perms[g])) for g, c in clusters.items()}
            elements.append(linear_element(symmetry, element.then(own.inverse()), roles, matrices))
        return Matching(tuple(elements), symmetry, repr(self), stats)

    def _clusters(self, found: Statistics, g: int, count: int) -> np.ndarray:
        """For every model and unit its cluster, ``(N, n)``; clusters stand where their first unit of the reference does."""
        parts = [torch.cat([found.covariance(g, a, b) for b in range(count)], dim=1) for a in range(count)]
        covariance = torch.cat(parts).cpu().numpy()
        n = covariance.shape[0] // count
        labels = zip_units(covariance, n, self.within).reshape(count, n)
        return _placed(labels, self.reference)


def zip_units(covariance: np.ndarray, keep: int, within: bool = True) -> np.ndarray:
    """Cluster units greedily: always the two clusters whose mean activations correlate most, until ``keep`` are left.

    Args:
        covariance: float64, ``(N n, N n)``: of the units of N models, model after model; n is ``keep``.
        keep: how many clusters are left, the number of units of one model.
        within: whether clusters that hold units of one model may be merged while others are left.

    Returns:
        int64, ``(N n,)``: the cluster of each unit, numbered from 0.
    """
    total = covariance.shape[0]
    sums = covariance.astype(np.float64, copy=True)
    unit = np.arange(total)
    hint = (unit[:, None] % keep == unit[None] % keep).astype(np.float64)
    clash = (unit[:, None] // keep == unit[None] // keep).astype(np.float64) * (not within)
    label = unit.copy()
    alive = np.ones(total, bool)
    score = _scores(sums, hint, clash)
    for _ in range(total - keep):
        a, b = sorted(divmod(int(score.argmax()), total))
        for table in (sums, hint, clash):
            table[a] += table[b]
            table[:, a] += table[:, b]
        label[label == b] = a
        alive[b] = False
        score[b] = score[:, b] = -np.inf
        row = _score_row(sums, hint, clash, a)
        row[~alive] = -np.inf
        score[a] = score[:, a] = row
    return np.unique(label, return_inverse=True)[1].reshape(-1)


def _scores(sums: np.ndarray, hint: np.ndarray, clash: np.ndarray) -> np.ndarray:
    return np.stack([_score_row(sums, hint, clash, k) for k in range(len(sums))])


def _score_row(sums: np.ndarray, hint: np.ndarray, clash: np.ndarray, k: int) -> np.ndarray:
    """The correlation of one cluster's mean with the others'.

    Units that never vary correlate with nothing, but wholly with those that never vary at the same place elsewhere.
    """
    variance = sums.diagonal().clip(min=0)
    alive = variance > 1e-12 * variance.max()
    size = np.sqrt(variance * variance[k])
    row = np.where(alive & alive[k], sums[k] / np.where(size > 0, size, 1.0), 0.0)
    row = np.where(~alive & ~alive[k] & (hint[k] > 0), 1.0, row)
    row = row + _HINT * (hint[k] > 0) - 4.0 * (clash[k] > 0)
    row[k] = -np.inf
    return row


def _placed(labels: np.ndarray, reference: int) -> np.ndarray:
    """Clusters renumbered by their first unit of the reference; those without one fill the places that are left."""
    n = labels.shape[1]
    place = np.full(n, -1)
    taken = np.zeros(n, bool)
    for u, c in enumerate(labels[reference].tolist()):
        if place[c] < 0:
            place[c], taken[u] = u, True
    order = [c for row in np.delete(labels, reference, axis=0).tolist() for c in row]
    free = iter(np.flatnonzero(~taken).tolist())
    for c in dict.fromkeys(order):
        if place[c] < 0:
            place[c] = next(free)
    return place[labels]


def _matrix(clusters: np.ndarray, model: int, before: Matrix) -> Matrix:
    """What one model's units are multiplied by, so that the models' uniform average is the merged network."""
    count, n = clusters.shape
    member = torch.zeros(n, n, dtype=torch.float64)
    member[torch.from_numpy(clusters[model]), torch.arange(n)] = 1.0
    size = torch.from_numpy(np.bincount(clusters.reshape(-1), minlength=n).astype(np.float64))
    forward = count * member / size[:, None]
    return Matrix(forward @ before.forward, before.inverse @ member.T, invertible=False)


def _within(clusters: np.ndarray) -> int:
    """How many units share their cluster with another unit of the same model."""
    return sum(int((np.bincount(row)[row] > 1).sum()) for row in clusters)
