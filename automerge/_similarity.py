"""How alike two networks are: their weights, and their activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from automerge._between import numbers
from automerge._data import Batches
from automerge._double import own_modes
from automerge._errors import AutomergeError
from automerge._forward import device_of
from automerge._loading import check_values, checked_state
from automerge._measures import Similarity
from automerge._statistics import collect
from automerge.infer import infer
from automerge.symmetry import Symmetry


@own_modes()
def similarity(
    sd_a: Mapping[str, torch.Tensor],
    sd_b: Mapping[str, torch.Tensor],
    *,
    model: nn.Module | None = None,
    data: Any = None,
    symmetry: Symmetry | None = None,
    inputs: int = 1,
    kwargs: Mapping[str, Any] | None = None,
) -> Similarity:
    """Cosine similarity of the weights of two networks and, with data, the similarity of their activations.

    Activations are compared wherever the traced graph carries a group (`automerge._statistics`): by linear CKA,
    ``||S_xy||^2 / (||S_xx|| ||S_yy||)`` (Kornblith et al., ICML 2019, arXiv 1905.00414, equation 5), and by the mean
    correlation of corresponding units that vary in both.

    Args:
        sd_a: a state dict.
        sd_b: another of the same architecture.
        model: the architecture, for activations.
        data: unlabelled or labelled batches, for activations.
        symmetry: of the architecture; inferred from the first batch by default.
        inputs: how many of a batch's items are positional inputs.
        kwargs: keyword inputs for every batch.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.
        AutomergeError: if only one of ``model`` and ``data`` is given.

    Examples:
        >>> similarity({"w": torch.tensor([1., 0.])}, {"w": torch.tensor([1., 1.])}).cosine
        0.7071067811865475
    """
    if (model is None) != (data is None):
        raise AutomergeError("the similarity of activations needs both model= and data=")
    dots, first, second, per = 0.0, 0.0, 0.0, {}
    states = [checked_state(state) for state in (sd_a, sd_b)]
    for name in states[0]:
        if (values := numbers(states, name)) is None:
            continue
        x, y = (v.flatten() for v in values)
        dot, xx, yy = float(x @ y), float(x @ x), float(y @ y)
        per[name] = _cosine(dot, xx, yy)
        dots, first, second = dots + dot, first + xx, second + yy
    cosine = _cosine(dots, first, second)
    if model is None:
        return Similarity(cosine, per)
    check_values(model)
    batches = Batches(data, inputs, kwargs, device_of(model))
    if symmetry is None:
        batch = next(iter(batches))
        symmetry = infer(model, batch.args, batch.kwargs, verify=False)
    found = collect(model, [sd_a, sd_b], symmetry, batches)
    cka, correlation = {}, {}
    for one in found.observed:
        own, other, cross = (one.moments.covariance(*pair) for pair in ((0, 0), (1, 1), (0, 1)))
        squares = [float(c.square().sum()) for c in (cross, own, other)]
        cka[one.place.where] = _cosine(*squares)
        size = (own.diagonal() * other.diagonal()).clamp(min=0).sqrt()
        alive = size > 1e-12 * size.max()
        correlation[one.place.where] = float((cross.diagonal()[alive] / size[alive]).mean()) if alive.any() else 0.0
    return Similarity(cosine, per, cka, correlation)


def _cosine(dot: float, xx: float, yy: float) -> float:
    return dot / float((xx**0.5) * (yy**0.5)) if xx > 0 and yy > 0 else 0.0
