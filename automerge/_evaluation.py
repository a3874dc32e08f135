"""Running what is evaluated, and sums over its batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from automerge._data import Batch, Batches
from automerge._errors import AutomergeError
from automerge._forward import bind, device_of, evaluating, logits_of, preserving, run_batch
from automerge._measures import Evaluation
from automerge._scores import (
    IGNORED,
    Metric,
    check_range,
    class_axis,
    combine,
    mean_output,
    names_next,
    one_number,
    predicted,
    size_of,
)

Network = nn.Module | tuple[nn.Module, Mapping[str, torch.Tensor]]
Source = Network | list[Network]


class Runner:
    """A source with its weights bound, in eval mode between ``enter`` and ``exit``."""

    def __init__(self, source: Source) -> None:
        parts = source if isinstance(source, list) else [source]
        if not parts:
            raise AutomergeError("an ensemble needs at least one network")
        self.networks = [_network(part) for part in parts]
        self._stack = ExitStack()

    def __enter__(self) -> Runner:
        for model, weights in self.networks:
            self._stack.enter_context(evaluating(model))
            self._stack.enter_context(preserving(model, weights))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def outputs(self, batch: Batch) -> list[Any]:
        return [run_batch(model, weights, batch) for model, weights in self.networks]


def _network(part: Network) -> tuple[nn.Module, dict[str, torch.Tensor] | None]:
    if isinstance(part, nn.Module):
        return part, None
    if isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], nn.Module):
        return part[0], bind(*part)
    raise AutomergeError(
        f"expected a module, a pair (module, state_dict) or a list of those, got a {type(part).__name__}"
    )


class Tally:
    """Sums over batches."""

    def __init__(self, axis: int | None) -> None:
        self.order = (1, -1) if axis is None else (axis,)
        self.correct = self.loss = 0.0
        self.samples = self.weight = 0
        self.classes = True
        self.shifts: bool | None = None  # labels stand one place later than their scores; unknown until it can be asked
        self.metrics: dict[str, float] = {}

    def add(self, runner: Runner, batch: Batch, metrics: Mapping[str, Metric], average: str, number: int) -> None:
        outputs, labels = runner.outputs(batch), batch.labels
        scores = logits_of(outputs[0])
        axis = class_axis(scores, labels, self.order) if isinstance(labels, torch.Tensor) else None
        size = size_of(batch)
        if axis is None:
            if not metrics:
                shape = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
                raise AutomergeError(
                    f"batch {number}: labels {shape} are no class indices for scores {tuple(scores.shape)}; "
                    "give a callable (output, labels) -> float: metrics={'name': callable}, or loss=callable along a path"
                )
            self.classes = False
            self.samples += size
        else:
            if axis != self.order[0]:  # the other one did not fit: it is this one from now on
                self.order = (axis, *self.order)
            if self.shifts is None:
                self.shifts = names_next(*runner.networks[0], batch, scores, axis)
            log_probabilities = combine(outputs, average, axis)
            wanted = labels
            if self.shifts:
                log_probabilities, wanted = log_probabilities[:, :-1], labels[:, 1:]
            self._count(log_probabilities.flatten(0, -2), wanted.flatten().long(), number)
        self.weight += size
        if metrics:
            output = outputs[0] if len(outputs) == 1 else mean_output(outputs, average, axis)
            for name, metric in metrics.items():
                self.metrics[name] = self.metrics.get(name, 0.0) + size * one_number(name, metric(output, labels))

    def _count(self, flat: torch.Tensor, wanted: torch.Tensor, number: int) -> None:
        valid = wanted != IGNORED
        check_range(wanted[valid], flat.shape[-1], number)
        self.samples += int(valid.sum())
        self.correct += float((predicted(flat) == wanted)[valid].sum())
        self.loss += float(F.nll_loss(flat[valid], wanted[valid], reduction="sum")) if valid.any() else 0.0

    def result(self, average: str | None, members: int) -> Evaluation:
        if self.classes and not self.samples:
            raise AutomergeError(f"no label counts: all of them are {IGNORED}, which marks what is to be left out")
        count = max(self.samples, 1)
        means = {name: value / max(self.weight, 1) for name, value in self.metrics.items()}
        if not self.classes:
            return Evaluation(None, None, self.samples, means, average and "outputs", members)
        return Evaluation(self.correct / count, self.loss / count, self.samples, means, average, members)


def batches_of(runner: Runner, data: Any, inputs: int, kwargs: Mapping[str, Any] | None) -> Iterator[Batch]:
    return iter(Batches(data, inputs, kwargs, device_of(runner.networks[0][0])))
