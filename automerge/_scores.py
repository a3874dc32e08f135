"""What scores say: the axis of the classes, probabilities, predictions."""

from __future__ import annotations

from math import log
from typing import Any

import torch

from automerge._data import Batch, logits_of
from automerge._errors import AutomergeError

IGNORED = -100


def class_axis(scores: torch.Tensor, labels: torch.Tensor, order: tuple[int, ...] = (1, -1)) -> int | None:
    """The axis of the classes, if the labels are class indices that fit the scores: the first of some that does."""
    if labels.is_floating_point() or scores.ndim != labels.ndim + 1:
        return None
    sizes = tuple(scores.shape)
    for axis in (k for k in order if -scores.ndim <= k < scores.ndim):
        at = axis % scores.ndim
        if (*sizes[:at], *sizes[at + 1 :]) == tuple(labels.shape):
            return axis
    return None


def likely_axis(scores: torch.Tensor, batch: Batch) -> int:
    """The axis of the classes where no labels show it: 1, or -1 where the axes between are those of the inputs (tokens)."""
    between, after = tuple(scores.shape[1:-1]), tuple(scores.shape[2:])
    if not between:
        return -1
    forms = [tuple(t.shape[1:]) for t in batch.tensors()]
    last = any(form[: len(between)] == between for form in forms)
    first = any(form[-len(after) :] == after and len(form) > len(after) for form in forms)
    return -1 if last and not first else 1


def combine(outputs: list[Any], average: str, axis: int) -> torch.Tensor:
    """Log-probabilities, classes last, of one network or of the mean of several."""
    found = [logits_of(o) for o in outputs]
    if any(s.is_complex() for s in found):
        raise AutomergeError(
            "the scores are complex numbers, which have no order; wrap the model so that it returns real ones"
        )
    scores = [s.movedim(axis, -1).double() for s in found]
    if average == "logits":
        return torch.stack(scores).mean(0).log_softmax(-1)
    return torch.stack([s.log_softmax(-1) for s in scores]).logsumexp(0) - log(len(scores))


def predicted(log_probabilities: torch.Tensor) -> torch.Tensor:
    """The most probable class, on the last axis; where there is NaN, no class."""
    lost = log_probabilities.isnan().any(-1)
    return log_probabilities.argmax(-1).masked_fill(lost, IGNORED)


def check_range(labels: torch.Tensor, classes: int, number: int) -> None:
    if not labels.numel():
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise AutomergeError(
            f"batch {number} has labels from {low} to {high}, and the scores are of {classes} classes, 0 to {classes - 1}"
        )
