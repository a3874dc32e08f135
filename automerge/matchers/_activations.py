"""Matching by activations, with any matcher of weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from automerge._errors import MatchingError
from automerge._statistics import Mask, attention_mask
from automerge.matchers._augment import augment, restrict
from automerge.matchers._base import Matcher, Matching, Model, Progress, check_models
from automerge.matchers._elements import check_options
from automerge.matchers._frank_wolfe import FrankWolfe
from automerge.matchers._sites import check_samples, observe, runnable
from automerge.symmetry import Symmetry


@dataclass(frozen=True)
class ActivationMatching(Matcher):
    """Match units that do the same on data (Git Re-Basin, arXiv 2209.04836, section 3.1; Li et al. 2015).

    Inner products of activations are a quadratic form like those of weights, so they join the weights as further
    parameters and any matcher of weights solves the rest: ``ActivationMatching(WeightMatching(reference=0))`` is the
    pairwise method of the papers, ``ActivationMatching(MergeMany())`` matches each model to the mean of the others, and
    ``ActivationMatching(FrankWolfe())``, the default, works in the universe.

    The objective is ``mix * activations + (1 - mix) * weights``, each part divided by its value for equal models.
    Activations are read where linear maps, convolutions and attention read them. Every entry along batch, pixels and
    tokens is a sample. Groups that no activation shows are matched by weights if ``mix`` is below 1, and stay otherwise;
    ``stats["not_observed"]`` lists them.

    At least one of the models must be a module, and ``data`` must be given; one pass is made over it.

    Attributes:
        solver: any matcher that needs no data.
        kind: "correlation" (of centred activations), or "inner" (products, as Git Re-Basin's).
        mix: the share of the activations, in [0, 1].
        mask: which tokens count (see `automerge._statistics.collect`): by default those of ``attention_mask``.
        rank: how many numbers of each unit's activations are held. Up to so many units in all models, or samples, inner
            products are exact; beyond, they are those of a count sketch, off by about ``1 / sqrt(rank)`` of the
            activations' norms.

    Examples:
        >>> import torch
        >>> from automerge import infer
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        >>> s = infer(net, torch.randn(1, 2))
        >>> planted = s.element([[2, 0, 3, 1, 5, 4]])
        >>> other = s.apply(net.state_dict(), planted)
        >>> ActivationMatching().match([net, other], s, data=torch.randn(50, 2)).between(0, 1) == planted
        True
    """

    needs_data: ClassVar[bool] = True

    solver: Matcher = field(default_factory=FrankWolfe)
    kind: str = "correlation"
    mix: float = 0.5
    mask: Mask | None = field(default=attention_mask, repr=False)  # its text is an address in memory
    rank: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, {"kind": ("correlation", "inner")}, {"rank": 1})
        if not 0 <= self.mix <= 1:
            raise MatchingError(f"ActivationMatching(mix={self.mix}): expected a share between 0 and 1")
        if self.solver.needs_data:
            raise MatchingError(
                f"ActivationMatching(solver={type(self.solver).__name__}(...)): the solver must be a matcher of weights, "
                "such as FrankWolfe() or MergeMany()"
            )

    def match(
        self, models: Sequence[Model], symmetry: Symmetry, *, progress: Progress | None = None, data: Any = None
    ) -> Matching:
        """See `Matcher.match`. Ctrl-C while solving ends with the best matching so far."""
        values = check_models(models, symmetry)
        network, batches = runnable(self, models, data)
        begin = time.perf_counter()
        # activations of one module are compared with those of the same module, so modules are exchanged by weights before
        before = self.solver.match(values, symmetry).to_universe if symmetry.exchanges else ()
        values = [symmetry.apply(v, e) for v, e in zip(values, before, strict=True)] if before else values
        sites, report = observe(network, values, symmetry, batches, self.kind, self.mask, self.rank)
        if self.kind == "correlation":
            check_samples(self, report)
        observed = time.perf_counter() - begin
        larger, grown = augment(symmetry, values, sites, self.mix)
        del sites  # of wide layers they fill more memory than the weights
        found = self.solver.match(grown, larger, progress=progress)
        moved = tuple(restrict(element, symmetry) for element in found.to_universe)
        if before:
            moved = tuple(a.then(b) for a, b in zip(before, moved, strict=True))
        seconds = {"activations": observed, **dict(found.stats.get("seconds", {}))}
        seconds["total"] = time.perf_counter() - begin
        return Matching(moved, symmetry, repr(self), {**found.stats, **report, "seconds": seconds})
