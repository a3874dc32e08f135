"""What `automerge.evaluate` returns: frozen measurements that turn into plain data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from automerge import _pictures


@dataclass(frozen=True)
class Evaluation:
    """How good a network is on labelled data.

    Attributes:
        accuracy: share of labels whose class has the largest score, 0 to 1; None if the labels are no classes.
        loss: mean cross-entropy per label in nats; None if the labels are no classes.
        samples: the number of labels.
        metrics: further metrics, means over the batches weighted by their sizes.
        average: for an ensemble, what was averaged: ``probabilities`` or ``logits``; ``outputs`` where there are no classes.
        members: the number of networks.
    """

    accuracy: float | None
    loss: float | None
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    average: str | None = None
    members: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def plot(self, path: str | os.PathLike[str], force: bool = False) -> Path:
        """Draw the numbers as bars.

        Raises:
            AutomergeError: if matplotlib is missing, or the ending is no picture format.
            OutputError: if the path exists (without ``force``) or cannot be written.
        """
        groups: dict[str, Mapping[str, float]] = {}
        if self.accuracy is not None:
            groups["accuracy (%)"] = {"": 100 * self.accuracy}
        if self.loss is not None:
            groups["loss (nats)"] = {"": self.loss}
        groups |= {name: {"": value} for name, value in self.metrics.items()}
        return _pictures.draw_bars(groups, path, force)

    def __str__(self) -> str:
        parts = [] if self.accuracy is None else [f"accuracy {self.accuracy:.2%}"]
        parts += [] if self.loss is None else [f"loss {self.loss:.4f}"]
        parts += [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        who = f" (ensemble of {self.members}, mean of {self.average})" if self.average else ""
        return f"{', '.join(parts)} on {self.samples} samples{who}"


@dataclass(frozen=True)
class Agreement:
    """How often two sources choose the same class; needs no labels.

    Attributes:
        share: 0 to 1.
        samples: the number of predictions compared.
    """

    share: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def plot(self, path: str | os.PathLike[str], force: bool = False) -> Path:
        """Draw the share as a bar.

        Raises:
            AutomergeError: if matplotlib is missing, or the ending is no picture format.
            OutputError: if the path exists (without ``force``) or cannot be written.
        """
        return _pictures.draw_bars({"agreement (%)": {f"{self.samples} samples": 100 * self.share}}, path, force)


@dataclass(frozen=True)
class Barrier:
    """Loss and accuracy along the straight line between two networks.

    The loss barrier is ``max over t of L((1-t) a + t b) - ((1-t) L(a) + t L(b))`` (Entezari et al., ICLR 2022,
    definition 1), never below zero because the end points are on the path; the accuracy barrier is the largest drop
    below the straight line between the end points' accuracies.

    Attributes:
        positions: t, from 0 (a) to 1 (b).
        losses: mean cross-entropy (or another loss that was given) at each t.
        accuracies: accuracy at each t, 0 to 1; empty where labels are no classes.
        repaired: what was done at every inner point: None, ``reset`` or the description of the repair.
        samples: how many labels each point rests on.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    repaired: str | None = None
    samples: int = 0

    @property
    def loss_barrier(self) -> float:
        """The height of the loss above the straight line between the end points."""
        return max(v - line for v, line in zip(self.losses, self._line(self.losses), strict=True))

    @property
    def accuracy_barrier(self) -> float | None:
        """The depth of the accuracy below the straight line between the end points; None without accuracies."""
        if not self.accuracies:
            return None
        return max(line - v for v, line in zip(self.accuracies, self._line(self.accuracies), strict=True))

    def _line(self, values: Sequence[float]) -> list[float]:
        inner = [(1 - t) * values[0] + t * values[-1] for t in self.positions[1:-1]]
        return [values[0], *inner, values[-1]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the heights."""
        return {**asdict(self), "loss_barrier": self.loss_barrier, "accuracy_barrier": self.accuracy_barrier}

    def plot(self, path: str | os.PathLike[str], force: bool = False) -> Path:
        """Draw loss and accuracy along the path; several paths in one picture: `automerge.plot.plot_barrier`.

        Raises:
            AutomergeError: if matplotlib is missing, or the ending is no picture format.
            OutputError: if the path exists (without ``force``) or cannot be written.
        """
        return _pictures.draw_path(self.positions, self.losses, self.accuracies, str(self), path, force)

    def __str__(self) -> str:
        how = f", repaired ({self.repaired})" if self.repaired else ""
        accuracy = f", accuracy barrier {self.accuracy_barrier:.2%}" if self.accuracies else ""
        return f"loss barrier {self.loss_barrier:.4f}{accuracy} over {len(self.positions)} points{how}"


@dataclass(frozen=True)
class CycleError:
    """How far the pairwise maps of a matching are from composing to the identity around cycles; 0 is exact.

    Attributes:
        value: what `Matching.cycle_error` gives.
        models: the number of models.
    """

    value: float
    models: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def plot(self, path: str | os.PathLike[str], force: bool = False) -> Path:
        """Draw the error as a bar.

        Raises:
            AutomergeError: if matplotlib is missing, or the ending is no picture format.
            OutputError: if the path exists (without ``force``) or cannot be written.
        """
        return _pictures.draw_bars({"cycle error (%)": {f"{self.models} models": 100 * self.value}}, path, force)


@dataclass(frozen=True)
class Plane:
    """Loss and accuracy in the plane through three networks (Garipov et al., NeurIPS 2018, arXiv 1802.10026, section 3).

    The plane has orthonormal axes in the space of all float tensors: the first from a to b, the second in the direction of
    c across it.

    Attributes:
        xs: positions along the first axis, in units of weights.
        ys: positions along the second.
        losses: mean cross-entropy (or another loss that was given), ``losses[j][i]`` at ``(xs[i], ys[j])``.
        accuracies: accuracy there, 0 to 1; empty where labels are no classes.
        anchors: the places of a, b and c.
        anchor_losses: mean cross-entropy of a, b and c themselves.
        centre_loss: mean cross-entropy of the mean of the three.
        samples: how many labels each point rests on.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    accuracies: tuple[tuple[float, ...], ...]
    anchors: tuple[tuple[float, float], ...]
    anchor_losses: tuple[float, ...]
    centre_loss: float
    samples: int = 0

    @property
    def centre_barrier(self) -> float:
        """How far the loss of the mean of the three is above the mean of their losses."""
        return self.centre_loss - sum(self.anchor_losses) / len(self.anchor_losses)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "centre_barrier": self.centre_barrier}

    def plot(self, path: str | os.PathLike[str], force: bool = False) -> Path:
        """Draw the loss as filled contours, with the three networks and their mean.

        Raises:
            AutomergeError: if matplotlib is missing, or the ending is no picture format.
            OutputError: if the path exists (without ``force``) or cannot be written.
        """
        return _pictures.draw_plane(self.xs, self.ys, self.losses, self.anchors, path, force)

    def __str__(self) -> str:
        return (
            f"plane of {len(self.xs)} x {len(self.ys)} points: the mean of the three has the loss {self.centre_loss:.4f}, "
            f"{self.centre_barrier:+.4f} against the mean of theirs"
        )


