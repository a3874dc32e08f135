"""What scores say: the axis of the classes, probabilities, predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from automerge._data import Batch
from automerge._errors import AutomergeError
from automerge._forward import logits_of, run_batch

IGNORED = -100
Metric = Callable[[Any, Any], float | torch.Tensor]


def class_axis(scores: torch.Tensor, labels: torch.Tensor, order: tuple[int, ...] = (1, -1)) -> int | None:
    """The axis of the classes, if the labels are class indices that fit the scores: the first of some that does."""
    if labels.is_floating_point() or scores.ndim != labels.ndim + 1:
        return None
    sizes = tuple(scores.shape)
    for axis in (k for k in order if -scores.ndim <= k < scores.ndim):
        at = axis % scores.ndim
        if sizes[at] > 1 and (*sizes[:at], *sizes[at + 1 :]) == tuple(labels.shape):  # one score is no choice
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


def counted(labels: Any, predictions: torch.Tensor) -> torch.Tensor:
    """Bool, where labels do not say that a prediction is left out; everywhere without such labels."""
    if isinstance(labels, torch.Tensor) and labels.shape == predictions.shape:
        return labels.to(predictions.device) != IGNORED
    return torch.ones_like(predictions, dtype=torch.bool)


def check_range(labels: torch.Tensor, classes: int, number: int) -> None:
    if not labels.numel():
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise AutomergeError(
            f"batch {number} has labels from {low} to {high}, and the scores are of {classes} classes, 0 to {classes - 1}"
        )


def named_metrics(metrics: Mapping[str, Metric] | Sequence[Metric] | Metric | None) -> dict[str, Metric]:
    """Metrics by their names."""
    if metrics is None:
        return {}
    if isinstance(metrics, Mapping):
        named = dict(metrics)
    else:
        every = [metrics] if callable(metrics) or not isinstance(metrics, Sequence) else list(metrics)
        named = {}
        for metric in every:
            name = getattr(metric, "__name__", type(metric).__name__)
            if name in named:
                raise AutomergeError(f"two metrics are called {name!r}; give a mapping from names of your own")
            named[name] = metric
    for name, metric in named.items():
        if isinstance(metric, type):
            raise AutomergeError(f"metric {name!r} is the class {metric.__name__}; give one: {metric.__name__}()")
        if not callable(metric):
            raise AutomergeError(
                f"metric {name!r} is a {type(metric).__name__}, not a callable (output, labels) -> float"
            )
    return named


def one_number(name: str, value: Any) -> float:
    """What a metric gave."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise AutomergeError(f"metric {name!r} gave a tensor of shape {tuple(value.shape)}; it must give one number")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise AutomergeError(f"metric {name!r} gave {value!r}; it must give one number") from None


def size_of(batch: Batch) -> int:
    """The number of samples of a batch: the length of its labels, or of the first tensor among them or the inputs."""
    labels = batch.labels
    if isinstance(labels, torch.Tensor):
        return int(labels.shape[0]) if labels.ndim else 1
    tensors = [t for t in (*tree_leaves(labels), *batch.tensors()) if isinstance(t, torch.Tensor)]
    return next((int(t.shape[0]) for t in tensors if t.ndim), 1)


def mean_output(outputs: list[Any], average: str, axis: int | None) -> Any:
    """The mean output of an ensemble, of the same form as one: of logits, or log-probabilities where there are classes."""
    scores = [logits_of(o) for o in outputs]
    if average == "logits" or axis is None:
        mean = torch.stack(scores).mean(0)
    else:
        mean = combine(outputs, average, axis).movedim(-1, axis)
    parts = [tree_flatten(o)[0] for o in outputs]
    if isinstance(outputs[0], torch.Tensor) or not any(leaf is scores[0] for leaf in parts[0]):
        return mean
    leaves = []
    for own in zip(*parts, strict=True):
        first = own[0]
        if first is scores[0]:
            leaves.append(mean)
        elif isinstance(first, torch.Tensor) and (first.is_floating_point() or first.is_complex()):
            leaves.append(torch.stack(own).mean(0))
        else:
            leaves.append(first)
    return tree_unflatten(leaves, tree_flatten(outputs[0])[1])


def names_next(
    model: nn.Module, weights: Mapping[str, torch.Tensor] | None, batch: Batch, scores: torch.Tensor, axis: int
) -> bool | None:
    """Whether a position's scores are for the label of the next one, as in the causal models of transformers.

    They take the inputs themselves as ``labels``. The model's own loss says how it reads them.

    Returns:
        None if this batch cannot tell.
    """
    labels = batch.labels
    if labels.ndim != 2 or labels.shape[1] < 2 or axis % scores.ndim != 2:
        return None
    valid = counted(labels, labels)
    if not bool(valid.any()):
        return None
    tokens = [t for t in batch.tensors() if t.shape == labels.shape and t.dtype == labels.dtype]
    if not any(torch.equal(t[valid], labels[valid]) for t in tokens):
        return False
    try:
        output = run_batch(model, weights, replace(batch, kwargs={**batch.kwargs, "labels": labels}))
    except AutomergeError:
        return False
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(own, torch.Tensor) or own.numel() != 1:
        return False
    flat = scores.double()
    here = F.cross_entropy(flat.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    later = F.cross_entropy(flat[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    return bool((own - later).abs() < (own - here).abs())
