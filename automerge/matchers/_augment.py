"""Activations as parameters: what makes every matcher of weights one of activations.

The inner products of two models' activations, ``C_lm = Z_l Z_m^T`` (n x n), are all that matching looks at. Stacked over
the models they form one positive semi-definite matrix, and any square root ``F F^T`` of it gives a matrix ``F_m`` of shape
``(n, r)`` per model with ``F_l F_m^T = C_lm``; of wide layers a sketch of ``Z`` gives nearly such. So ``F_m`` is put
beside the weights as one more parameter, whose first axis moves with its group and whose second is pinned: the objective
of the weights is then the objective of the activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from automerge.groups import Element
from automerge.io import StateDict
from automerge.symmetry import Slot, Symmetry

_PREFIX = "activations of "
_NEGLIGIBLE = 1e-12
_ROUNDING = 1e-24


@dataclass(frozen=True, eq=False)
class Site:
    """The activations of all models at one value of the network.

    Attributes:
        name: where, for the report.
        shape: the extents of the axes that are kept apart; everything else counts as samples.
        slots: generator number -> its slots on those axes.
        root: ``(N, n, r)`` with n the product of ``shape``: rows with the inner products of all units of all models.
    """

    name: str
    shape: tuple[int, ...]
    slots: Mapping[int, Sequence[Slot]]
    root: torch.Tensor


def correlation(gram: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Covariances ``(N, n, N, n)`` as correlations; 0 for a unit that does not vary beyond rounding of its mean ``(N, n)``."""
    count, n = gram.shape[:2]
    scale = scales(gram.reshape(count * n, -1).diagonal().reshape(count, n), means)
    return gram * scale[:, :, None, None] * scale[None, None]


def scales(variance: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """What to multiply units ``(N, n)`` by so that their variance is 1; 0 for what does not vary beyond rounding."""
    variance = variance.clamp(min=0)
    alive = variance > _NEGLIGIBLE * variance.amax().clamp(min=torch.finfo(variance.dtype).tiny)
    alive &= variance > _ROUNDING * means.square()
    return torch.where(alive, variance.clamp(min=torch.finfo(variance.dtype).tiny).rsqrt(), 0.0)


def features(gram: torch.Tensor) -> torch.Tensor:
    """A square root of a positive semi-definite ``(N, n, N, n)``: ``(N, n, r)`` with ``F_l F_m^T = gram[l, :, m, :]``.

    It depends on the order of units as it should: permuting the units of one model permutes its rows.
    """
    count, n = gram.shape[:2]
    flat = gram.reshape(count * n, count * n)
    values, vectors = torch.linalg.eigh((flat + flat.T) / 2)
    keep = values > _NEGLIGIBLE * values[-1:].clamp(min=0)
    keep[-1:] = True  # one column of zeros where nothing varies: an axis needs an entry
    root = vectors[:, keep] * values[keep].clamp(min=0).sqrt()
    return root.reshape(count, n, -1)


def augment(
    symmetry: Symmetry, models: Sequence[StateDict], sites: Sequence[Site], mix: float
) -> tuple[Symmetry, list[StateDict]]:
    """A symmetry and models with the activations as further parameters.

    Both parts of the objective are divided by their value for models that are all equal: the mean squared norm.

    Args:
        symmetry: of the models.
        models: their state dicts.
        sites: the activations.
        mix: the share of the activations in the objective, in [0, 1]; at 1 the weights only tell how groups nest.
    """
    found = {_PREFIX + site.name: site.root for site in sites}
    weighed = [n for n in _moving(symmetry) if n not in symmetry.statistics]
    on_weights = _scale(1 - mix, [torch.stack([_wide(m[n]).cpu() for m in models]) for n in weighed])
    on_activations = _scale(mix, list(found.values()))
    out: list[StateDict] = []
    for m, model in enumerate(models):
        own = dict(model)
        if mix < 1:
            own |= {n: _wide(v) * on_weights for n, v in model.items() if v.is_floating_point() or v.is_complex()}
        device = next((v.device for v in model.values()), torch.device("cpu"))
        for site, (name, value) in zip(sites, found.items(), strict=True):
            own[name] = (value[m] * on_activations).reshape(*site.shape, -1).to(device)
        out.append(own)
    slots: dict[int, list[Slot]] = {}
    for site in sites:
        for g, mine in site.slots.items():
            slots.setdefault(g, []).extend(replace(s, param=_PREFIX + site.name) for s in mine)
    sets = tuple(replace(g, slots=(*g.slots, *slots.get(i, ()))) for i, g in enumerate(symmetry.sets))
    shapes = {**symmetry.shapes, **{n: tuple(out[0][n].shape) for n in found}}
    statistics = symmetry.statistics | (frozenset(symmetry.shapes) if mix >= 1 else frozenset())
    larger = replace(symmetry, shapes=shapes, sets=sets, statistics=statistics, axis_graph=None, exchanges=())
    return larger, out


def _moving(symmetry: Symmetry) -> list[str]:
    return sorted(symmetry.moved)


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _scale(share: float, values: Sequence[torch.Tensor]) -> float:
    """What to multiply tensors ``(N, ...)`` by so that their mean squared norm is ``share``."""
    norm = sum(float(v.abs().double().square().sum()) / v.shape[0] for v in values)
    return float(np.sqrt(share / norm)) if norm > 0 else 1.0


def restrict(element: Element, symmetry: Symmetry) -> Element:
    """The part of an element of the larger symmetry that moves parameters."""
    return Element(symmetry.shapes, {n: m for n, m in element.maps.items() if n in symmetry.shapes})