@dataclass(frozen=True)
class Similarity:
    """How alike two networks are: the cosine of their weights, and the CKA of their activations.

    Attributes:
        cosine: over all float tensors as one vector, -1 to 1; 0 if one of them is zero.
        per_tensor: the same for each tensor.
        cka: linear centred kernel alignment, 0 to 1, of the activations at each place of the traced graph that carries a
            group; empty without data. It does not depend on the order of units, nor on rotations: it says how much the
            networks have in common, not how well they are aligned.
        correlation: at the same places the mean correlation of corresponding units; this one says how well.
    """

    cosine: float
    per_tensor: Mapping[str, float]
    cka: Mapping[str, float] = field(default_factory=dict)
    correlation: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def plot(self, path: str | os.PathLike[str], force: bool = False) -> Path:
        """Draw everything as bars; before and after in one picture: `automerge.plot.plot_similarity`.

        Raises:
            AutomergeError: if matplotlib is missing, or the ending is no picture format.
            OutputError: if the path exists (without ``force``) or cannot be written.
        """
        bars = {"cosine of weights": self.per_tensor, "CKA": self.cka, "correlation of units": self.correlation}
        return _pictures.draw_bars({k: v for k, v in bars.items() if v}, path, force)

    def __str__(self) -> str:
        parts = [f"cosine of weights {self.cosine:.4f}"]
        for name, values in (("CKA", self.cka), ("correlation of units", self.correlation)):
            if values:
                parts.append(f"mean {name} {sum(values.values()) / len(values):.4f}")
        return ", ".join(parts)
