"""Measure networks: accuracy and loss, ensembles, agreement, barriers, cycle errors, weight similarity.

Every function returns a frozen object with ``to_dict()``; `automerge.plot` draws them. No model is changed, and every
module's mode flag is as it was afterwards. A *source* is a module, a pair ``(module, state_dict)``, or a list of those:
an ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from automerge._between import combination
from automerge._copies import copied
from automerge._data import Batches
from automerge._double import own_modes
from automerge._errors import AutomergeError, MatchingError
from automerge._evaluation import Runner, Source, Tally, batches_of
from automerge._extra_state import load_weights, weights_of
from automerge._forward import bind, logits_of
from automerge._measures import Agreement, Barrier, CycleError, Evaluation, Similarity
from automerge._numbers import is_number, is_whole
from automerge._repair_report import Renormaliser
from automerge._scores import (
    IGNORED,
    Metric,
    combine,
    counted,
    likely_axis,
    named_metrics,
    predicted,
)
from automerge._similarity import similarity
from automerge._singular import agreed, marks, measured_again
from automerge.renormalise import check_reset, reset_batchnorm

__all__ = [
    "Agreement",
    "Barrier",
    "CycleError",
    "Evaluation",
    "Similarity",
    "agreement",
    "barrier",
    "cycle_error",
    "evaluate",
    "interpolate",
    "predictions",
    "similarity",
]


# -------------------------------------------------------------------- functions
@own_modes()
def evaluate(
    source: Source,
    data: Any,
    metrics: Mapping[str, Metric] | Sequence[Metric] | Metric | None = None,
    *,
    average: Literal["probabilities", "logits"] = "probabilities",
    inputs: int = 1,
    kwargs: Mapping[str, Any] | None = None,
    class_axis: int | None = None,
) -> Evaluation:
    """Accuracy, mean cross-entropy and any further metric of a network or an ensemble.

    Args:
        source: a module, a pair ``(module, state_dict)``, or a list of those (an ensemble).
        data: batches with labels, ``(inputs, labels)``; integer labels of shape ``(batch, ...)`` with scores ``(batch,
            classes, ...)`` or ``(batch, ..., classes)``. Labels of -100 do not count, as in torch. Of an output with several
            tensors, the scores are its ``logits``, or else its first. Where labels are the inputs themselves,
            and the model's own loss compares them one place later (causal models of transformers), so do loss and accuracy.
        metrics: callables ``(output, labels) -> float``, as a mapping from names, a sequence or one. For an ensemble every
            tensor of the output is a mean, and the scores of classes are the mean of the logits, or the logarithm of the
            mean of the probabilities.
        average: what an ensemble averages.
        inputs: how many of a batch's items are positional inputs.
        kwargs: keyword inputs for every batch.
        class_axis: the axis of the classes in the scores; by default where the labels say: 1 or the last. Where both would
            fit (as many tokens as classes), as in earlier batches, or else 1 as in torch.

    Raises:
        AutomergeError: if the data are empty, have no labels, or the labels are no classes and no metric is given.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> x = torch.eye(2)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2) * 50), model.bias.zero_()
        >>> evaluate(model, [(x, torch.tensor([0, 1]))]).accuracy
        1.0
    """
    if average not in ("probabilities", "logits"):
        raise AutomergeError(f"average must be 'probabilities' or 'logits', got {average!r}")
    named = named_metrics(metrics)
    tally = Tally(class_axis)
    with Runner(source) as runner:
        for number, batch in enumerate(batches_of(runner, data, inputs, kwargs)):
            if batch.labels is None:
                raise AutomergeError(
                    f"batch {number} carries no labels; give (inputs, labels), or use agreement(), which needs none"
                )
            tally.add(runner, batch, named, average, number)
        return tally.result(average if len(runner.networks) > 1 else None, len(runner.networks))


@own_modes()
def agreement(
    a: Source,
    b: Source,
    data: Any,
    *,
    inputs: int = 1,
    kwargs: Mapping[str, Any] | None = None,
    class_axis: int | None = None,
) -> Agreement:
    """The share of predictions (largest score) on which two sources agree; of labels only those of -100 are looked at.

    What they mark (padding, say) does not count here either.

    Args:
        a: a module, a pair ``(module, state_dict)``, or a list of those (an ensemble: the mean of probabilities).
        b: the same.
        data: batches.
        inputs: how many of a batch's items are positional inputs.
        kwargs: keyword inputs for every batch.
        class_axis: the axis of the classes in the scores, by default as in `predictions`.

    Raises:
        AutomergeError: if the data are empty, or the outputs hold one score per sample and so no classes.
    """
    same = total = 0
    with Runner(a) as first, Runner(b) as second:
        for number, batch in enumerate(batches_of(first, data, inputs, kwargs)):
            pair = first.outputs(batch), second.outputs(batch)
            axis = likely_axis(logits_of(pair[0][0]), batch) if class_axis is None else class_axis
            for scores in (logits_of(o) for outputs in pair for o in outputs):
                if not -scores.ndim <= axis < scores.ndim:
                    raise AutomergeError(
                        f"batch {number}: scores {tuple(scores.shape)} have no axis {axis} (class_axis=)"
                    )
                if scores.ndim < 2 or scores.shape[axis] < 2:
                    raise AutomergeError(
                        f"batch {number}: outputs {tuple(scores.shape)} are one score per sample, and agreement is about "
                        "classes; compare such outputs by evaluate(metrics=...)"
                    )
            left, right = (predicted(combine(outputs, "probabilities", axis)) for outputs in pair)
            if left.shape != right.shape:
                raise AutomergeError(
                    f"batch {number}: one gives predictions {tuple(left.shape)}, the other {tuple(right.shape)}"
                )
            valid = counted(batch.labels, left)
            same += int(((left == right) & (left != IGNORED) & valid).sum())
            total += int(valid.sum())
    return Agreement(same / max(total, 1), total)


def predictions(
    source: Source,
    data: Any,
    *,
    inputs: int = 1,
    kwargs: Mapping[str, Any] | None = None,
    class_axis: int | None = None,
) -> list[torch.Tensor]:
    """The predicted class (largest score; for an ensemble of the mean probabilities) of everything in each batch.

    Where scores are NaN there is no prediction, and -100 in its place, the label that does not count.

    Args:
        source: a module, a pair ``(module, state_dict)``, or a list of those (an ensemble).
        data: batches; labels are ignored.
        inputs: how many of a batch's items are positional inputs.
        kwargs: keyword inputs for every batch.
        class_axis: the axis of the classes in the scores; by default 1, but the last where the axes before it are those of
            the inputs, as in a language model.

    Examples:
        >>> predictions(nn.Identity(), [torch.tensor([[0.0, 1.0], [3.0, 2.0]])])
        [tensor([1, 0])]
    """
    out = []
    with Runner(source) as runner:
        for batch in batches_of(runner, data, inputs, kwargs):
            outputs = runner.outputs(batch)
            axis = likely_axis(logits_of(outputs[0]), batch) if class_axis is None else class_axis
            out.append(predicted(combine(outputs, "probabilities", axis)))
    return out


def interpolate(
    sd_a: Mapping[str, torch.Tensor], sd_b: Mapping[str, torch.Tensor], position: float
) -> dict[str, torch.Tensor]:
    """``(1 - t) a + t b`` for every float (or complex) tensor, in float64 and cast back; anything else is taken from ``a``.

    Entries that are the same infinite number in both stay.

    Examples:
        >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)["w"]
        tensor([0.2500, 0.2500])
    """
    if not is_number(position) or not abs(position) < float("inf"):
        raise AutomergeError(f"position is the place on the line, a number from 0 to 1, got {position!r}")
    return combination((sd_a, sd_b), (1 - position, position))


def barrier(
    model: nn.Module,
    sd_a: Mapping[str, torch.Tensor],
    sd_b: Mapping[str, torch.Tensor],
    data: Any,
    points: int = 11,
    repair: Renormaliser | Literal["reset"] | None = None,
    *,
    repair_data: Any = None,
    loss: Metric | None = None,
    inputs: int = 1,
    kwargs: Mapping[str, Any] | None = None,
) -> Barrier:
    """Loss and accuracy along the straight line from ``sd_a`` to ``sd_b``; spectral norms are those of every point's weights.

    Args:
        model: the architecture; not changed.
        sd_a: the weights at 0.
        sd_b: the weights at 1, already aligned to ``sd_a`` if they are to be.
        data: labelled batches.
        points: how many points, end points included.
        repair: repair every inner point: ``"reset"`` for the BatchNorm statistics, or a `Renormaliser` such as `Repair`. The
            end points stay.
        repair_data: batches for the repair; by default ``data``, whose labels it does not use.
        loss: a callable ``(output, labels) -> float`` in the place of the cross-entropy, the mean over a batch: for labels
            that are no classes.
        inputs: how many of a batch's items are positional inputs.
        kwargs: keyword inputs for every batch.

    Raises:
        AutomergeError: for fewer than two points, empty data, labels that are no classes without ``loss``, or a reset where
            there is no BatchNorm.
    """
    if not is_whole(points) or points < 2:
        raise AutomergeError(f"a path needs a whole number of at least two points, got {points!r}")
    check_reset(model, repair)
    batches = Batches(data, inputs, kwargs)
    source = batches if repair_data is None else Batches(repair_data, inputs, kwargs)
    positions = tuple(k / (points - 1) for k in range(points))
    sd_a, sd_b = (bind(model, sd) for sd in (sd_a, sd_b))
    kept = agreed([marks(model, sd) for sd in (sd_a, sd_b)])
    values = []
    for t in positions:
        weights = interpolate(sd_a, sd_b, t)
        if 0 < t < 1:
            weights, _ = measured_again(model, weights, kept)
        if repair is not None and 0 < t < 1:
            weights = _repaired(model, weights, sd_a, sd_b, t, source, repair, inputs, kwargs)
        values.append(evaluate((model, weights), batches, loss and {"loss": loss}, inputs=inputs, kwargs=kwargs))
    losses = [v.metrics["loss"] if loss else v.loss for v in values]
    accuracies = [v.accuracy for v in values]
    known_losses = tuple(v for v in losses if v is not None)
    known = tuple(v for v in accuracies if v is not None)
    return Barrier(positions, known_losses, known, None if repair is None else str(repair), values[0].samples)


def _repaired(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    sd_a: Mapping[str, torch.Tensor],
    sd_b: Mapping[str, torch.Tensor],
    position: float,
    data: Any,
    repair: Renormaliser | str,
    inputs: int,
    kwargs: Mapping[str, Any] | None,
) -> dict[str, torch.Tensor]:
    if isinstance(repair, Renormaliser):
        share = (1 - position, position)
        return repair(model, weights, (sd_a, sd_b), data, weights=share, inputs=inputs, kwargs=kwargs)[0]
    if repair != "reset":
        raise AutomergeError(f"repair must be None, 'reset' or a Renormaliser, got {repair!r}")
    own = copied(model)
    load_weights(own, weights)
    reset_batchnorm(own, data, inputs=inputs, kwargs=kwargs)
    return {n: v.detach() for n, v in weights_of(own).items()}


def cycle_error(matching: Any) -> CycleError:
    """The cycle error of a matching's composed pairwise maps; 0 when they go through one universe.

    Raises:
        MatchingError: if it is no matching.
    """
    if not callable(getattr(matching, "cycle_error", None)):
        raise MatchingError(f"cycle_error takes what automerge.match returns, got a {type(matching).__name__}")
    return CycleError(float(matching.cycle_error()), len(matching.to_universe))
