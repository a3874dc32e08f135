"""The loss around several networks: planes through three of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from automerge._between import combination, numbers
from automerge._copies import copied
from automerge._data import Batches
from automerge._errors import AutomergeError
from automerge._extra_state import load_weights, weights_of
from automerge._loading import checked_state
from automerge._measures import Evaluation, Plane
from automerge._numbers import is_number, is_whole
from automerge._scores import Metric
from automerge._singular import agreed, marks, measured_again
from automerge.evaluate import evaluate
from automerge.renormalise import check_reset, reset_batchnorm


def plane(
    model: nn.Module,
    sd_a: Mapping[str, torch.Tensor],
    sd_b: Mapping[str, torch.Tensor],
    sd_c: Mapping[str, torch.Tensor],
    data: Any,
    points: int = 15,
    *,
    margin: float = 0.25,
    repair: Literal["reset"] | None = None,
    repair_data: Any = None,
    loss: Metric | None = None,
    inputs: int = 1,
    kwargs: Mapping[str, Any] | None = None,
) -> Plane:
    """Loss and accuracy in the plane through three networks.

    Args:
        model: the architecture; not changed.
        sd_a: the weights at the origin.
        sd_b: the weights along the first axis; aligned to ``sd_a`` if they are to be.
        sd_c: the weights that span the second axis.
        data: labelled batches.
        points: how many points along each axis.
        margin: how far the grid reaches beyond the three, relative to their extent.
        repair: ``"reset"`` measures the BatchNorm statistics again at every point (not at the three networks).
        repair_data: batches for that; by default ``data``.
        loss: a callable ``(output, labels) -> float`` in the place of the cross-entropy, the mean over a batch.
        inputs: how many of a batch's items are positional inputs.
        kwargs: keyword inputs for every batch.

    Raises:
        AutomergeError: for fewer than two points, labels that are no classes without ``loss``, three networks on one
            line, or a reset where there is no BatchNorm.
        CheckpointError: if the state dicts are of different architectures.

    Examples:
        >>> net = nn.Linear(1, 2, bias=False)
        >>> a, b, c = ({"weight": torch.tensor([[x], [y]])} for x, y in ((0.0, 0.0), (2.0, 0.0), (1.0, 1.0)))
        >>> found = plane(net, a, b, c, [(torch.ones(3, 1), torch.zeros(3, dtype=torch.long))], points=3, margin=0)
        >>> found.anchors
        ((0.0, 0.0), (2.0, 0.0), (1.0, 1.0))
        >>> [round(v, 4) for v in found.losses[0]]
        [0.6931, 0.3133, 0.1269]
    """
    if not is_whole(points) or points < 2:
        raise AutomergeError(f"a plane needs a whole number of at least two points along each axis, got {points!r}")
    if not is_number(margin) or not 0 <= margin < float("inf"):
        raise AutomergeError(f"margin={margin!r}: how far the grid reaches beyond the three, a number of at least 0")
    if repair not in (None, "reset"):
        raise AutomergeError(f"repair must be None or 'reset' in a plane, got {repair!r}")
    check_reset(model, repair)
    places = _plane_places(sd_a, sd_b, sd_c)
    batches = Batches(data, inputs, kwargs)
    source = batches if repair_data is None else Batches(repair_data, inputs, kwargs)
    own = copied(model)
    kept = agreed([marks(own, sd) for sd in (sd_a, sd_b, sd_c)])

    def measured(x: float, y: float, touched: bool) -> Evaluation:
        share = _barycentric(places, x, y)
        weights = combination((sd_a, sd_b, sd_c), share)
        if touched:
            weights, _ = measured_again(own, weights, kept)
        if repair is not None and touched:
            load_weights(own, weights)
            reset_batchnorm(own, source, inputs=inputs, kwargs=kwargs)
            weights = {n: v.detach() for n, v in weights_of(own).items()}
        return evaluate((own, weights), batches, loss and {"loss": loss}, inputs=inputs, kwargs=kwargs)

    def height(found: Evaluation) -> float:
        return float((found.metrics["loss"] if loss else found.loss) or 0.0)

    xs, ys = (_span([p[k] for p in places], margin, points) for k in (0, 1))
    ends = [measured(x, y, False) for x, y in places]
    centre = measured(sum(p[0] for p in places) / 3, sum(p[1] for p in places) / 3, True)
    grid = [[measured(x, y, True) for x in xs] for y in ys]
    return Plane(
        xs,
        ys,
        tuple(tuple(height(e) for e in row) for row in grid),
        tuple(tuple(e.accuracy for e in row if e.accuracy is not None) for row in grid if row[0].accuracy is not None),
        tuple(places),
        tuple(height(e) for e in ends),
        height(centre),
        centre.samples,
    )


def _plane_places(
    a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], c: Mapping[str, torch.Tensor]
) -> list[tuple[float, float]]:
    """Where three state dicts lie in their plane."""
    bb = bc = cc = 0.0
    states = [checked_state(state) for state in (a, b, c)]
    for name in states[0]:
        if (values := numbers(states, name)) is None:
            continue
        one, two = (other - values[0] for other in values[1:])
        bb, bc, cc = bb + float((one * one).sum()), bc + float((one * two).sum()), cc + float((two * two).sum())
    across = cc - bc * bc / bb if bb > 0 else 0.0
    if across <= 1e-12 * cc or bb <= 0:
        raise AutomergeError("the three networks lie on one line (are two of them equal?); a plane needs three corners")
    return [(0.0, 0.0), (bb**0.5, 0.0), (bc / bb**0.5, across**0.5)]


def _barycentric(places: Sequence[tuple[float, float]], x: float, y: float) -> tuple[float, float, float]:
    """The shares of the three corners in a point of their plane."""
    c = y / places[2][1]
    b = (x - c * places[2][0]) / places[1][0]
    return 1 - b - c, b, c


def _span(values: Sequence[float], margin: float, points: int) -> tuple[float, ...]:
    low, high = min(values), max(values)
    low, high = low - margin * (high - low), high + margin * (high - low)
    return tuple(low + (high - low) * k / (points - 1) for k in range(points))
