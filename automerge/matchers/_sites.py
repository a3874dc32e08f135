"""The activations of all models as inner products, from the statistics of the traced graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import nn

from automerge._count_sketch import CountSketch
from automerge._data import Batch, Batches
from automerge._errors import MatchingError
from automerge._forward import device_of
from automerge._moments import CrossMoments
from automerge._places import Place
from automerge._statistics import Mask, Observed, attention_mask, collect
from automerge.io import StateDict
from automerge.matchers._augment import Site, correlation, features, scales
from automerge.matchers._base import Model
from automerge.symmetry import Slot, Symmetry

_FEWEST = 32


def observe(
    network: nn.Module,
    states: Sequence[StateDict],
    symmetry: Symmetry,
    batches: Iterable[Batch],
    kind: str,
    mask: Mask | None = attention_mask,
    rank: int = 1024,
) -> tuple[list[Site], dict[str, Any]]:
    """Run all models on the data and gather the activations' inner products.

    Args:
        network: the architecture; a copy of it runs.
        states: the weights of each model.
        symmetry: of the architecture.
        batches: the inputs; one pass.
        kind: "correlation" or "inner".
        mask: which tokens count, see `automerge._statistics.collect`.
        rank: how many numbers are held of a unit at most; a place with more units in all models is sketched.

    Returns:
        One site for all places at which the same groups act alike, and what was observed, for the report.

    Raises:
        MatchingError: for activations that are NaN or infinite.
    """

    def moments(place: Place) -> CrossMoments | CountSketch:
        if len(states) * place.size <= rank:
            return CrossMoments()
        # what deviates in one of a unit's positions hardly counts where it owns many
        return CountSketch(min(rank, max(rank // place.owned, _FEWEST)), crc32(place.node.encode()))

    found = collect(network, states, symmetry, batches, moments=moments, mask=mask)
    alike: dict[tuple[Any, ...], list[Observed]] = {}
    for one in found.observed:
        alike.setdefault(one.place.key, []).append(one)
    return [_site(group, kind) for group in alike.values()], found.report(symmetry)


def _site(observed: Sequence[Observed], kind: str) -> Site:
    place = observed[0].place
    exact = [o.moments for o in observed if isinstance(o.moments, CrossMoments)]
    if exact:  # places at which the same groups act alike are equally large
        root = features(torch.stack([_gram(one, kind) for one in exact]).sum(dim=0))
    else:
        root = _sketched([o.moments for o in observed if isinstance(o.moments, CountSketch)], kind)
    return Site(place.where, (place.size,), {g: (Slot("", 0, table),) for g, table in place.slots.items()}, root)


def _sketched(alike: Sequence[CountSketch], kind: str) -> torch.Tensor:
    """A sketch of all units of all models at several places, ``(N, n, r)``.

    Side by side while they fit into the buckets of one; then added, which is right because each has signs of its own.
    """
    out: torch.Tensor | None = None
    for moments in alike:
        root = moments.root(centred=kind == "correlation")
        if kind == "correlation":
            root = root.mul_(scales(moments.variances(), moments.means)[:, :, None])
        root = root.float()  # near enough for a sketch, and half the memory
        if out is None:
            out = root
        elif out.shape[2] + root.shape[2] <= moments.buckets:
            out = torch.cat([out, root], dim=2)
        else:
            out, root = (out, root) if out.shape[2] >= root.shape[2] else (root, out)
            out[:, :, : root.shape[2]] += root
    assert out is not None
    return out


def _gram(moments: CrossMoments, kind: str) -> torch.Tensor:
    """Correlations, or mean products, of all units of all models: ``(N, n, N, n)``."""
    if kind == "correlation":
        return correlation(moments.joint(), moments.means)
    return moments.joint() + moments.means[:, :, None, None] * moments.means


def check_samples(matcher: object, report: Mapping[str, Any]) -> None:
    """Correlations need two samples.

    Args:
        matcher: who asks.
        report: from `automerge._statistics.Statistics.report`.

    Raises:
        MatchingError: if there are fewer.
    """
    if report["sites"] and report["samples"] < 2:
        raise MatchingError(
            f"{type(matcher).__name__} looks at how activations vary, and the data hold one sample; give a few hundred"
        )


def runnable(matcher: object, models: Sequence[Model], data: Any) -> tuple[nn.Module, Batches]:
    """The network and the batches that a data-driven matcher needs.

    Raises:
        MatchingError: if there are no data, or no model is a module.
    """
    name = type(matcher).__name__
    if data is None:
        raise MatchingError(f"{name} looks at activations: give batches, match(..., data=batches)")
    network = next((m for m in models if isinstance(m, nn.Module)), None)
    if network is None:
        raise MatchingError(
            f"{name} runs the models: give at least one of them as a module (its architecture runs the other state dicts)"
        )
    return network, Batches(data, device=device_of(network))
